"""Quantisation of Q, K and V, and the names of precisions."""
