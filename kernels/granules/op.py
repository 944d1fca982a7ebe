"""Attention over lists of granules, with means for what is not listed: checks and the choice of a kernel.

Three computations of one specification: plain torch (reference.py), Hopper's kernel (hopper.py), any GPU's (triton.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import target
from ..common.numbers import base2
from . import hopper, triton
from .reference import granule_attention_reference
from .values import ROWS, SIZES, GranuleLists, Granules

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Keys of a stage and stages of Hopper's kernel, by padded head dim: 128 is measured (docs/lab/near.md), 64 compiled only.
HOPPER = {64: (128, 3), 128: (128, 2)}


def granule_attention(
    q: Tensor,
    granules: Granules,
    lists: GranuleLists,
    *,
    q_order: Tensor | None = None,
    sm_scale: float | None = None,
    tail: bool = True,
    return_lse: bool = False,
    out: Tensor | None = None,
    only: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row group over the tokens of its listed granules and the means of all others.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32 in original order; the last dim is contiguous.
        granules: of the keys and values.
        lists: which granules each row group computes.
        q_order: int32 or int64 [B, H, V], sorted -> original index of the video's queries, any strides; None: all S in
            order.
        sm_scale: softmax scale, positive; default D ** -0.5.
        tail: whether each unlisted granule takes part as `size` keys equal to its mean; else it is left out.
        return_lse: also return the log-sum-exp.
        out: [B, H, S, D] to write into; rows that q_order does not name are left as they are. Default: zeros.
        only: int32 [B, H]; rows of heads that are 0 here are left as they are too. None: all heads are computed.

    Returns:
        out [B, H, S, D] in q's dtype; with return_lse also lse fp32 [B, H, S], natural log, -inf for rows that q_order
        does not name. A row with nothing to attend to gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, a last dim is strided, sm_scale is not positive.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: on a GPU, head dim above 128 or a gradient would be needed.

    Source: the tail is arXiv 2603.08982 (SVG-EAR)'s compensation, here with groups of one size.
    """
    sm_scale = float(q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    check(q, granules, lists, q_order, sm_scale, out)
    if only is not None and (only.shape != q.shape[:2] or only.dtype != torch.int32):
        raise ValueError(
            f"only must be int32 [B, H] = {list(q.shape[:2])}, got {only.dtype} {tuple(only.shape)}: one flag a head"
        )
    if not target.use_triton(q):
        return granule_attention_reference(
            q, granules, lists, q_order=q_order, sm_scale=sm_scale, tail=tail, return_lse=return_lse, out=out, only=only
        )
    _check_for_gpu(q, granules)
    B, H, S, D = q.shape
    everything = q_order is None or q_order.shape[2] == S
    if out is None:
        out = torch.empty_like(q) if everything and only is None else torch.zeros_like(q)
    lse = None
    if return_lse:
        lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device)
        if not everything or only is not None:
            lse.fill_(-torch.inf)
    if lists.counts.numel():
        with target.on_device(q):
            only = None if only is None else only.contiguous()
            arguments = (q, granules, lists, out, lse, q_order, base2(sm_scale), tail, only)
            if hopper.supports(q, granules, lists):
                hopper.launch(*arguments, *HOPPER[64 if D <= 64 else 128])
            else:
                triton.launch(*arguments)
    return out if lse is None else (out, lse)


def check(
    q: Tensor, granules: Granules, lists: GranuleLists, q_order: Tensor | None, sm_scale: float, out: Tensor | None
) -> None:
    """Raise ValueError or TypeError where the arguments of an attention over granules do not fit together."""
    if q.dim() != 4 or q.stride(-1) != 1:
        raise ValueError(
            f"q must be [B, H, S, D] with a contiguous last dim, got {tuple(q.shape)} with strides {q.stride()}: "
            "call .contiguous()"
        )
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be positive, got {sm_scale}: scale q instead")
    _check_granules(q, granules)
    if q_order is not None and (q_order.dim() != 3 or q_order.shape[:2] != q.shape[:2]):
        raise ValueError(
            f"q_order must be [B, H, V] with q's {tuple(q.shape[:2])}, got {tuple(q_order.shape)}: expand it"
        )
    if q_order is not None and q_order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"q_order must be int32 or int64, got {q_order.dtype}: convert it")
    _check_lists(q, granules, lists, q.shape[2] if q_order is None else q_order.shape[2])
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.stride(-1) != 1):
        raise ValueError(
            f"out must be {q.dtype} {tuple(q.shape)} with a contiguous last dim, "
            f"got {out.dtype} {tuple(out.shape)} with strides {out.stride()}: make it with torch.empty_like(q)"
        )


def _check_granules(q: Tensor, granules: Granules) -> None:
    B, H, _, D = q.shape
    if granules.size not in SIZES:
        raise ValueError(f"granules.size must be one of {SIZES}, got {granules.size}: cut the keys again")
    if granules.k is None or granules.v is None:
        raise ValueError("granules must hold k and v, got statistics only: cut the keys and values themselves")
    C, T = granules.tokens.shape[-1], granules.k_mean.shape[2]
    slots, means = (B, H, C * granules.size, D), (B, H, T, D)
    if granules.tokens.shape != (B, C) or T > C:
        raise ValueError(
            f"granules.tokens must be [B, C] = [{B}, C] with C >= T = {T}, got {tuple(granules.tokens.shape)}: cut the keys again"
        )
    for name, shape in (("k", slots), ("v", slots), ("k_mean", means), ("v_mean", means)):
        x = getattr(granules, name)
        if x.shape != shape or not x.is_contiguous():
            raise ValueError(
                f"granules.{name} must be contiguous {shape}, got {tuple(x.shape)} with strides {x.stride()}: "
                "cut keys and values of q's batch and heads"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"granules.{name} must have q's dtype {q.dtype}, got {x.dtype}: convert q or the keys")
    if granules.tokens.dtype != torch.int32:
        raise TypeError(f"granules.tokens must be int32, got {granules.tokens.dtype}: convert it")


def _check_lists(q: Tensor, granules: Granules, lists: GranuleLists, V: int) -> None:
    if lists.rows not in ROWS:
        raise ValueError(f"lists.rows must be one of {ROWS}, got {lists.rows}: select again")
    T = granules.k_mean.shape[2]
    shape = (*q.shape[:2], -(-V // lists.rows))
    named = {"starts": (shape, torch.int64), "whole": (shape, torch.int32), "counts": (shape, torch.int32)}
    named["chosen"] = ((*shape, -(-T // 32)), torch.int32)
    named["entries"] = ((lists.entries.numel(),), torch.int32)
    named["schedule"] = ((lists.counts.numel(),), torch.int32)
    for name, (wanted, dtype) in named.items():
        x = getattr(lists, name)
        if x.shape != wanted or not x.is_contiguous():
            raise ValueError(
                f"lists.{name} must be contiguous {wanted} for {V} query rows in groups of {lists.rows} and {T} granules, "
                f"got {tuple(x.shape)}: select for these queries and keys"
            )
        if x.dtype != dtype:
            raise TypeError(f"lists.{name} must be {dtype}, got {x.dtype}: convert it")


def _check_for_gpu(q: Tensor, granules: Granules) -> None:
    if q.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}: use dense attention for this model"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f"q, k and v must be fp16, bf16 or fp32, got {q.dtype}: convert them")
    target.refuse_gradients("granule_attention", *(x for x in (q, granules.k, granules.v) if x is not None))
