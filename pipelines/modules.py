"""What is read of Diffusers' attention modules, for type checkers: to them any attribute of a module is a tensor or a module."""

from __future__ import annotations

from typing import Any

from torch import nn


class Attention(nn.Module):
    """A video attention module of a transformer. None is made: nearly every family has a class of its own for it.

    Attributes:
        processor: computes the module; `set_processor` puts another in its place (MochiAttention has no such method).
        heads: of the queries.
        fused_projections: whether `to_qkv` stands for `to_q`, `to_k` and `to_v`.
        to_q, to_k, to_v, to_qkv: projections of the video, [..., C] -> [..., H * D].
        norm_q, norm_k: QK-norms, or None.
        to_out: a linear and a dropout, or None where the block projects itself.
        add_q_proj, add_k_proj, add_v_proj: projections of text with weights of its own, or None.
        norm_added_q, norm_added_k, to_add_out: its norms and its output, or None.
    """

    processor: Any
    set_processor: Any
    heads: int
    fused_projections: bool
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_qkv: nn.Module
    norm_q: Any
    norm_k: Any
    to_out: nn.ModuleList
    add_q_proj: Any
    add_k_proj: Any
    add_v_proj: Any
    norm_added_q: Any
    norm_added_k: Any
    to_add_out: Any
