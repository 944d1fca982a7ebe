"""Quantisation of Q, K and V, and the names of precisions."""

from svg._moved import names_of

__getattr__ = names_of(__name__)  # what was in a module of this name
