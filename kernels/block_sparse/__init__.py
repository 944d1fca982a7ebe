"""Attention over a map of variable-size blocks."""

from svg._moved import names_of

from .blocks import BlockMap, Tail
from .op import block_sparse_attention
from .reference import block_sparse_attention_reference

__all__ = ["BlockMap", "Tail", "block_sparse_attention", "block_sparse_attention_reference"]

__getattr__ = names_of(__name__)  # what was in a module of this name
