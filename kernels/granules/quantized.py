"""Attention over granules in 8 bits: INT8 Q K^T, and P V in FP8 or 16 bits.

What `granule_attention` computes, from keys and values that `quantize_granules` made. Every query has a scale of its own;
that of a head's keys goes into it, so no score is rescaled. The means of granules that are not listed take part as further
keys of the same softmax, quantised in the scales of the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import target
from ..common.numbers import base2
from ..common.rounded import note_failure_reference, sum_in_fp16
from ..common.smoothing import unsmoothed_lse, unsmoothed_lse_reference
from ..quantize.channels import INTERLEAVED
from ..quantize.tokens import dequantize_tokens, quantize_tokens_reference
from . import quantized_hopper as hopper
from . import quantized_triton as plain
from .quantize import QuantizedGranules
from .values import ROWS, GranuleLists, Granules

PLACES = tuple(INTERLEAVED.index(i) for i in range(16))  # where the i-th key of an interleaved block is


def granule_attention_quantized(
    q: Tensor,
    granules: QuantizedGranules,
    lists: GranuleLists,
    *,
    q_order: Tensor | None = None,
    sm_scale: float | None = None,
    tail: bool = True,
    failed: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row group over the tokens of its listed granules and the means of all others, in 8 bits.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, in original order, last dim contiguous.
        granules: of the keys and values, quantised.
        lists: which granules each row group computes.
        q_order: int32 or int64 [B, H, V], sorted -> original index of the video's queries; None: all S in order.
        sm_scale: softmax scale; default D ** -0.5.
        tail: whether each unlisted granule takes part as `size` keys equal to its mean; else it is left out.
        failed: int32 [B, H], set to 1 for a head whose sums are not finite or left the range of the quantised values.
        return_lse: also return the log-sum-exp.
        out: [B, H, S, D] in q's dtype to write into; rows that q_order does not name are left as they are. Default: zeros.

    Returns:
        out [B, H, S, D] in q's dtype; with return_lse also lse fp32 [B, H, S], natural log, of the scores before
        smoothing, -inf for rows that q_order does not name. A row with nothing to attend to gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, or a last dim is strided.
        NotImplementedError: a gradient would be needed.

    Source: arXiv 2411.10958, section 3; means that stand for what is left out: arXiv 2505.18875, appendix.
    """
    _check(q, granules, lists, q_order, out)
    target.refuse_gradients("granule_attention_quantized", q)
    sm_scale = float(q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be positive, got {sm_scale}: scale q instead")
    op = _launch if target.use_triton(q) else granule_attention_quantized_reference
    return op(
        q, granules, lists, q_order=q_order, sm_scale=sm_scale, tail=tail, failed=failed, return_lse=return_lse, out=out
    )  # fmt: skip


def granule_attention_quantized_reference(
    q: Tensor,
    granules: QuantizedGranules,
    lists: GranuleLists,
    *,
    q_order: Tensor | None = None,
    sm_scale: float | None = None,
    tail: bool = True,
    failed: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Specification of `granule_attention_quantized` in plain torch; same arguments and result.

    Works on the quantised numbers themselves; P is rounded against the largest score of its row.
    """
    B, H, S, D = q.shape
    sm_scale = float(D**-0.5 if sm_scale is None else sm_scale)
    out = torch.zeros_like(q) if out is None else out
    rows = dequantize_tokens(quantize_tokens_reference(q, side="q"), D) * granules.k_scale[..., None, None]
    numbers = quantized_numbers(granules, D)
    order = torch.arange(S, device=q.device).expand(B, H, S) if q_order is None else q_order.long()
    lse = torch.full((B, H, S), -torch.inf, device=q.device)
    attended = q.new_zeros(q.shape, dtype=torch.float32)
    for b in range(B):
        for h in range(H):
            for group, first in enumerate(range(0, order.shape[-1], lists.rows)):
                index = order[b, h, first : first + lists.rows]
                keys, values, bias = _seen(numbers, lists, b, h, group, tail, torch.float32)
                if len(keys):
                    logits = sm_scale * rows[b, h, index] @ keys.T + bias
                    lse[b, h, index] = logits.logsumexp(-1)
                    attended[b, h, index] = _rounded(logits, values, granules)
    if granules.v_scale is not None and granules.v_mean is not None:  # FP8
        attended = attended * granules.v_scale[:, :, None, :D] + granules.v_mean[:, :, None, :D]
    attended = torch.where(lse[..., None] == -torch.inf, 0.0, attended)
    note_failure_reference(failed, attended)
    named = torch.zeros(B, H, S, dtype=torch.bool, device=q.device).scatter_(2, order, True)
    out.copy_(torch.where(named[..., None], attended.to(out.dtype), out))
    return (out, unsmoothed_lse_reference(lse, q, granules.k_mean, sm_scale)) if return_lse else out


def _seen(granules: Granules, lists: GranuleLists, b: int, h: int, group: int, tail: bool, wide: torch.dtype):
    """Keys, values and logit biases that a row group attends to."""
    assert granules.k is not None and granules.v is not None, "statistics alone can't be attended to"
    start = int(lists.starts[b, h, group])
    entries = lists.entries[start : start + int(lists.counts[b, h, group])].long()
    size, device = granules.size, entries.device
    slots = entries[:, None] * size + torch.arange(size, device=device)
    slots = slots[torch.arange(size, device=device) < granules.tokens[b, entries][:, None]]
    keys, values = granules.k[b, h, slots].to(wide), granules.v[b, h, slots].to(wide)
    bias = keys.new_zeros(len(slots))
    if tail:
        T = granules.k_mean.shape[2]
        words = lists.chosen[b, h, group].long()
        left_out = ((words[:, None] >> torch.arange(32, device=device)) & 1).flatten()[:T] == 0
        keys = torch.cat([keys, granules.k_mean[b, h, left_out].to(wide)])
        values = torch.cat([values, granules.v_mean[b, h, left_out].to(wide)])
        bias = torch.cat([bias, bias.new_full((int(left_out.sum()),), math.log(size))])
    return keys, values, bias


def _rounded(logits: Tensor, values: Tensor, granules: QuantizedGranules) -> Tensor:
    """softmax(logits) @ values with P rounded as products take it; weighted means stay in the values' range."""
    largest = 448 if granules.fp8 else 1
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    rounded = (largest * p).to(granules.v.dtype).float()
    limit = values.abs().amax(0)
    sums = sum_in_fp16(rounded[None, None], values[None, None])[0, 0] if granules.acc16 else rounded @ values
    return (sums / (largest * p.sum(-1, keepdim=True))).clamp(-limit, limit)


def quantized_numbers(granules: QuantizedGranules, D: int) -> Granules:
    """What quantised granules hold, as fp32 numbers in sorted order, without scales and means.

    Args:
        granules: quantised.
        D: head dim.
    """
    T, slots = granules.means, granules.k.shape[2]
    keys, tail_keys = granules.k[..., :D].float(), granules.tail_k[:, :, :T, :D].float()
    values, tail_values = (_plain_values(v, granules, D) for v in (granules.v, granules.tail_v))
    nothing = keys.new_empty(0)
    return Granules(
        keys, values[:, :, :slots], granules.tokens, tail_keys, tail_values[:, :, :T],
        spread=nothing, weight=nothing, size=granules.size,
    )  # fmt: skip


def _plain_values(v: Tensor, granules: QuantizedGranules, D: int) -> Tensor:
    if not granules.fp8:
        return v.float()
    v = v.float()
    if granules.interleaved:
        v = v[..., list(PLACES)]
    return v.transpose(3, 4).flatten(2, 3)[..., :D]


def _check(q, granules, lists, q_order, out):
    B, H, S, D = q.shape
    if granules.k.shape[:2] != (B, H) or granules.k_mean.shape[2] != D:
        raise ValueError(
            f"granules must be of q's samples, heads and head dim {(B, H, D)}, got "
            f"{(*granules.k.shape[:2], granules.k_mean.shape[2])}: expand the keys"
        )
    if q.stride(-1) != 1 and D > 1:
        raise ValueError(f"q must be contiguous in its last dim, got strides {q.stride()}: call .contiguous()")
    if q_order is not None and (q_order.dim() != 3 or q_order.shape[:2] != (B, H) or q_order.shape[2] > S):
        raise ValueError(f"q_order must be [B, H, V] with V <= {S}, got {tuple(q_order.shape)}: expand it")
    V = S if q_order is None else q_order.shape[2]
    if lists.rows not in ROWS or lists.counts.shape != (B, H, math.ceil(V / lists.rows)):
        raise ValueError(
            f"lists must be of {(B, H, math.ceil(V / lists.rows))} groups of {lists.rows} rows, rows one of {ROWS}, "
            f"got {tuple(lists.counts.shape)}: select with the same q_order"
        )
    if granules.interleaved and lists.rows < hopper.ROWS:
        raise ValueError(
            f"lists.rows must be at least {hopper.ROWS} for values that are interleaved, got {lists.rows}: quantize for as many rows"
        )
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.stride(-1) != 1):
        raise ValueError(f"out must be like q, {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)} {out.dtype}")


def _launch(q, granules, lists, *, q_order, sm_scale, tail, failed, return_lse, out):
    # Without an order every row is written.
    new = torch.empty_like if q_order is None or q_order.shape[2] == q.shape[2] else torch.zeros_like
    out = new(q) if out is None else out
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device) if return_lse else None
    kernel = hopper if granules.interleaved else plain
    flags = (
        failed
        if failed is None or failed.is_contiguous()
        else torch.zeros_like(failed, memory_format=torch.contiguous_format)
    )
    kernel.launch(q, granules, lists, out, lse, flags, q_order, base2(sm_scale), tail)
    if failed is not None and flags is not None and flags is not failed:
        failed |= flags
    return out if lse is None else (out, unsmoothed_lse(lse, q, granules.k_mean, sm_scale))
