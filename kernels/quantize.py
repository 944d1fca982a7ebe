"""Quantisation of attention inputs: INT8 or INT4-range Q and K in groups of tokens, FP8 e4m3 V per channel, transposed.

    x ~ scale * values + mean        values = round(127 (x - mean) / absmax of the group)    (7 in place of 127: INT4)
    v ~ scale * values + mean        values = e4m3(448 (v - mean) / absmax of the channel)

Groups of tokens that share a scale, within 128 (the paper has 64 keys a block; 128 let a tile of 128 have one scale):

    token   each its own          block   all 128          warp    32 consecutive queries, 64 consecutive keys
    thread  queries {i, 8+i, 16+i, 24+i} of 32; keys {8k+2j, 8k+2j+1 for all k} of 64: what one thread holds

Any mean may be taken from K: it shifts every score of a query alike, and drops out of the softmax. An all-zero group or
channel has scale 1, one with NaN or infinity has scale NaN, so that the output shows it. INT4 values are kept in int8:
an exact emulation for accuracy work, not faster. Two passes: statistics of K and V in one read, then a read and a write of
each, with the rows gathered by a permutation on the way. 64-bit offsets; inputs may be strided (last dim contiguous).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import target
from .target import tl, triton

BLOCK = 128  # tokens that one program quantises, and the largest group
FP8_MAX = 448.0
TINY = 1e-30  # what is smaller counts as zero: its scale's inverse would overflow
LEVELS = {8: 127.0, 4: 7.0}
# side -> groups -> 128 tokens as [A, B, C, E]; tokens that differ in B and E alone share a scale.
GROUPS = {
    "q": {"token": (128, 1, 1, 1), "thread": (4, 4, 8, 1), "warp": (4, 32, 1, 1), "block": (1, 128, 1, 1)},
    "k": {"token": (128, 1, 1, 1), "thread": (2, 8, 4, 2), "warp": (2, 64, 1, 1), "block": (1, 128, 1, 1)},
}
MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantizedTokens:
    """Quantised Q or K.

    Args:
        values: int8 [B, H, S, Dp], D padded with zeros to 64 or 128.
        scale: fp32 [B, H, S]; of keys in groups of "block" [B, H, ceil(S / 128)].
        mean: fp32 [B, H, ceil(S / 128), D], each block's own mean that was taken off, or None.
    """

    values: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor | None


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
    """Mean of K and mean, least and largest value of V over all tokens, fp32 [B, H, D] each."""

    k_mean: torch.Tensor
    v_mean: torch.Tensor
    v_low: torch.Tensor
    v_high: torch.Tensor


def padded_head_dim(head_dim: int) -> int:
    """64 or 128: what quantised tensors are padded to.

    Args:
        head_dim: D.

    Raises:
        NotImplementedError: D is above 128.
    """
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head dim must be at most {MAX_HEAD_DIM}, got {head_dim}: use unquantised attention for this model"
        )
    return 64 if head_dim <= 64 else 128


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
    _check("k", k)
    _check("v", v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    return _statistics(k, v) if target.use_triton(k) else statistics_reference(k, v)


def statistics_reference(k: torch.Tensor, v: torch.Tensor) -> Statistics:
    """Specification of `statistics` in plain torch; same arguments and result."""
    v_wide = v.float()
    return Statistics(k.float().mean(2), v_wide.mean(2), v_wide.amin(2), v_wide.amax(2))


def quantize_tokens(
    x: torch.Tensor,
    *,
    side: str,
    groups: str = "token",
    bits: int = 8,
    mean: torch.Tensor | None = None,
    own_mean: bool = False,
    permutation: torch.Tensor | None = None,
) -> QuantizedTokens:
    """INT8 or INT4-range values of Q or K, with one scale a group of tokens.

    Args:
        x: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        side: "q" or "k".
        groups: "token", "thread", "warp" or "block": which tokens share a scale.
        bits: 8 or 4 (range -7 to 7, kept in int8).
        mean: fp32 [B, H, D] to take off every token first, or None.
        own_mean: take each 128-token block's own mean off instead.
        permutation: int32 or int64 [B, H, S], sorted -> original index; None: identity.

    Returns:
        The quantised tokens, in sorted order.

    Raises:
        ValueError: an unknown side, groups or bits, mean and own_mean at once, shapes disagree, or a strided last dim.
        TypeError: a dtype that is not supported.
        NotImplementedError: head dim above 128.

    Source: arXiv 2411.10958, sections 3.1 (smoothing) and 3.2 (per-thread quantisation).
    """
    _check("x", x, permutation)
    if side not in GROUPS or groups not in GROUPS[side]:
        raise ValueError(f"side must be q or k and groups one of {', '.join(GROUPS['q'])}, got {side!r}, {groups!r}")
    if bits not in LEVELS:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if mean is not None and own_mean:
        raise ValueError("mean and own_mean cannot both be taken off: give one of them")
    op = _quantize_tokens if target.use_triton(x) else quantize_tokens_reference
    return op(x, side=side, groups=groups, bits=bits, mean=mean, own_mean=own_mean, permutation=permutation)


def quantize_tokens_reference(
    x: torch.Tensor,
    *,
    side: str,
    groups: str = "token",
    bits: int = 8,
    mean: torch.Tensor | None = None,
    own_mean: bool = False,
    permutation: torch.Tensor | None = None,
) -> QuantizedTokens:
    """Specification of `quantize_tokens` in plain torch; same arguments and result."""
    B, H, S, D = x.shape
    blocks = -(-S // BLOCK)
    rows = _gather(x, permutation).float()
    if mean is not None:
        rows = rows - mean[:, :, None]
    padded = rows.new_zeros(B, H, blocks * BLOCK, padded_head_dim(D))
    padded[:, :, :S, :D] = rows
    padded = padded.view(B, H, blocks, BLOCK, -1)
    means = None
    if own_mean:
        means = _block_means(rows, blocks)
        padded[..., :D] -= means[:, :, :, None]
        padded.view(B, H, blocks * BLOCK, -1)[:, :, S:] = 0
    largest = padded.abs().amax(-1).view(B, H, blocks, *GROUPS[side][groups])
    largest = largest.amax((-3, -1), keepdim=True).expand_as(largest).reshape(B, H, blocks, BLOCK)
    largest = torch.where(largest <= TINY, 1.0, largest)
    # A tensor over a tensor: torch turns a number over a tensor into a reciprocal, rounded twice.
    inverse = torch.full_like(largest, LEVELS[bits]) / largest
    values = (padded * inverse[..., None]).round().nan_to_num(0).to(torch.int8)
    scale = torch.where(largest.isfinite(), largest / LEVELS[bits], torch.nan)
    scale = scale[..., 0] if side == "k" and groups == "block" else scale.flatten(2)[:, :, :S]
    return QuantizedTokens(values.flatten(2, 3)[:, :, :S].contiguous(), scale.contiguous(), means)


def _block_means(rows: torch.Tensor, blocks: int) -> torch.Tensor:
    counts = torch.full((blocks,), BLOCK, device=rows.device)
    counts[-1] -= blocks * BLOCK - rows.shape[2]
    padded = F.pad(rows, (0, 0, 0, blocks * BLOCK - rows.shape[2]))
    return padded.unflatten(2, (blocks, BLOCK)).sum(3) / counts[:, None]


def dequantize_tokens(x: QuantizedTokens, head_dim: int) -> torch.Tensor:
    """The numbers that quantised tokens stand for, without the means that were taken off.

    Args:
        x: quantised tokens.
        head_dim: D.

    Returns:
        fp32 [B, H, S, D].
    """
    S = x.values.shape[2]
    scale = x.scale if x.scale.shape[2] == S else x.scale.repeat_interleave(BLOCK, 2)[:, :, :S]
    return x.values[..., :head_dim].float() * scale[..., None]


def quantize_channels(
    v: torch.Tensor, stats: Statistics, *, smooth: bool = False, permutation: torch.Tensor | None = None
) -> QuantizedChannels:
    """FP8 e4m3 values of V, transposed, with one scale a channel.

    Args:
        v: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        stats: its statistics.
        smooth: take the channel's mean off first; the attention adds it to its output.
        permutation: int32 or int64 [B, H, S], sorted -> original index; None: identity.

    Returns:
        The quantised values, tokens in sorted order.

    Raises:
        ValueError: shapes disagree, or a strided last dim.
        TypeError: a dtype that is not supported.
        NotImplementedError: head dim above 128, or a GPU without FP8.

    Source: arXiv 2411.10958, section 3.3 (FP8 values of V, per channel, and smoothing of V).
    """
    _check("v", v, permutation)
    target.require_fp8(v.device)
    op = _quantize_channels if target.use_triton(v) else quantize_channels_reference
    return op(v, stats, smooth=smooth, permutation=permutation)


def quantize_channels_reference(
    v: torch.Tensor, stats: Statistics, *, smooth: bool = False, permutation: torch.Tensor | None = None
) -> QuantizedChannels:
    """Specification of `quantize_channels` in plain torch; same arguments and result."""
    S, D = v.shape[2:]
    scale, mean = _channel_scales(stats, smooth)
    rows = _gather(v, permutation).float() - mean[:, :, None, :D]
    rows = (rows / scale[:, :, None, :D]).clamp(-FP8_MAX, FP8_MAX)
    values = rows.new_zeros(*scale.shape, -(-S // BLOCK) * BLOCK)
    values[:, :, :D, :S] = rows.transpose(2, 3)
    return QuantizedChannels(values.to(torch.float8_e4m3fn), scale, mean if smooth else None)


def _channel_scales(stats, smooth):
    """Scale and mean of every channel, fp32 [B, H, Dp]; the mean is zero where it stays."""
    mean = stats.v_mean if smooth else torch.zeros_like(stats.v_mean)
    largest = torch.maximum(stats.v_high - mean, mean - stats.v_low)
    largest = torch.where(largest <= TINY, 1.0, largest)
    # Minimum and maximum may skip NaN; the mean never does.
    scale = torch.where(stats.v_mean.isfinite() & largest.isfinite(), largest / FP8_MAX, torch.nan)
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
    wide = x.values.float() * x.scale[..., None]  # [B, H, Dp, Sp]
    return wide.transpose(2, 3)[:, :, :tokens, :head_dim]


def _gather(x, permutation):
    return x if permutation is None else x.gather(2, permutation.long()[..., None].expand_as(x))


def _check(name: str, x: torch.Tensor, permutation: torch.Tensor | None = None) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, H, S, D], got {tuple(x.shape)}: reshape it")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}: convert it")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dim, got strides {x.stride()}: call .contiguous()")
    if permutation is not None and permutation.shape != x.shape[:3]:
        raise ValueError(
            f"permutation must be [B, H, S] = {tuple(x.shape[:3])}, got {tuple(permutation.shape)}: expand it"
        )
    padded_head_dim(x.shape[-1])


# arch -> warps of (statistics, tokens, channels). Not measured: chosen by ahead-of-time compile (no spills).
LAUNCH = {80: (4, 8, 8), 89: (4, 8, 8), 90: (4, 8, 8), 100: (4, 8, 8), 120: (4, 8, 8)}
STATISTICS_ROWS = 2048  # tokens that one program of the statistics sums


def _statistics(k, v):
    B, H, S, D = k.shape
    parts = triton.cdiv(S, STATISTICS_ROWS)
    partial = torch.empty(4, B, H, parts, D, dtype=torch.float32, device=k.device)
    with target.on_device(k):
        _statistics_kernel[(parts, B * H)](
            k, v, partial, partial.stride(0), H, S, parts, *k.stride()[:3], *v.stride()[:3],
            D=D, BLOCK_D=padded_head_dim(D), ROWS=STATISTICS_ROWS, BLOCK_S=16,
            num_warps=target.launch_row(LAUNCH, k.device)[0],
        )  # fmt: skip
    k_sum, v_sum, low, high = partial
    return Statistics(k_sum.sum(2) / S, v_sum.sum(2) / S, low.amin(2), high.amax(2))


def _quantize_tokens(x, *, side, groups, bits, mean, own_mean, permutation):
    B, H, S, D = x.shape
    blocks, block_d = triton.cdiv(S, BLOCK), padded_head_dim(D)
    compact = side == "k" and groups == "block"
    values = torch.empty(B, H, S, block_d, dtype=torch.int8, device=x.device)
    scale = torch.empty(B, H, blocks if compact else S, dtype=torch.float32, device=x.device)
    means = torch.empty(B, H, blocks, D, dtype=torch.float32, device=x.device) if own_mean else None
    mean = None if mean is None else mean.contiguous()
    with target.on_device(x):
        _quantize_tokens_kernel[(blocks, B * H)](
            x, permutation, mean, means, values, scale, H, S, blocks,
            *x.stride()[:3], *((0, 0, 0) if permutation is None else permutation.stride()),
            D=D, BLOCK_D=block_d, BLOCK=BLOCK, LEVELS=LEVELS[bits], GROUPS=GROUPS[side][groups], COMPACT=compact,
            num_warps=target.launch_row(LAUNCH, x.device)[1],
        )  # fmt: skip
    return QuantizedTokens(values, scale, means)


def _quantize_channels(v, stats, *, smooth, permutation):
    B, H, S, D = v.shape
    scale, mean = _channel_scales(stats, smooth)
    padded = triton.cdiv(S, BLOCK) * BLOCK
    values = torch.empty(B, H, scale.shape[2], padded, dtype=torch.float8_e4m3fn, device=v.device)
    with target.on_device(v):
        _quantize_channels_kernel[(padded // BLOCK, B * H)](
            v, permutation, scale, mean, values, H, S, padded,
            *v.stride()[:3], *((0, 0, 0) if permutation is None else permutation.stride()),
            D=D, BLOCK_D=scale.shape[2], BLOCK=BLOCK, num_warps=target.launch_row(LAUNCH, v.device)[2],
        )  # fmt: skip
    return QuantizedChannels(values, scale, mean if smooth else None)


@triton.jit(do_not_specialize=["S", "parts"])
def _statistics_kernel(
    k, v, partial, stride_part, H, S, parts,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_d = tl.arange(0, BLOCK_D)
    k += b * stride_kb + h * stride_kh + offs_d[None, :]
    v += b * stride_vb + h * stride_vh + offs_d[None, :]
    k_sum = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    v_sum = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    low = tl.full([BLOCK_S, BLOCK_D], float("inf"), dtype=tl.float32)
    high = tl.full([BLOCK_S, BLOCK_D], float("-inf"), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * ROWS
    for first in range(start, tl.minimum(start + ROWS, S), BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
        k_sum += tl.load(k + offs_s[:, None] * stride_ks, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(v + offs_s[:, None] * stride_vs, mask=mask, other=0.0).to(tl.float32)
        v_sum += row
        low = tl.minimum(low, tl.where(mask, row, float("inf")))
        high = tl.maximum(high, tl.where(mask, row, float("-inf")))
    partial += (bh * parts + tl.program_id(0)) * D + offs_d
    real = offs_d < D
    tl.store(partial, tl.sum(k_sum, 0), mask=real)
    tl.store(partial + stride_part, tl.sum(v_sum, 0), mask=real)
    tl.store(partial + 2 * stride_part, tl.min(low, 0), mask=real)
    tl.store(partial + 3 * stride_part, tl.max(high, 0), mask=real)


@triton.jit
def round_to_int8(x, levels_over_absmax):
    """Nearest integer, ties to even: adding 1.5 * 2^23 leaves no fraction bits."""
    rounded = (x * levels_over_absmax + 12582912.0) - 12582912.0
    return tl.where(tl.abs(rounded) < 128, rounded, 0.0).to(tl.int8)


@triton.jit
def absmax_of_rows(x):
    """Largest absolute value of each row; infinity where a row has NaN."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")), 1)


@triton.jit(do_not_specialize=["S", "blocks"])
def _quantize_tokens_kernel(
    x, permutation, mean, means, values, scale, H, S, blocks,
    stride_xb, stride_xh, stride_xs, stride_pb, stride_ph, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, GROUPS: tl.constexpr,
    COMPACT: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_s < S
    token = offs_s
    if permutation is not None:
        token = tl.load(permutation + b * stride_pb + h * stride_ph + offs_s * stride_ps, mask=inside, other=0)
        token = token.to(tl.int64)
    mask = inside[:, None] & (offs_d < D)[None, :]  # [BLOCK, BD]
    rows = tl.load(
        x + b * stride_xb + h * stride_xh + token[:, None] * stride_xs + offs_d[None, :], mask=mask, other=0.0
    )
    rows = rows.to(tl.float32)
    if mean is not None:
        rows = tl.where(mask, rows - tl.load(mean + bh * D + offs_d, mask=offs_d < D, other=0.0)[None, :], 0.0)
    if means is not None:
        own = tl.sum(rows, 0) / tl.sum(inside.to(tl.float32), 0)  # [BD]
        tl.store(means + (bh * blocks + tl.program_id(0)) * D + offs_d, own, mask=offs_d < D)
        rows = tl.where(mask, rows - own[None, :], 0.0)
    largest = tl.reshape(absmax_of_rows(rows), GROUPS)
    largest = tl.max(tl.max(largest, 3, keep_dims=True), 1, keep_dims=True)
    largest = tl.reshape(tl.broadcast_to(largest, GROUPS), [BLOCK])
    largest = tl.where(largest > 1e-30, largest, 1.0)  # TINY
    values += (bh * S + offs_s)[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(
        values, round_to_int8(rows, tl.div_rn(LEVELS + tl.zeros_like(largest), largest)[:, None]), mask=inside[:, None]
    )
    size = tl.where(largest < float("inf"), tl.div_rn(largest, LEVELS + tl.zeros_like(largest)), float("nan"))
    if COMPACT:
        tl.store(scale + bh * blocks + tl.program_id(0), tl.max(size, 0))
    else:
        tl.store(scale + bh * S + offs_s, size, mask=inside)


@triton.jit(do_not_specialize=["S"])
def _quantize_channels_kernel(
    v, permutation, scale, mean, values, H, S, padded,
    stride_vb, stride_vh, stride_vs, stride_pb, stride_ph, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_s < S
    token = offs_s
    if permutation is not None:
        token = tl.load(permutation + b * stride_pb + h * stride_ph + offs_s * stride_ps, mask=inside, other=0)
        token = token.to(tl.int64)
    mask = inside[:, None] & (offs_d < D)[None, :]
    rows = tl.load(
        v + b * stride_vb + h * stride_vh + token[:, None] * stride_vs + offs_d[None, :], mask=mask, other=0.0
    )
    rows = rows.to(tl.float32) - tl.load(mean + bh * BLOCK_D + offs_d)[None, :]
    size = tl.broadcast_to(tl.load(scale + bh * BLOCK_D + offs_d)[None, :], [BLOCK, BLOCK_D])
    rows = tl.where(mask, tl.clamp(tl.div_rn(rows, size), -448.0, 448.0), 0.0).to(tl.float8e4nv)
    goal = (bh * BLOCK_D + offs_d)[:, None] * padded + offs_s[None, :]
    tl.store(values + goal, tl.trans(rows))
