"""Sparse VideoGen: every head is spatial or temporal."""

from ..._moved import names_of

__getattr__ = names_of(__name__)
