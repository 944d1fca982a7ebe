"""Attention over a map of variable-size blocks."""

from .blocks import Tail
from .op import block_sparse_attention
from .reference import block_sparse_attention_reference

__all__ = ["Tail", "block_sparse_attention", "block_sparse_attention_reference"]
