"""Attention over a map of variable-size blocks, in 8 bits."""
