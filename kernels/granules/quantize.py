"""Quantisation of keys and values into granules: INT8 keys, FP8 values, gathered and averaged in one pass.

    k ~ k_scale * values + k_mean        values = round((k - k_mean) / k_scale)
    v ~ v_scale * values + v_mean        values = e4m3((v - v_mean) / v_scale)

The means and v_scale are vectors over the channels of a head, k_scale is one number a head: it goes into the scales of the
queries, and no score is rescaled. Finer scales of K buy little where P and V are FP8. Errors of the output on recorded calls of
tiny-wan (2 000 tokens, layers 0 to 6), from INT8 alone: .0030 a head, .0027 a granule of 16, .0024 a key, .0048 a channel
(folded into Q); FP8 adds .005 to .012.

The statistics of K and V are one read of both; the pass itself reads the rows in sorted order and leaves, beside the quantised
values, what selection wants to know about every granule. The granules' means are quantised like other keys.

Source: SageAttention2 (arXiv 2411.10958, sections 3.1 and 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import target
from ..common.target import tl, triton
from ..quantize.channels import (
    INTERLEAVED,
    Statistics,
    channel_scales,
    scales_of_channels,
    statistics,
    statistics_reference,
)
from ..quantize.precision import PRECISIONS, SPARSE_PRECISIONS, find_precision, pv_dtype
from ..quantize.tokens import check, padded_head_dim, round_to_int8
from .quantized_hopper import takes
from .reference import cut_granules_reference
from .values import SIZES, Granules

INT8_MAX = 127.0
STAGE = 128  # keys: the means are padded to a multiple of it


@dataclass(frozen=True)
class QuantizedGranules:
    """Keys and values of one call in sorted order, quantised; slots without a token hold zeros.

    Args:
        k: int8 [B, H, C * size, Dp], D padded with zeros to 64 or 128.
        k_scale: fp32 [B, H].
        k_mean: fp32 [B, H, D], what was taken off the keys.
        v: float8_e4m3fn [B, H, C * size / 16, Dp, 16], blocks of 16 keys; or 16 bits [B, H, C * size, D].
        v_scale, v_mean: fp32 [B, H, Dp]; None where v has 16 bits.
        tail_k, tail_v: the means of the video's granules as k and v, padded with zeros to a multiple of 128.
        statistics: the granules' tokens and statistics, without keys and values.
        acc16: whether sums of v's products stay in fp16's range, and are to be taken in it.
        interleaved: whether the keys of a block of v lie as Hopper's kernel wants them (`quantize_values.INTERLEAVED`).
    """

    k: Tensor
    k_scale: Tensor
    k_mean: Tensor
    v: Tensor
    v_scale: Tensor | None
    v_mean: Tensor | None
    tail_k: Tensor
    tail_v: Tensor
    statistics: Granules
    acc16: bool
    interleaved: bool

    @property
    def tokens(self) -> Tensor:
        """int32 [B, C], tokens of each granule."""
        return self.statistics.tokens

    @property
    def size(self) -> int:
        """Keys a granule."""
        return self.statistics.size

    @property
    def means(self) -> int:
        """T, the video's granules."""
        return self.statistics.k_mean.shape[2]

    @property
    def fp8(self) -> bool:
        """Whether values are FP8."""
        return self.v.dtype == torch.float8_e4m3fn


def quantize_granules(
    k: Tensor,
    v: Tensor,
    k_order: Tensor,
    *,
    size: int,
    text: Tensor | None = None,
    prompt_tokens: Tensor | None = None,
    precision: str = "int8-fp8",
    interleave: bool | None = None,
) -> QuantizedGranules:
    """Gather keys and values in sorted order, quantise them, and take every granule's statistics.

    Args:
        k, v: float [B, H, S, D], last dim contiguous.
        k_order: int [B, H, V], sorted -> original index of the video's keys.
        size: keys a granule, one of SIZES.
        text: int [B, L], original index of text tokens, the prompt's first; None: there is no text.
        prompt_tokens: int [B], how many of them belong to the prompt; None: all.
        precision: "int8-fp8"; "int8-fp8-acc16", for products summed in fp16; "int8-fp16", for values in 16 bits.
        interleave: whether v is made for Hopper's kernel; None: where that would run.

    Returns:
        The quantised granules.

    Raises:
        ValueError: shapes disagree, an unknown size or precision, or a strided last dim.
        TypeError: a dtype that is not supported.
        NotImplementedError: head dim above 128, or a GPU without FP8.

    Source: arXiv 2411.10958, section 3 (INT8 keys without their mean, FP8 values).
    """
    check("k", k)
    check("v", v)
    if k.shape != v.shape or k_order.dim() != 3 or k_order.shape[:2] != k.shape[:2]:
        raise ValueError(
            "k and v must be [B, H, S, D] and k_order [B, H, V], "
            f"got {tuple(k.shape)}, {tuple(v.shape)}, {tuple(k_order.shape)}: expand k_order"
        )
    if size not in SIZES:
        raise ValueError(f"size must be one of {SIZES}, got {size}")
    kind = find_precision(precision, SPARSE_PRECISIONS)
    if kind.fp8:
        target.require_fp8(k.device)
    if interleave is None:
        interleave = takes(k, kind, size)
    op = _quantize if target.use_triton(k) else quantize_granules_reference
    return op(
        k, v, k_order, size=size, text=text, prompt_tokens=prompt_tokens, precision=precision,
        interleave=interleave,
    )  # fmt: skip


def quantize_granules_reference(
    k: Tensor,
    v: Tensor,
    k_order: Tensor,
    *,
    size: int,
    text: Tensor | None = None,
    prompt_tokens: Tensor | None = None,
    precision: str = "int8-fp8",
    interleave: bool | None = None,
) -> QuantizedGranules:
    """Specification of `quantize_granules` in plain torch; same arguments and result."""
    granules = cut_granules_reference(k, v, k_order, size, text, prompt_tokens)
    stats = statistics_reference(k, v)
    kind = PRECISIONS[precision]
    k_scale = channel_scales(stats.k_mean, stats.k_low, stats.k_high, INT8_MAX)[0][..., : k.shape[3]].amax(-1)
    v_scale, v_mean = channel_scales(stats.v_mean, stats.v_low, stats.v_high, kind.v_range)
    T = granules.k_mean.shape[2]
    inside = torch.arange(size, device=k.device) < granules.tokens[..., None]
    inside = inside.flatten(1)[:, None, :, None]  # [B, 1, C * size, 1]

    def as_keys(x, inside):
        x = F.pad((x.float() - stats.k_mean[:, :, None]), (0, v_scale.shape[2] - x.shape[3]))
        return torch.where(inside, (x / k_scale[:, :, None, None]).round().nan_to_num(0).clamp(-127, 127), 0).to(
            torch.int8
        )

    def as_values(x, inside):
        if not kind.fp8:
            return x.to(pv_dtype(x))
        x = F.pad(x.float(), (0, v_scale.shape[2] - x.shape[3])) - v_mean[:, :, None]
        x = torch.where(inside, (x / v_scale[:, :, None]).clamp(-kind.v_range, kind.v_range), 0)
        x = F.pad(x, (0, 0, 0, -x.shape[2] % 16)).unflatten(2, (-1, 16)).transpose(3, 4)
        return (x[..., list(INTERLEAVED)] if interleave else x).contiguous().to(torch.float8_e4m3fn)

    means = (F.pad(x, (0, 0, 0, -T % STAGE)) for x in (granules.k_mean, granules.v_mean))
    real = torch.arange(-(-T // STAGE) * STAGE, device=k.device)[:, None] < T
    tail_k, tail_v = (to(x, real) for to, x in zip((as_keys, as_values), means, strict=True))
    return _result(
        k=as_keys(granules.k, inside), k_scale=k_scale, k_mean=stats.k_mean, v=as_values(granules.v, inside),
        v_scale=v_scale, v_mean=v_mean, tail_k=tail_k, tail_v=tail_v, statistics=granules, acc16=kind.acc16, interleave=interleave,
    )  # fmt: skip


def _result(*, statistics, acc16, interleave, v, v_scale, v_mean, **fields) -> QuantizedGranules:
    fp8 = v.dtype == torch.float8_e4m3fn
    bare = Granules(None, None, *(getattr(statistics, name) for name in _STATISTICS), statistics.size)
    return QuantizedGranules(
        v=v, v_scale=v_scale if fp8 else None, v_mean=v_mean if fp8 else None, statistics=bare,
        acc16=acc16, interleaved=bool(interleave), **fields,
    )  # fmt: skip


_STATISTICS = ("tokens", "k_mean", "v_mean", "spread", "weight")


def granule_tokens(V: int, size: int, L: int, prompt_tokens: Tensor | None, B: int, device) -> Tensor:
    """Tokens of each granule: the video's, then the text's.

    Args:
        V: video tokens.
        size: keys a granule.
        L: text tokens, padding included.
        prompt_tokens: int [B], how many of them belong to the prompt; None: all.
        B: samples.
        device: where the result lives.

    Returns:
        int32 [B, C].
    """
    video = (V - torch.arange(0, V, size, device=device)).clamp_max(size).expand(B, -1)
    prompt = torch.full((B,), L, device=device) if prompt_tokens is None else prompt_tokens
    words = (prompt[:, None] - torch.arange(0, L, size, device=device)).clamp(0, size)
    return torch.cat([video, words], 1).to(torch.int32)


# Slots of a program, a multiple of the largest granule, and its warps. Not measured: chosen by ahead-of-time compile (no spills).
BLOCK, WARPS = 64, 8


def _quantize(k, v, k_order, *, size, text, prompt_tokens, precision, interleave):
    B, H, _, D = k.shape
    V, L, block_d = k_order.shape[2], 0 if text is None else text.shape[1], padded_head_dim(D)
    tokens = granule_tokens(V, size, L, prompt_tokens, B, k.device)
    T, C = triton.cdiv(V, size), tokens.shape[1]
    stats = statistics(k, v)
    v_scale, v_mean = torch.empty(2, B, H, block_d, dtype=torch.float32, device=k.device)
    k_scale = torch.empty(B, H, dtype=torch.float32, device=k.device)
    options = {"kind": PRECISIONS[precision], "interleave": interleave}
    found = Granules(
        None, None, tokens, *torch.empty(2, B, H, T, D, dtype=k.dtype, device=k.device),
        *torch.empty(2, B, H, T, dtype=torch.float32, device=k.device), size,
    )  # fmt: skip
    keys, values = _pass(k, v, stats, (k_scale, v_scale, v_mean), k_order, text, tokens, C * size, found, **options)
    padded = triton.cdiv(T, STAGE) * STAGE
    tail_k, tail_v = _pass(
        found.k_mean, found.v_mean, stats, (k_scale, v_scale, v_mean), None, None, None, padded, None, **options
    )
    return _result(
        k=keys, k_scale=k_scale, k_mean=stats.k_mean, v=values, v_scale=v_scale, v_mean=v_mean, tail_k=tail_k,
        tail_v=tail_v, statistics=found, acc16=options["kind"].acc16, interleave=interleave,
    )  # fmt: skip


def _pass(k, v, stats: Statistics, channels, order, text, tokens, slots, found, *, kind, interleave):
    """Quantised keys and values of `slots` slots; writes channels' scales, and granules' statistics into `found`."""
    B, H, S, D = k.shape
    k_scale, v_scale, v_mean = channels
    block_d = v_scale.shape[2]
    keys = torch.empty(B, H, slots, block_d, dtype=torch.int8, device=k.device)
    if kind.fp8:
        values = torch.empty(B, H, triton.cdiv(slots, 16), block_d, 16, dtype=torch.float8_e4m3fn, device=v.device)
    else:
        values = torch.empty(B, H, slots, D, dtype=pv_dtype(v), device=v.device)
    V = S if order is None else order.shape[2]
    size, T, C = (1, V, slots) if found is None else (found.size, found.k_mean.shape[2], tokens.shape[1])
    parts = (None,) * 4 if found is None else (found.k_mean, found.v_mean, found.spread, found.weight)
    with target.on_device(k):
        _quantize_granules_kernel[(triton.cdiv(slots, BLOCK), B * H)](
            k, v, order, text, tokens, stats.k_mean, stats.k_low, stats.k_high, stats.v_mean, stats.v_low, stats.v_high,
            keys, values, k_scale, v_scale, v_mean, *parts, H, V, T, C, slots,
            *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if order is None else order.stride()),
            *((0, 0) if text is None else text.stride()),
            D=D, BLOCK_D=block_d, BLOCK=BLOCK, SIZE=size, FP8=kind.fp8, LIMIT=kind.v_range, INTERLEAVE=interleave,
            num_warps=WARPS,
        )  # fmt: skip
    return keys, values


@triton.jit
def _source(
    slot, order, text, tokens, V, T, C, SIZE: tl.constexpr, stride_s, stride_l,
):  # fmt: skip
    """Original index of what a slot holds, and whether it holds a token."""
    inside = slot < V
    index = slot
    if order is not None:
        index = tl.load(order + slot * stride_s, mask=inside, other=0).to(tl.int64)
    if text is not None:
        granule = slot // SIZE
        word = (granule >= T) & (granule < C)
        word = word & (slot % SIZE < tl.load(tokens + granule, mask=word, other=0))
        index = tl.where(word, tl.load(text + (slot - T * SIZE) * stride_l, mask=word, other=0).to(tl.int64), index)
        inside = inside | word
    return index, inside


@triton.jit
def _moments(rows, inside, count, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr):
    """Mean and variance [N, D] over the rows of every SIZE that are inside, `count` [N] of them; the others are zero."""
    number = tl.maximum(count, 1).to(tl.float32)[:, None]
    parts = tl.reshape(rows, [BLOCK // SIZE, SIZE, BLOCK_D])
    mean = tl.sum(parts, 1) / number
    real = tl.reshape(inside.to(tl.int32), [BLOCK // SIZE, SIZE])
    away = tl.where((real > 0)[:, :, None], parts - mean[:, None, :], 0.0)
    return mean, tl.sum(away * away, 1) / number


@triton.jit(do_not_specialize=["V", "T", "C", "slots"])
def _quantize_granules_kernel(
    k, v, order, text, tokens, k_centre, k_low, k_high, v_centre, v_low, v_high, keys, values, k_scale, v_scale, v_mean,
    means_k, means_v, spread, weight, H, V, T, C, slots,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_tb, stride_tl,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, FP8: tl.constexpr,
    LIMIT: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    real = offs_d < D
    if order is not None:
        order += b * stride_ob + h * stride_oh
    if text is not None:
        text += b * stride_tb
    if tokens is not None:
        tokens += b * C
    k_step, k_middle = scales_of_channels(k_centre + bh * D, k_low + bh * D, k_high + bh * D, D, BLOCK_D, 127.0, True)
    k_step = tl.max(tl.where(real, tl.where(k_step < float("inf"), k_step, float("inf")), 0.0), 0)  # NaN counts
    k_step = tl.where(k_step < float("inf"), k_step, float("nan"))
    v_step, v_middle = scales_of_channels(v_centre + bh * D, v_low + bh * D, v_high + bh * D, D, BLOCK_D, LIMIT, True)
    if tl.program_id(0) == 0:
        tl.store(k_scale + bh, k_step)
        tl.store(v_scale + bh * BLOCK_D + offs_d, v_step)
        tl.store(v_mean + bh * BLOCK_D + offs_d, v_middle)

    index, inside = _source(slot, order, text, tokens, V, T, C, SIZE, stride_os, stride_tl)
    mask = inside[:, None] & real[None, :]
    k += b * stride_kb + h * stride_kh
    rows = tl.load(k + index[:, None] * stride_ks + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    away = tl.where(mask, rows - k_middle[None, :], 0.0)
    quantized = round_to_int8(tl.div_rn(away, tl.zeros_like(away) + k_step), 1.0)
    written = (slot < slots)[:, None]
    tl.store(keys + (bh * slots + slot)[:, None] * BLOCK_D + offs_d[None, :], quantized, mask=written)
    if means_k is not None:
        NUMBER: tl.constexpr = BLOCK // SIZE
        granule = tl.program_id(0).to(tl.int64) * NUMBER + tl.arange(0, NUMBER)
        count = tl.load(tokens + granule, mask=granule < T, other=0)
        goal_of_means = (bh * T + granule)[:, None] * D + offs_d[None, :]
        kept = (granule < T)[:, None] & real[None, :]
        mean, variance = _moments(rows, inside, count, BLOCK, BLOCK_D, SIZE)
        tl.store(means_k + goal_of_means, mean.to(means_k.dtype.element_ty), mask=kept)
        tl.store(spread + bh * T + granule, tl.sum(variance, 1) / D, mask=granule < T)

    place = slot
    if INTERLEAVE:
        place = slot // 16 * 16 + slot % 4 // 2 * 8 + slot % 16 // 4 * 2 + slot % 2  # quantize_values.INTERLEAVED
        index, inside = _source(place, order, text, tokens, V, T, C, SIZE, stride_os, stride_tl)
        mask = inside[:, None] & real[None, :]
    v += b * stride_vb + h * stride_vh
    rows = tl.load(v + index[:, None] * stride_vs + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if FP8:
        size = tl.broadcast_to(v_step[None, :], [BLOCK, BLOCK_D])
        # Channels of padding are zero by their load, mean and scale: ptxas 12.8 packs a constant zero with a stale register.
        small = tl.clamp(tl.div_rn(rows - v_middle[None, :], size), -LIMIT, LIMIT)
        small = tl.where(inside[:, None], small, 0.0).to(tl.float8e4nv)
        blocks = (slots + 15) // 16
        goal = (bh * blocks + slot // 16) * (16 * BLOCK_D) + slot % 16
        tl.store(values + offs_d[:, None] * 16 + goal[None, :], tl.trans(small), mask=(slot // 16 < blocks)[None, :])
    else:
        goal = (bh * slots + slot)[:, None] * D + offs_d[None, :]
        tl.store(values + goal, rows.to(values.dtype.element_ty), mask=written & real[None, :])
    if means_k is not None:
        mean, variance = _moments(rows, inside, count, BLOCK, BLOCK_D, SIZE)
        tl.store(means_v + goal_of_means, mean.to(means_v.dtype.element_ty), mask=kept)
        tl.store(weight + bh * T + granule, tl.sum(variance + mean * mean, 1), mask=granule < T)
