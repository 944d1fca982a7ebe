"""Sparse VideoGen2: clusters of queries and of keys."""

from ..._moved import names_of

__getattr__ = names_of(__name__)
