"""NVFP4: e2m1 numbers in groups of 16 that share an e4m3 scale, and a power of two for each head (SageAttention3).

    x ~ head_scale * scale * values + mean        scale = e4m3(absmax of the group / (6 head_scale)), 0 for a zero group
                                                  values = e2m1((x - mean) / (head_scale * scale)), the rounded scale

Q and K are grouped along channels, V along tokens and stored transposed: groups lie along what a product sums over. The
head's power of two only moves e4m3's range to where the head's numbers are, and changes no rounding within it.

Packed (two e2m1 codes a byte, the first in the low half, beside the scales) is what sm100 and sm120 multiply. Elsewhere
`values * scale` is stored in fp16, which holds all such products exactly: an emulation for accuracy work, not faster.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..common import target
from ..common.launch import LaunchTable
from ..common.numbers import FP8_MAX, INT_AS_FLOAT
from ..common.target import tl, triton
from .tokens import BLOCK, block_means, check, padded_head_dim

GROUP = 16
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 6.0 * 448.0  # value times scale


@dataclass(frozen=True)
class Nvfp4:
    """A quantised tensor.

    Args:
        values: uint8 [..., n / 2], two codes a byte, or fp16 [..., n], codes times scales; [...] is [B, H, S] and n the
            padded head dim for Q and K; [B, H, Dp] and n the tokens, padded to a multiple of 128, for V.
        scale: float8_e4m3fn [..., n / 16], or None beside fp16 values.
        head_scale: fp32 [B, H], powers of two.
        mean: fp32 [B, H, ceil(S / 128), D], each block's own mean that was taken off, or None.
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    head_scale: torch.Tensor
    mean: torch.Tensor | None


def quantize_nvfp4(
    x: torch.Tensor, *, transposed: bool = False, packed: bool, mean: torch.Tensor | None = None, own_mean: bool = False
) -> Nvfp4:
    """Quantise Q, K or V to NVFP4.

    Args:
        x: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        transposed: group along tokens and store [B, H, D, S], as V wants it; otherwise along channels.
        packed: two codes a byte; otherwise codes times scales in fp16.
        mean: fp32 [B, H, D] to take off every token first, or None.
        own_mean: take each 128-token block's own mean off instead.

    Returns:
        The quantised tensor.

    Raises:
        ValueError: mean and own_mean at once, or a strided last dim.
        TypeError: a dtype that is not supported.
        NotImplementedError: head dim above 128.

    Source: arXiv 2505.11594, section 3.1 (microscaling), 3.2 (smoothing).
    """
    check("x", x)
    if mean is not None and own_mean:
        raise ValueError("mean and own_mean cannot both be taken off: give one of them")
    op = _quantize_nvfp4 if target.use_triton(x) else quantize_nvfp4_reference
    return op(x, transposed=transposed, packed=packed, mean=mean, own_mean=own_mean)


def quantize_nvfp4_reference(
    x: torch.Tensor, *, transposed: bool = False, packed: bool, mean: torch.Tensor | None = None, own_mean: bool = False
) -> Nvfp4:
    """Specification of `quantize_nvfp4` in plain torch; same arguments and result."""
    S, D = x.shape[2:]
    rows = x.float() if mean is None else x.float() - mean[:, :, None]
    blocks = -(-S // BLOCK)
    means = block_means(rows, blocks) if own_mean else None
    if own_mean:
        rows = rows - means.repeat_interleave(BLOCK, 2)[:, :, :S]
    head_scale = _head_scale(x, mean is not None or own_mean)
    rows = F.pad(rows / head_scale[..., None, None], (0, padded_head_dim(D) - D))
    if transposed:
        rows = F.pad(rows, (0, 0, 0, blocks * BLOCK - S)).transpose(2, 3)
    values, scale = round_nvfp4(rows)
    if not packed:
        values = (values.unflatten(-1, (-1, GROUP)) * scale[..., None]).flatten(-2).half()
        return Nvfp4(values.contiguous(), None, head_scale, means)
    codes = torch.bucketize(values.abs(), torch.tensor(CODES, device=x.device)) + 8 * values.signbit()
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return Nvfp4((low | high << 4).contiguous(), scale.to(torch.float8_e4m3fn).contiguous(), head_scale, means)


def round_nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest e2m1 numbers, ties to even, and the e4m3 scales of their groups.

    Args:
        x: fp32 [..., n].

    Returns:
        e2m1 numbers fp32 [..., n], scales fp32 [..., n / 16].
    """
    groups = x.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / CODES[-1]).clamp(max=448).to(torch.float8_e4m3fn).float()
    wide = torch.where(scale[..., None] > 0, groups / scale[..., None], 0.0)
    size = wide.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.copysign((size / step).round() * step, wide)).clamp(-6, 6).flatten(-2), scale


def dequantize_nvfp4(x: Nvfp4) -> torch.Tensor:
    """The numbers that a quantised tensor stands for, without the means that were taken off.

    Args:
        x: the quantised tensor.

    Returns:
        fp32, shaped as the values unpacked.
    """
    values = x.values
    if x.scale is not None:
        codes = torch.stack([values & 15, values >> 4], -1).flatten(-2).long()
        table = torch.tensor(CODES + tuple(-code for code in CODES), device=values.device)
        values = (table[codes].unflatten(-1, (-1, GROUP)) * x.scale.float()[..., None]).flatten(-2)
    return values.float() * x.head_scale[..., None, None]


def _head_scale(x: torch.Tensor, smoothed: bool) -> torch.Tensor:
    """Powers of two fp32 [B, H] that bring a head's largest value into e2m1's times e4m3's range; NaN with NaN."""
    largest = torch.linalg.vector_norm(x, torch.inf, (2, 3)).float() * (2 if smoothed else 1)
    power = torch.exp2((largest / LARGEST).log2().ceil().clamp(min=-40))  # products of two stay above zero
    return torch.where(largest.isfinite(), power, torch.nan)


LAUNCH = LaunchTable({80: 8, 89: 16, 90: 8, 100: 8, 120: 8})  # arch -> warps


def _quantize_nvfp4(x, *, transposed, packed, mean, own_mean):
    B, H, S, D = x.shape
    blocks, block_d = triton.cdiv(S, BLOCK), padded_head_dim(D)
    rows, width = (block_d, blocks * BLOCK) if transposed else (S, block_d)
    kept = {"device": x.device, "dtype": torch.uint8 if packed else torch.float16}
    values = torch.empty(B, H, rows, width // 2 if packed else width, **kept)
    scale = torch.empty(B, H, rows, width // GROUP, dtype=torch.float8_e4m3fn, device=x.device) if packed else None
    means = torch.empty(B, H, blocks, D, dtype=torch.float32, device=x.device) if own_mean else None
    head_scale = _head_scale(x, mean is not None or own_mean)
    with target.on_device(x):
        _quantize_nvfp4_kernel[(blocks, B * H)](
            x, None if mean is None else mean.contiguous(), means, head_scale, values, scale, H, S, blocks,
            *x.stride()[:3],
            D=D, BLOCK_D=block_d, BLOCK=BLOCK, TRANSPOSED=transposed,
            num_warps=LAUNCH.row(x.device),
        )  # fmt: skip
    return Nvfp4(values, scale, head_scale, means)


@triton.jit
def round_to_e4m3(x):
    """Nearest e4m3 number to one that is not negative, as fp32; 448 at most. Needs no FP8 in the hardware."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2^23 steps of 2^-9
    return tl.minimum(tl.where(x < 0.015625, subnormal, normal), FP8_MAX)


@triton.jit
def round_to_e2m1(size):
    """Nearest e2m1 number to one that is not negative, ties to even; 6 at most."""
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    return tl.minimum(((size / step + INT_AS_FLOAT) - INT_AS_FLOAT) * step, 6.0)


@triton.jit
def pack_e2m1(low, high):
    """Bytes of two e2m1 codes each, from numbers that e2m1 holds."""
    return (_code(low) | (_code(high) << 4)).to(tl.uint8)


@triton.jit
def _code(x):
    size = tl.abs(x)
    code = tl.where(size < 2.0, 2 * size, tl.where(size < 4.0, size + 2, size * 0.5 + 4)).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)  # the sign bit


@triton.jit(do_not_specialize=["S", "blocks"])
def _quantize_nvfp4_kernel(
    x, mean, means, head_scale, values, scale, H, S, blocks, stride_xb, stride_xh, stride_xs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_s < S
    mask = inside[:, None] & (offs_d < D)[None, :]
    rows = tl.load(
        x + b * stride_xb + h * stride_xh + offs_s[:, None] * stride_xs + offs_d[None, :], mask=mask, other=0.0
    )
    rows = rows.to(tl.float32)  # [BLOCK, BD]
    if mean is not None:
        rows = tl.where(mask, rows - tl.load(mean + bh * D + offs_d, mask=offs_d < D, other=0.0)[None, :], 0.0)
    if means is not None:
        own = tl.sum(rows, 0) / tl.sum(inside.to(tl.float32), 0)  # [BD]
        tl.store(means + (bh * blocks + tl.program_id(0)) * D + offs_d, own, mask=offs_d < D)
        rows = tl.where(mask, rows - own[None, :], 0.0)
    rows = rows / tl.load(head_scale + bh)
    if TRANSPOSED:
        rows = tl.trans(rows)
        first, width, line, stored = tl.program_id(0) * BLOCK, blocks * BLOCK, bh * BLOCK_D + offs_d, offs_d >= 0
    else:
        first, width, line, stored = 0, BLOCK_D, bh * S + offs_s, inside
    R: tl.constexpr = BLOCK_D if TRANSPOSED else BLOCK
    C: tl.constexpr = BLOCK if TRANSPOSED else BLOCK_D
    groups = tl.reshape(rows, [R, C // 16, 16])
    size = round_to_e4m3(tl.max(tl.abs(groups), 2) / 6.0)  # [R, C / 16]
    divisor = tl.broadcast_to(tl.where(size > 0, size, 1.0)[:, :, None], groups.shape)
    wide = tl.where(size[:, :, None] > 0, tl.div_rn(groups, divisor), 0.0)
    near = tl.where(wide < 0, -1.0, 1.0) * round_to_e2m1(tl.abs(wide))
    if scale is None:
        offs_c = first + tl.arange(0, C)
        near = tl.reshape(near * size[:, :, None], [R, C]).to(tl.float16)
        tl.store(values + line[:, None] * width + offs_c[None, :], near, mask=stored[:, None])
    else:
        low, high = tl.split(tl.reshape(near, [R, C // 2, 2]))
        offs_c = first // 2 + tl.arange(0, C // 2)
        tl.store(values + line[:, None] * (width // 2) + offs_c[None, :], pack_e2m1(low, high), mask=stored[:, None])
        offs_c = first // 16 + tl.arange(0, C // 16)
        size = size.to(tl.float8e4nv)
        tl.store(scale + line[:, None] * (width // 16) + offs_c[None, :], size, mask=stored[:, None])
