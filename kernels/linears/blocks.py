"""Matrices in INT8, a scale for each 128 x 128 block, and a second INT8 value where a block holds outliers.

    x ~ s1 q1 (+ s2 q2)        s1 = absmax of the block / 127,  q1 = round(x / s1)
                               s2 = absmax of (x - s1 q1) / 127,  q2 = round((x - s1 q1) / s2)    in blocks over the threshold

The second value is worth 8 more bits: those blocks fall back to 16. An all-zero block counts as one of absmax 1; one with NaN or
infinity has scale NaN, so that the output shows it. Rounding is to nearest, or for gradients at random: up with the probability
of what is cut off, by a hash of a seed and the value's place, so that the same seed gives the same values.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..common import target
from ..common.numbers import INT8_MAX, SMALLEST, TINY
from ..common.target import tl, triton
from ..quantize.tokens import round_to_int8
from .rows import DTYPES

BLOCK = 128
LEAST_RATE, MOST_RATE = 0.1, 0.3  # of blocks that fall back
NUDGE = 1.1


@dataclass(frozen=True)
class QuantizedBlocks:
    """A matrix in INT8.

    Args:
        values: int8 [M, K].
        scale: fp32 [ceil(M / 128), ceil(K / 128)].
        residual: int8 [M, K], of which flagged blocks alone are written, or None: no block falls back.
        residual_scale: fp32, as `scale`; 1 where a block is not flagged.
        flagged: int32, as `scale`, not 0 where a block falls back.
        dtype: of the matrix before.
    """

    values: torch.Tensor
    scale: torch.Tensor
    residual: torch.Tensor | None
    residual_scale: torch.Tensor | None
    flagged: torch.Tensor | None
    dtype: torch.dtype

    def dequantize(self) -> torch.Tensor:
        """The numbers that the blocks stand for: fp32 [M, K]."""
        out = self.values.float() * spread(self.scale, self.values.shape)
        if self.residual is not None:
            second = self.residual.float() * spread(self.residual_scale, self.values.shape)
            out = out + torch.where(spread(self.flagged, self.values.shape) != 0, second, 0.0)
        return out

    def t(self, whole: bool = False) -> "QuantizedBlocks":
        """Transposed, in rows the other way, which 8-bit products need: [K, M].

        Args:
            whole: fill rows with zeros to a multiple of 128, for numbers of tokens that are none of 16: [K, ceil(M)].
        """
        fill = -self.values.shape[0] % BLOCK if whole else 0
        values, residual = (
            None if x is None else F.pad(x.t(), (0, fill)).contiguous() for x in (self.values, self.residual)
        )
        scale, second, flagged = (
            None if x is None else x.t().contiguous() for x in (self.scale, self.residual_scale, self.flagged)
        )
        return QuantizedBlocks(values, scale, residual, second, flagged, self.dtype)


def quantize_blocks(
    x: torch.Tensor, threshold: torch.Tensor | None = None, *, seed: int | None = None
) -> QuantizedBlocks:
    """INT8 values of a matrix, and second ones of blocks whose largest value is above a threshold.

    Args:
        x: [M, K] fp16, bf16 or fp32.
        threshold: fp32 [1] on x's device, or None: no block falls back.
        seed: round at random, and by what; None: to nearest.

    Returns:
        The blocks.

    Raises:
        ValueError: x is no matrix.
        TypeError: a dtype that is not supported.
        NotImplementedError: a gradient would be needed.

    Source: fallback quantisation (arXiv 2503.08040), sections 4.1 and 4.2.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got {tuple(x.shape)}: flatten it")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}: convert it")
    if not target.use_triton(x):
        return quantize_blocks_reference(x, threshold, seed=seed)
    target.refuse_gradients("quantize_blocks", x)
    x = x if x.stride(1) == 1 else x.contiguous()
    (M, K), rows, columns = x.shape, triton.cdiv(x.shape[0], BLOCK), triton.cdiv(x.shape[1], BLOCK)
    values = torch.empty(M, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, columns, dtype=torch.float32, device=x.device)
    # Of a residual what is not flagged is never read: it may hold anything.
    second = (None, None, None)
    if threshold is not None:
        second = torch.empty_like(values), torch.empty_like(scale), torch.empty_like(scale, dtype=torch.int32)
    if rows and columns:
        with target.on_device(x):
            _quantize_blocks_kernel[(columns, rows)](
                x, threshold, values, scale, *second, 0 if seed is None else seed, M, K, x.stride(0),
                STOCHASTIC=seed is not None, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
    return QuantizedBlocks(values, scale, *second, x.dtype)


def quantize_blocks_reference(
    x: torch.Tensor, threshold: torch.Tensor | None = None, *, seed: int | None = None
) -> QuantizedBlocks:
    """Specification of `quantize_blocks` in plain torch; same arguments and result, residuals of other blocks are 0."""
    wide, shape = x.float(), x.shape
    noise = None if seed is None else random_share(shape, seed, x.device)
    largest = block_absmax(wide)
    values, scale = _quantized(wide, largest, noise)
    if threshold is None:
        return QuantizedBlocks(values, scale, None, None, None, x.dtype)
    flagged = (largest > threshold).to(torch.int32)
    rest = torch.where(spread(flagged, shape) != 0, wide - values.float() * spread(scale, shape), 0.0)
    residual, residual_scale = _quantized(rest, block_absmax(rest), None)
    residual_scale = torch.where(flagged != 0, residual_scale, 1.0)
    return QuantizedBlocks(values, scale, residual, residual_scale, flagged, x.dtype)


def _quantized(wide, largest, noise):
    largest = torch.where(largest <= SMALLEST, 1.0, largest)
    limit = torch.full_like(largest, INT8_MAX.value)
    levels = wide * spread(limit / largest, wide.shape)
    levels = levels.round() if noise is None else (levels + noise).floor()
    scale = torch.where(largest.isfinite(), largest / limit, torch.nan)
    return levels.nan_to_num(0).clamp(-127, 127).to(torch.int8), scale


def block_absmax(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value of each 128 x 128 block: fp32 [ceil(M / 128), ceil(K / 128)]; infinity where one has NaN."""
    M, K = x.shape
    padded = F.pad(x.float().abs(), (0, -K % BLOCK, 0, -M % BLOCK))
    largest = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).amax((1, 3))
    return torch.where(largest.isnan(), torch.inf, largest)


def spread(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A number a block -> one a value, [M, K]."""
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def random_share(shape: torch.Size, seed: int, device: torch.device) -> torch.Tensor:
    """What rounding at random adds to each value before cutting: fp32 [M, K] in [0, 1), from a seed and the place."""
    place = torch.arange(shape[0] * shape[1], device=device) & 0xFFFFFFFF
    h = (place * 0x9E3779B1 + seed * 0x85EBCA77) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (((h ^ (h >> 16)) >> 8).float() * 2.0**-24).view(*shape)


def first_threshold(x: torch.Tensor) -> torch.Tensor:
    """A threshold over which a fifth of a matrix's blocks are: fp32 [1].

    Args:
        x: [M, K].
    """
    largest = block_absmax(x.detach()).flatten().sort().values  # quantile() takes 2^24 numbers at most
    place = int((1 - (LEAST_RATE + MOST_RATE) / 2) * (largest.numel() - 1))
    return largest[place : place + 1].clone()


def steered(threshold: torch.Tensor, blocks: QuantizedBlocks) -> torch.Tensor:
    """The threshold for the next matrix: nudged where too many or too few blocks fell back. Nothing waits.

    Args:
        threshold: fp32 [1].
        blocks: what was quantised with it.
    """
    rate = (blocks.flagged != 0).float().mean()
    up = torch.where(rate > MOST_RATE, NUDGE, torch.where(rate < LEAST_RATE, 1 / NUDGE, 1.0))
    return threshold * up


@triton.jit
def _absmax(x):
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")), 1), 0)


@triton.jit
def _scale_of(largest):
    return tl.where(largest < float("inf"), tl.div_rn(largest, tl.zeros_like(largest) + INT8_MAX), float("nan"))


@triton.jit(do_not_specialize=["seed", "M"])
def _quantize_blocks_kernel(
    x, threshold, values, scale, residual, residual_scale, flagged, seed, M, K, stride_x,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    place = offs_m[:, None] * K + offs_k[None, :]
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    y = tl.load(x + offs_m[:, None] * stride_x + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    absmax = _absmax(y)
    largest = tl.where(absmax > TINY, absmax, 1.0)
    inverse = tl.div_rn(tl.zeros_like(largest) + INT8_MAX, largest)
    if STOCHASTIC:
        h = place.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32) * 0x85EBCA77
        h = (h ^ (h >> 16)) * 0x7FEB352D
        h = (h ^ (h >> 15)) * 0x846CA68B
        share = ((h ^ (h >> 16)) >> 8).to(tl.float32) * 5.9604644775390625e-08
        levels = tl.floor(y * inverse + share)
        levels = tl.where(levels == levels, tl.minimum(tl.maximum(levels, -127.0), 127.0), 0.0)
        q = levels.to(tl.int8)
    else:
        q = round_to_int8(y, inverse)
    size = _scale_of(largest)
    tl.store(values + place, q, mask=mask)
    tl.store(scale + block, size)
    if threshold is not None:
        falls_back = absmax > tl.load(threshold)
        second = 1.0
        if falls_back:
            rest = tl.where(mask, y - q.to(tl.float32) * size, 0.0)
            largest = _absmax(rest)
            largest = tl.where(largest > TINY, largest, 1.0)
            inverse = tl.div_rn(tl.zeros_like(largest) + INT8_MAX, largest)
            tl.store(residual + place, round_to_int8(rest, inverse), mask=mask)
            second = _scale_of(largest)
        tl.store(residual_scale + block, second)
        tl.store(flagged + block, falls_back.to(tl.int32))
