"""Attention over a map of variable-size blocks, in 8 bits."""

from svg._moved import names_of

from .op import block_sparse_attention_quantised
from .reference import block_sparse_attention_quantised_reference

__all__ = ["block_sparse_attention_quantised", "block_sparse_attention_quantised_reference"]

__getattr__ = names_of(__name__)  # what was in a module of this name
