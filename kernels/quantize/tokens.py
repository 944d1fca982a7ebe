"""Quantisation of Q and K: INT8 or INT4-range values in groups of tokens.

    x ~ scale * values + mean        values = round(127 (x - mean) / absmax of the group)    (7 in place of 127: INT4)

Groups of tokens that share a scale, within 128 (the paper has 64 keys a block; 128 let a tile of 128 have one scale):

    token   each its own          block   all 128          warp    32 consecutive queries, 64 consecutive keys
    sixteen 16 consecutive keys
    thread  queries {i, 8+i, 16+i, 24+i} of 32; keys {8k+2j, 8k+2j+1 for all k} of 64: what one thread holds

Any mean may be taken from K: it shifts every score of a query alike, and drops out of the softmax. An all-zero group has
scale 1, one with NaN or infinity has scale NaN, so that the output shows it. INT4 values are kept in int8: an exact
emulation for accuracy work, not faster. One read and one write, with the rows gathered by a permutation on the way.
64-bit offsets; inputs may be strided (last dim contiguous).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..common import target
from ..common.launch import LaunchTable
from ..common.numbers import INT_AS_FLOAT, SMALLEST, TINY
from ..common.target import tl, triton

BLOCK = 128  # tokens that one program quantises, and the largest group
LEVELS = {8: 127.0, 4: 7.0}
# side -> groups -> 128 tokens as [A, B, C, E]; tokens that differ in B and E alone share a scale.
GROUPS = {
    "q": {"token": (128, 1, 1, 1), "thread": (4, 4, 8, 1), "warp": (4, 32, 1, 1), "block": (1, 128, 1, 1)},
    "k": {
        "token": (128, 1, 1, 1),
        "sixteen": (8, 16, 1, 1),
        "thread": (2, 8, 4, 2),
        "warp": (2, 64, 1, 1),
        "block": (1, 128, 1, 1),
    },
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
    check("x", x, permutation)
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
    rows = gather(x, permutation).float()
    if mean is not None:
        rows = rows - mean[:, :, None]
    padded = rows.new_zeros(B, H, blocks * BLOCK, padded_head_dim(D))
    padded[:, :, :S, :D] = rows
    padded = padded.view(B, H, blocks, BLOCK, -1)
    means = None
    if own_mean:
        means = block_means(rows, blocks)
        padded[..., :D] -= means[:, :, :, None]
        padded.view(B, H, blocks * BLOCK, -1)[:, :, S:] = 0
    largest = padded.abs().amax(-1).view(B, H, blocks, *GROUPS[side][groups])
    largest = largest.amax((-3, -1), keepdim=True).expand_as(largest).reshape(B, H, blocks, BLOCK)
    largest = torch.where(largest <= SMALLEST, 1.0, largest)
    # A tensor over a tensor: torch turns a number over a tensor into a reciprocal, rounded twice.
    inverse = torch.full_like(largest, LEVELS[bits]) / largest
    values = (padded * inverse[..., None]).round().nan_to_num(0).to(torch.int8)
    scale = torch.where(largest.isfinite(), largest / LEVELS[bits], torch.nan)
    scale = scale[..., 0] if side == "k" and groups == "block" else scale.flatten(2)[:, :, :S]
    return QuantizedTokens(values.flatten(2, 3)[:, :, :S].contiguous(), scale.contiguous(), means)


def block_means(rows: torch.Tensor, blocks: int) -> torch.Tensor:
    """Mean of every BLOCK tokens, the last block's over those that are there.

    Args:
        rows: fp32 [B, H, S, D].
        blocks: ceil(S / BLOCK).

    Returns:
        fp32 [B, H, blocks, D].
    """
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


def gather(x: torch.Tensor, permutation: torch.Tensor | None) -> torch.Tensor:
    """Tokens [B, H, S, D] in sorted order; as they are without a permutation."""
    return x if permutation is None else x.gather(2, permutation.long()[..., None].expand_as(x))


def check(name: str, x: torch.Tensor, permutation: torch.Tensor | None = None) -> None:
    """Raises where a tensor cannot be quantised.

    Args:
        name: the argument's, for the message.
        x: the tensor.
        permutation: of its tokens, or None.

    Raises:
        ValueError: not [B, H, S, D], a strided last dim, or the permutation does not fit.
        TypeError: a dtype that is not supported.
        NotImplementedError: head dim above 128.
    """
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


LAUNCH = LaunchTable({80: 8, 89: 8, 90: 8, 100: 8, 120: 8})  # arch -> warps


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
            num_warps=LAUNCH.row(x.device),
        )  # fmt: skip
    return QuantizedTokens(values, scale, means)


@triton.jit
def round_to_int8(x, levels_over_absmax):
    """Nearest integer, ties to even: adding 1.5 * 2^23 leaves no fraction bits."""
    rounded = (x * levels_over_absmax + INT_AS_FLOAT) - INT_AS_FLOAT
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
    largest = tl.where(largest > TINY, largest, 1.0)
    values += (bh * S + offs_s)[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(
        values, round_to_int8(rows, tl.div_rn(LEVELS + tl.zeros_like(largest), largest)[:, None]), mask=inside[:, None]
    )
    size = tl.where(largest < float("inf"), tl.div_rn(largest, LEVELS + tl.zeros_like(largest)), float("nan"))
    if COMPACT:
        tl.store(scale + bh * blocks + tl.program_id(0), tl.max(size, 0))
    else:
        tl.store(scale + bh * S + offs_s, size, mask=inside)


def key_groups(key_multiple: int) -> str:
    """Which keys share a scale, as `quantize_tokens` has it: no tile of keys may begin inside of a group.

    Args:
        key_multiple: tiles begin at multiples of 16, and runs of tiles at multiples of this.
    """
    return "warp" if key_multiple % 64 == 0 else "sixteen"
