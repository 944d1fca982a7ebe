"""Attention over a map of variable-size blocks."""
