"""Attention of every query to every key in 8 and 4 bits."""
