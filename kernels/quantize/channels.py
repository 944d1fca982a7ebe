"""Quantisation of V: FP8 e4m3 per channel, transposed; and the statistics of K and V that quantising both needs.

    v ~ scale * values + mean        values = e4m3(limit (v - mean) / absmax of the channel)

The limit is 448, all of e4m3's range, or less where sums of products must stay in fp16. An all-zero channel has scale 1, one with NaN or infinity has scale NaN, so that the output shows it. Two passes: the
statistics in one read of K and V, then a read and a write, with the rows gathered by a permutation on the way. 64-bit
offsets; inputs may be strided (last dim contiguous).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..common import target
from ..common.launch import LaunchTable
from ..common.numbers import SMALLEST, TINY
from ..common.target import tl, triton
from .tokens import BLOCK, check, gather, padded_head_dim

FP8_MAX = 448.0
INTERLEAVED = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)  # what place i of every 16 tokens holds


@dataclass(frozen=True)
class QuantizedChannels:
    """Quantised V, K-major as 8-bit matrix instructions want it.

    Args:
        values: float8_e4m3fn [B, H, Dp, Sp], D padded to 64 or 128 and S to a multiple of 128, with zeros.
        scale: fp32 [B, H, Dp].
        mean: fp32 [B, H, Dp] to add to the output, or None.
    """

    values: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor | None


@dataclass(frozen=True)
class Statistics:
    """Mean, least and largest value of K and of V over all tokens, fp32 [B, H, D] each."""

    k_mean: torch.Tensor
    v_mean: torch.Tensor
    v_low: torch.Tensor
    v_high: torch.Tensor
    k_low: torch.Tensor
    k_high: torch.Tensor


def statistics(k: torch.Tensor, v: torch.Tensor) -> Statistics:
    """What quantising K and V needs to know about all tokens, in one read of both.

    Args:
        k, v: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.

    Returns:
        The statistics.

    Raises:
        ValueError: shapes disagree, or a last dim is strided.
        TypeError: a dtype that is not supported.
        NotImplementedError: head dim above 128.

    Source: arXiv 2411.10958, section 3 (smoothing of K, channel scales of V).
    """
    check("k", k)
    check("v", v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    return _statistics(k, v) if target.use_triton(k) else statistics_reference(k, v)


def statistics_reference(k: torch.Tensor, v: torch.Tensor) -> Statistics:
    """Specification of `statistics` in plain torch; same arguments and result."""
    k, v = k.float(), v.float()
    return Statistics(k.mean(2), v.mean(2), v.amin(2), v.amax(2), k.amin(2), k.amax(2))


def quantize_channels(
    v: torch.Tensor,
    stats: Statistics,
    *,
    smooth: bool = False,
    limit: float = FP8_MAX,
    permutation: torch.Tensor | None = None,
    interleave: bool = False,
) -> QuantizedChannels:
    """FP8 e4m3 values of V, transposed, with one scale a channel.

    Args:
        v: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        stats: its statistics.
        smooth: take the channel's mean off first; the attention adds it to its output.
        limit: largest quantised value, in (0, 448].
        permutation: int32 or int64 [B, H, S], sorted -> original index; None: identity.
        interleave: reorder every 16 tokens as `INTERLEAVED`, which dense_quantised/hopper.py reads.

    Returns:
        The quantised values, tokens in sorted order.

    Raises:
        ValueError: shapes disagree, or a strided last dim.
        TypeError: a dtype that is not supported.
        NotImplementedError: head dim above 128, or a GPU without FP8.

    Source: arXiv 2411.10958, section 3.3 (FP8 values of V, per channel, and smoothing of V).
    """
    check("v", v, permutation)
    target.require_fp8(v.device)
    op = _quantize_channels if target.use_triton(v) else quantize_channels_reference
    return op(v, stats, smooth=smooth, limit=limit, permutation=permutation, interleave=interleave)


def quantize_channels_reference(
    v: torch.Tensor,
    stats: Statistics,
    *,
    smooth: bool = False,
    limit: float = FP8_MAX,
    permutation: torch.Tensor | None = None,
    interleave: bool = False,
) -> QuantizedChannels:
    """Specification of `quantize_channels` in plain torch; same arguments and result."""
    S, D = v.shape[2:]
    scale, mean = _channel_scales(stats, smooth, limit)
    rows = gather(v, permutation).float() - mean[:, :, None, :D]
    rows = (rows / scale[:, :, None, :D]).clamp(-limit, limit)
    values = rows.new_zeros(*scale.shape, -(-S // BLOCK) * BLOCK)
    values[:, :, :D, :S] = rows.transpose(2, 3)
    if interleave:
        values = values.unflatten(-1, (-1, 16))[..., list(INTERLEAVED)].flatten(-2)
    return QuantizedChannels(values.to(torch.float8_e4m3fn), scale, mean if smooth else None)


def _channel_scales(stats, smooth, limit):
    """Scale and mean of every channel, fp32 [B, H, Dp]; the mean is zero where it stays."""
    centre = stats.v_mean
    return channel_scales(centre, stats.v_low, stats.v_high, limit, centre if smooth else torch.zeros_like(centre))


def channel_scales(
    centre: torch.Tensor, low: torch.Tensor, high: torch.Tensor, limit: float, mean: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of every channel, 1 for padding, and the mean that is taken off.

    Args:
        centre, low, high: fp32 [B, H, D], of the channels.
        limit: the largest quantised value.
        mean: fp32 [B, H, D] to take off; None: the centre.

    Returns:
        fp32 [B, H, Dp] both.
    """
    mean = centre if mean is None else mean
    largest = torch.maximum(high - mean, mean - low)
    largest = torch.where(largest <= SMALLEST, 1.0, largest)
    step = largest / torch.full_like(largest, limit)  # by a number a GPU multiplies by its reciprocal
    # Minimum and maximum may skip NaN; the mean never does.
    scale = torch.where(centre.isfinite() & largest.isfinite(), step, torch.nan)
    padding = (0, padded_head_dim(mean.shape[-1]) - mean.shape[-1])
    return F.pad(scale, padding, value=1.0), F.pad(mean, padding)


def dequantize_channels(x: QuantizedChannels, tokens: int, head_dim: int) -> torch.Tensor:
    """The numbers that quantised values stand for, without the mean that was taken off.

    Args:
        x: quantised values.
        tokens: S.
        head_dim: D.

    Returns:
        fp32 [B, H, S, D].
    """
    return fp8_values(x, tokens, head_dim) * x.scale[:, :, None, :head_dim]


def fp8_values(x: QuantizedChannels, tokens: int, head_dim: int) -> torch.Tensor:
    """The FP8 numbers alone, as `dequantize_channels` without the scale.

    Args:
        x: quantised values.
        tokens: S.
        head_dim: D.

    Returns:
        fp32 [B, H, S, D].
    """
    return x.values.float().transpose(2, 3)[:, :, :tokens, :head_dim]


# arch -> warps of (statistics, channels)
LAUNCH = LaunchTable({80: (4, 8), 89: (4, 8), 90: (8, 8), 100: (4, 8), 120: (4, 8)}, measured=[90])
STATISTICS_ROWS, STATISTICS_STEP = 1024, 16  # tokens that one program of the statistics sums, and those of a step


def _statistics(k, v):
    B, H, S, D = k.shape
    parts = triton.cdiv(S, STATISTICS_ROWS)
    partial = torch.empty(6, B, H, parts, D, dtype=torch.float32, device=k.device)
    with target.on_device(k):
        _statistics_kernel[(parts, B * H, 2)](  # of K, of V
            k, v, partial, partial.stride(0), H, S, parts, *k.stride()[:3], *v.stride()[:3],
            D=D, BLOCK_D=padded_head_dim(D), ROWS=STATISTICS_ROWS, BLOCK_S=STATISTICS_STEP,
            num_warps=LAUNCH.row(k.device)[0],
        )  # fmt: skip
        stats = torch.empty(6, B, H, D, dtype=torch.float32, device=k.device)
        _join_statistics_kernel[(6, B * H)](
            partial, stats, B * H, parts, S, D=D, BLOCK_D=padded_head_dim(D), BLOCK_P=32, num_warps=4
        )
    return Statistics(*stats)


def _quantize_channels(v, stats, *, smooth, limit, permutation, interleave):
    B, H, S, D = v.shape
    block_d = padded_head_dim(D)
    padded = triton.cdiv(S, BLOCK) * BLOCK
    values = torch.empty(B, H, block_d, padded, dtype=torch.float8_e4m3fn, device=v.device)
    scale, mean = torch.empty(2, B, H, block_d, dtype=torch.float32, device=v.device)
    with target.on_device(v):
        _quantize_channels_kernel[(padded // BLOCK, B * H)](
            v, permutation, stats.v_mean, stats.v_low, stats.v_high, scale, mean, values, H, S, padded,
            *v.stride()[:3], *((0, 0, 0) if permutation is None else permutation.stride()),
            D=D, BLOCK_D=block_d, BLOCK=BLOCK, LIMIT=limit, SMOOTH=smooth, INTERLEAVE=interleave,
            num_warps=LAUNCH.row(v.device)[1],
        )  # fmt: skip
    return QuantizedChannels(values, scale, mean if smooth else None)


@triton.jit
def _statistics_of(
    x, total_at, low_at, high_at, S, stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sum, least and largest of ROWS tokens."""
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    low = tl.full([BLOCK_S, BLOCK_D], float("inf"), dtype=tl.float32)
    high = tl.full([BLOCK_S, BLOCK_D], float("-inf"), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * ROWS
    for first in range(start, tl.minimum(start + ROWS, S), BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
        row = tl.load(x + offs_s[:, None] * stride_s + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += row
        low = tl.minimum(low, tl.where(mask, row, float("inf")))
        high = tl.maximum(high, tl.where(mask, row, float("-inf")))
    real = offs_d < D
    tl.store(total_at + offs_d, tl.sum(total, 0), mask=real)
    tl.store(low_at + offs_d, tl.min(low, 0), mask=real)
    tl.store(high_at + offs_d, tl.max(high, 0), mask=real)


@triton.jit(do_not_specialize=["S", "parts"])
def _statistics_kernel(
    k, v, partial, stride_part, H, S, parts,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """K and V apart: few registers, so that many loads are under way."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    partial += (bh * parts + tl.program_id(0)) * D
    if tl.program_id(2) == 0:
        _statistics_of(
            k + b * stride_kb + h * stride_kh, partial, partial + 4 * stride_part, partial + 5 * stride_part, S, stride_ks,
            D, BLOCK_D, ROWS, BLOCK_S,
        )  # fmt: skip
    else:
        _statistics_of(
            v + b * stride_vb + h * stride_vh, partial + stride_part, partial + 2 * stride_part, partial + 3 * stride_part,
            S, stride_vs, D, BLOCK_D, ROWS, BLOCK_S,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "parts", "S"])
def _join_statistics_kernel(
    partial, stats, heads, parts, S, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr
):
    """One of the six statistics of a head: mean of K; mean, least and largest of V; least and largest of K."""
    which, bh = tl.program_id(0), tl.program_id(1)
    offs_p, offs_d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    partial += (which * heads + bh).to(tl.int64) * parts * D + offs_d[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    low = tl.full([BLOCK_P, BLOCK_D], float("inf"), dtype=tl.float32)
    high = tl.full([BLOCK_P, BLOCK_D], float("-inf"), dtype=tl.float32)
    for first in range(0, parts, BLOCK_P):
        mask = (first + offs_p < parts)[:, None] & (offs_d < D)[None, :]
        row = tl.load(partial + (first + offs_p)[:, None] * D, mask=mask, other=0.0)
        total += row
        low = tl.minimum(low, tl.where(mask, row, float("inf")))
        high = tl.maximum(high, tl.where(mask, row, float("-inf")))
    mean = tl.div_rn(tl.sum(total, 0), tl.full([BLOCK_D], 0.0, tl.float32) + S)
    result = tl.where(which < 2, mean, tl.where(which % 2 == 0, tl.min(low, 0), tl.max(high, 0)))
    tl.store(stats + (which * heads + bh) * D + offs_d, result, mask=offs_d < D)


@triton.jit
def scales_of_channels(
    v_mean, v_low, v_high, D: tl.constexpr, BLOCK_D: tl.constexpr, LIMIT: tl.constexpr, SMOOTH: tl.constexpr
):
    """`_channel_scales` of one head."""
    offs_d = tl.arange(0, BLOCK_D)
    real = offs_d < D
    centre = tl.load(v_mean + offs_d, mask=real, other=0.0)
    mean = centre if SMOOTH else tl.zeros([BLOCK_D], dtype=tl.float32)
    largest = tl.maximum(
        tl.load(v_high + offs_d, mask=real, other=0.0) - mean, mean - tl.load(v_low + offs_d, mask=real, other=0.0)
    )
    largest = tl.where(largest <= TINY, 1.0, largest)
    finite = (tl.abs(centre) < float("inf")) & (tl.abs(largest) < float("inf"))
    scale = tl.where(finite, tl.div_rn(largest, tl.full([BLOCK_D], LIMIT, tl.float32)), float("nan"))
    return tl.where(real, scale, 1.0), mean


@triton.jit(do_not_specialize=["S"])
def _quantize_channels_kernel(
    v, permutation, v_mean, v_low, v_high, scale, mean, values, H, S, padded,
    stride_vb, stride_vh, stride_vs, stride_pb, stride_ph, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, SMOOTH: tl.constexpr,
    INTERLEAVE: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    token = offs_s
    if INTERLEAVE:
        token = offs_s // 16 * 16 + offs_s % 4 // 2 * 8 + offs_s % 16 // 4 * 2 + offs_s % 2  # INTERLEAVED
    inside = token < S
    if permutation is not None:
        token = tl.load(permutation + b * stride_pb + h * stride_ph + token * stride_ps, mask=inside, other=0)
        token = token.to(tl.int64)
    mask = inside[:, None] & (offs_d < D)[None, :]
    rows = tl.load(
        v + b * stride_vb + h * stride_vh + token[:, None] * stride_vs + offs_d[None, :], mask=mask, other=0.0
    )
    step, centre = scales_of_channels(v_mean + bh * D, v_low + bh * D, v_high + bh * D, D, BLOCK_D, LIMIT, SMOOTH)
    if tl.program_id(0) == 0:
        tl.store(scale + bh * BLOCK_D + offs_d, step)
        tl.store(mean + bh * BLOCK_D + offs_d, centre)
    rows = rows.to(tl.float32) - centre[None, :]
    size = tl.broadcast_to(step[None, :], [BLOCK, BLOCK_D])
    # Channels of padding are zero by their load, mean and scale: ptxas 12.8 packs a constant zero with a stale register.
    rows = tl.where(inside[:, None], tl.clamp(tl.div_rn(rows, size), -LIMIT, LIMIT), 0.0).to(tl.float8e4nv)
    goal = (bh * BLOCK_D + offs_d)[:, None] * padded + offs_s[None, :]
    tl.store(values + goal, tl.trans(rows))
