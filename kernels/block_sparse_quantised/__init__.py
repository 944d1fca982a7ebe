"""Attention over a map of variable-size blocks, in 8 bits."""

from .op import block_sparse_attention_quantised
from .reference import block_sparse_attention_quantised_reference

__all__ = ["block_sparse_attention_quantised", "block_sparse_attention_quantised_reference"]
