"""Quantisation of keys and values into granules: INT8 keys, FP8 values, gathered and averaged in one pass.

    k ~ k_scale * values + k_mean        values = round((k - k_mean) / k_scale)
    v ~ v_scale * values + v_mean        values = e4m3((v - v_mean) / v_scale)

The means and v_scale are vectors over the channels of a head, k_scale is one number a head: it goes into the scales of the
queries, and no score is rescaled. Finer scales of K buy little where P and V are FP8. Errors of the output on recorded calls of
tiny-wan (2,000 tokens, layers 0 to 6), from INT8 alone: 0.0030 a head, 0.0027 a granule of 16, 0.0024 a key, 0.0048 a channel
(folded into Q); FP8 adds 0.005 to 0.012.

The statistics of K and V are one read of both; the pass itself reads the rows in sorted order, and quantises every granule's
mean beside its tokens.

Source: SageAttention2 (arXiv 2411.10958, sections 3.1 and 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import target
from ..common.launch import LaunchTable
from ..common.numbers import INT8_MAX, INT_AS_FLOAT
from ..common.target import tl, triton
from ..quantize.channels import (
    INTERLEAVED,
    channel_scales,
    scales_of_channels,
    statistics,
    statistics_reference,
)
from ..quantize.precision import PRECISIONS, SPARSE_PRECISIONS, find_precision, pv_dtype
from ..quantize.tokens import check, padded_head_dim
from .quantized_hopper import supports
from .reference import cut_granules_reference
from .values import SIZES

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
        tokens: int32 [B, C], tokens of each granule.
        means: T, the video's granules.
        size: keys a granule.
        acc16: whether sums of v's products stay in fp16's range, and are to be taken in it.
        interleaved: whether the keys of a block of v lie as Hopper's kernel wants them (`channels.INTERLEAVED`).
    """

    k: Tensor
    k_scale: Tensor
    k_mean: Tensor
    v: Tensor
    v_scale: Tensor | None
    v_mean: Tensor | None
    tail_k: Tensor
    tail_v: Tensor
    tokens: Tensor
    means: int
    size: int
    acc16: bool
    interleaved: bool

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
    rows: int = 128,
    interleave: bool | None = None,
) -> QuantizedGranules:
    """Gather keys and values in sorted order, and quantise them and every granule's mean.

    Args:
        k, v: float [B, H, S, D], last dim contiguous.
        k_order: int [B, H, V], sorted -> original index of the video's keys.
        size: keys a granule, one of SIZES.
        text: int [B, L], original index of text tokens, the prompt's first; None: there is no text.
        prompt_tokens: int [B], how many of them belong to the prompt; None: all.
        precision: "int8-fp8"; "int8-fp8-acc16", for products summed in fp16; "int8-fp16", for values in 16 bits.
        rows: query rows that will share a list, which decides what kernel runs.
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
        interleave = supports(k, kind, size, rows)
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
    k_scale = channel_scales(stats.k_mean, stats.k_low, stats.k_high, INT8_MAX.value)[0][..., : k.shape[3]].amax(-1)
    v_scale, v_mean = channel_scales(stats.v_mean, stats.v_low, stats.v_high, kind.v_range)
    T, block_d = granules.k_mean.shape[2], v_scale.shape[2]
    inside = torch.arange(size, device=k.device) < granules.tokens[..., None]
    inside = inside.flatten(1)[:, None, :, None]  # [B, 1, C * size, 1]

    def as_keys(x, inside):
        x = F.pad(x.float() - stats.k_mean[:, :, None], (0, block_d - x.shape[3]))
        x = torch.where(inside, x, 0) * (1 / k_scale)[..., None, None]
        return x.round().nan_to_num(0).clamp(-127, 127).to(torch.int8)

    def as_values(x, inside):
        if not kind.fp8:
            return x.to(pv_dtype(v))
        x = F.pad(x.float(), (0, block_d - x.shape[3])) - v_mean[:, :, None]
        x = (torch.where(inside, x, 0) * (1 / v_scale)[:, :, None]).clamp(-kind.v_range, kind.v_range)
        x = F.pad(x, (0, 0, 0, -x.shape[2] % 16)).unflatten(2, (-1, 16)).transpose(3, 4)
        return (x[..., list(INTERLEAVED)] if interleave else x).contiguous().to(torch.float8_e4m3fn)

    real = torch.arange(-(-T // STAGE) * STAGE, device=k.device)[:, None] < T
    tail_k, tail_v = (
        to(F.pad(_means(x, granules.tokens, T, size), (0, 0, 0, -T % STAGE)), real)
        for to, x in ((as_keys, granules.k), (as_values, granules.v))
    )
    return QuantizedGranules(
        k=as_keys(granules.k, inside), k_scale=k_scale, k_mean=stats.k_mean, v=as_values(granules.v, inside),
        v_scale=v_scale if kind.fp8 else None, v_mean=v_mean if kind.fp8 else None, tail_k=tail_k, tail_v=tail_v,
        tokens=granules.tokens, means=T, size=size, acc16=kind.acc16, interleaved=bool(interleave),
    )  # fmt: skip


def _means(x: Tensor, tokens: Tensor, T: int, size: int) -> Tensor:
    """fp32 means [B, H, T, D] of the video's granules."""
    return x[:, :, : T * size].float().unflatten(2, (T, size)).sum(3) / tokens[:, None, :T, None]


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


# arch -> bytes an element -> (slots of a program, a multiple of the largest granule; warps). Not measured: chosen by
# ahead-of-time compile (no spills, warps a multiprocessor).
ANY = {2: (64, 4), 4: (64, 8)}
LAUNCH = LaunchTable({80: ANY, 89: ANY, 90: ANY, 100: ANY, 120: ANY})


def _quantize(k, v, k_order, *, size, text, prompt_tokens, precision, interleave, launch=None):
    B, H, _, D = k.shape
    V, L = k_order.shape[2], 0 if text is None else text.shape[1]
    block_d, kind = padded_head_dim(D), PRECISIONS[precision]
    tokens = granule_tokens(V, size, L, prompt_tokens, B, k.device)
    T, C = triton.cdiv(V, size), tokens.shape[1]
    slots, means = C * size, triton.cdiv(T, STAGE) * STAGE
    stats = statistics(k, v)
    v_scale, v_mean = torch.empty(2, B, H, block_d, dtype=torch.float32, device=k.device)
    k_scale = torch.empty(B, H, dtype=torch.float32, device=k.device)
    keys = torch.empty(B, H, slots, block_d, dtype=torch.int8, device=k.device)
    tail_k = torch.zeros(B, H, means, block_d, dtype=torch.int8, device=k.device)
    if kind.fp8:
        blocks = {"dtype": torch.float8_e4m3fn, "device": v.device}
        values = torch.empty(B, H, triton.cdiv(slots, 16), block_d, 16, **blocks)
        tail_v = torch.zeros(B, H, means // 16, block_d, 16, **blocks)
    else:
        values = torch.empty(B, H, slots, D, dtype=pv_dtype(v), device=v.device)
        tail_v = torch.zeros(B, H, means, D, dtype=pv_dtype(v), device=v.device)
    block, num_warps = launch or LAUNCH.row(k.device, k.element_size())
    with target.on_device(k):
        _quantize_granules_kernel[(triton.cdiv(slots, block), B * H, 2)](  # keys, then values
            k, v, k_order, text, tokens, stats.k_mean, stats.k_low, stats.k_high, stats.v_mean, stats.v_low, stats.v_high,
            keys, values, tail_k, tail_v, k_scale, v_scale, v_mean, H, V, T, C, slots, means,
            *k.stride()[:3], *v.stride()[:3], *k_order.stride(), *((0, 0) if text is None else text.stride()),
            D=D, BLOCK_D=block_d, BLOCK=block, SIZE=size, FP8=kind.fp8, LIMIT=kind.v_range, INTERLEAVE=interleave,
            num_warps=num_warps,
        )  # fmt: skip
    return QuantizedGranules(
        k=keys, k_scale=k_scale, k_mean=stats.k_mean, v=values, v_scale=v_scale if kind.fp8 else None,
        v_mean=v_mean if kind.fp8 else None, tail_k=tail_k, tail_v=tail_v, tokens=tokens, means=T, size=size,
        acc16=kind.acc16, interleaved=bool(interleave),
    )  # fmt: skip


@triton.jit
def _source(slot, order, text, tokens, V, T, C, SIZE: tl.constexpr, stride_s, stride_l):
    """Original index of what a slot holds, and whether it holds a token."""
    inside = slot < V
    index = tl.load(order + slot * stride_s, mask=inside, other=0).to(tl.int64)
    if text is not None:
        granule = slot // SIZE
        word = (granule >= T) & (granule < C)
        word = word & (slot % SIZE < tl.load(tokens + granule, mask=word, other=0))
        index = tl.where(word, tl.load(text + (slot - T * SIZE) * stride_l, mask=word, other=0).to(tl.int64), index)
        inside = inside | word
    return index, inside


@triton.jit
def _interleaved(place):
    """Which key of every 16 lies at a place, as `channels.INTERLEAVED` has it."""
    return place // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2


@triton.jit
def _sums_of(rows, SIZE: tl.constexpr):
    """Sums [16, D] of every SIZE rows, by tensor cores, so that no registers change threads; of 16-bit rows exact products."""
    granule = tl.arange(0, rows.shape[0]) // SIZE
    pool = (granule[None, :] == tl.arange(0, 16)[:, None]).to(rows.dtype)
    return tl.dot(pool, rows, input_precision="tf32x3")


@triton.jit
def _nearest_bytes(x):
    """x to INT8: what is added leaves the integer in the low bits. NaN gives anything; its scale is NaN."""
    return (x + INT_AS_FLOAT).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _granules_of(tokens, T, NUMBER: tl.constexpr):
    """A program's granules of the video [16], which there are, and one over their tokens."""
    offs_n = tl.arange(0, 16)
    granule = tl.program_id(0) * NUMBER + offs_n
    averaged = (offs_n < NUMBER) & (granule < T)
    return granule, averaged, 1.0 / tl.load(tokens + granule, mask=averaged, other=1).to(tl.float32)[:, None]


@triton.jit
def _keys_of(
    k, order, text, tokens, centre, low, high, keys, tail, scale, V, T, C, slots, stride_s, stride_os, stride_l,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Some keys and their granules' means in INT8, all with one scale."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    real = offs_d < D
    index, inside = _source(slot, order, text, tokens, V, T, C, SIZE, stride_os, stride_l)
    rows = tl.load(k + index[:, None] * stride_s + offs_d[None, :], mask=inside[:, None] & real[None, :], other=0.0)
    step, middle = scales_of_channels(centre, low, high, D, BLOCK_D, INT8_MAX, True)
    step = tl.max(tl.where(real, tl.where(step < float("inf"), step, float("inf")), 0.0), 0)  # NaN counts
    step = tl.where(step < float("inf"), step, float("nan"))
    if tl.program_id(0) == 0:
        tl.store(scale, step)
    inverse = tl.div_rn(1.0 + tl.zeros_like(step), step)
    away = tl.where(inside[:, None], rows.to(tl.float32) - middle[None, :], 0.0)
    goal = slot.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(keys + goal, _nearest_bytes(away * inverse), mask=(slot < slots)[:, None])
    granule, averaged, share = _granules_of(tokens, T, BLOCK // SIZE)
    mean = _sums_of(rows, SIZE) * share - middle[None, :]
    goal = granule.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(tail + goal, _nearest_bytes(mean * inverse), mask=averaged[:, None])


@triton.jit
def _values_of(
    v, order, text, tokens, centre, low, high, values, tail, scale, middle_of, V, T, C, slots, stride_s, stride_os, stride_l,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, FP8: tl.constexpr,
    LIMIT: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    """Some values and their granules' means, in FP8 with a scale a channel, or in 16 bits."""
    first = tl.program_id(0) * BLOCK
    slot = first + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    real = offs_d < D
    lies = slot
    if INTERLEAVE:
        lies = _interleaved(slot)
    index, inside = _source(lies, order, text, tokens, V, T, C, SIZE, stride_os, stride_l)
    rows = tl.load(v + index[:, None] * stride_s + offs_d[None, :], mask=inside[:, None] & real[None, :], other=0.0)
    step, middle = scales_of_channels(centre, low, high, D, BLOCK_D, LIMIT, True)
    if tl.program_id(0) == 0:
        tl.store(scale + offs_d, step)
        tl.store(middle_of + offs_d, middle)
    granule, averaged, share = _granules_of(tokens, T, BLOCK // SIZE)
    if FP8:
        # Channels of padding are zero by their load, mean and scale: ptxas 12.8 packs a constant zero with a stale register.
        inverse = tl.div_rn(1.0 + tl.zeros_like(step), step)[None, :]
        away = tl.where(inside[:, None], rows.to(tl.float32) - middle[None, :], 0.0)
        small = tl.clamp(away * inverse, -LIMIT, LIMIT).to(tl.float8e4nv)
        small = tl.trans(
            tl.reshape(small, [BLOCK // 16, 16, BLOCK_D]), (0, 2, 1)
        )  # blocks [D, 16], one after the other
        block = first // 16 + tl.arange(0, BLOCK // 16)
        goal = block.to(tl.int64)[:, None, None] * (16 * BLOCK_D) + offs_d[None, :, None] * 16
        goal += tl.arange(0, 16)[None, None, :]
        tl.store(values + goal, small, mask=(block < (slots + 15) // 16)[:, None, None])
        mean = _sums_of(rows, SIZE) * share - middle[None, :]
        small = tl.clamp(mean * inverse, -LIMIT, LIMIT).to(tl.float8e4nv)
        place = granule
        if INTERLEAVE:  # where `_interleaved` looks
            place = granule // 16 * 16 + granule % 8 // 2 * 4 + granule % 16 // 8 * 2 + granule % 2
        goal = (place // 16).to(tl.int64)[:, None] * (16 * BLOCK_D) + (place % 16)[:, None] + offs_d[None, :] * 16
        tl.store(tail + goal, small, mask=averaged[:, None])
    else:
        goal = slot.to(tl.int64)[:, None] * D + offs_d[None, :]
        small = rows.to(tl.float32).to(values.dtype.element_ty)
        tl.store(values + goal, small, mask=(slot < slots)[:, None] & real[None, :])
        mean = _sums_of(rows, SIZE) * share
        goal = granule.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(tail + goal, mean.to(tail.dtype.element_ty), mask=averaged[:, None] & real[None, :])


@triton.jit(do_not_specialize=["V", "T", "C", "slots", "means"])
def _quantize_granules_kernel(
    k, v, order, text, tokens, k_centre, k_low, k_high, v_centre, v_low, v_high, keys, values, tail_k, tail_v,
    k_scale, v_scale, v_mean, H, V, T, C, slots, means,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_tb, stride_tl,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, FP8: tl.constexpr,
    LIMIT: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    """Keys and values apart: few registers, so that many loads are under way."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    order += b * stride_ob + h * stride_oh
    tokens += b * C
    if text is not None:
        text += b * stride_tb
    channel = bh * D
    if tl.program_id(2) == 0:
        _keys_of(
            k + b * stride_kb + h * stride_kh, order, text, tokens, k_centre + channel, k_low + channel, k_high + channel,
            keys + bh * slots * BLOCK_D, tail_k + bh * means * BLOCK_D, k_scale + bh, V, T, C, slots,
            stride_ks, stride_os, stride_tl, D, BLOCK_D, BLOCK, SIZE,
        )  # fmt: skip
    else:
        row: tl.constexpr = BLOCK_D if FP8 else D
        held = (slots + 15) // 16 * 16 if FP8 else slots
        _values_of(
            v + b * stride_vb + h * stride_vh, order, text, tokens, v_centre + channel, v_low + channel, v_high + channel,
            values + bh * held * row, tail_v + bh * means * row, v_scale + bh * BLOCK_D, v_mean + bh * BLOCK_D,
            V, T, C, slots, stride_vs, stride_os, stride_tl, D, BLOCK_D, BLOCK, SIZE, FP8, LIMIT, INTERLEAVE,
        )  # fmt: skip
