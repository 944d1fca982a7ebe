"""Rows of chosen heads, moved while the others are left alone: which heads is known on the device only."""

import torch

from . import target
from .target import tl, triton


def move_heads(
    x: torch.Tensor, out: torch.Tensor, chosen: torch.Tensor, permutation: torch.Tensor | None = None
) -> None:
    """Copy chosen heads: out[b, h, i] = x[b, h, permutation[b, h, i]] where chosen[b, h]; other heads stay as they are.

    Args:
        x: [B, H, S, D], last dim contiguous.
        out: [B, H, S, D] of x's dtype, last dim contiguous; changed in place.
        chosen: int32 [B, H], not 0 for a head to be copied.
        permutation: int32 or int64 [B, H, S], or None for identity.

    Raises:
        ValueError: shapes disagree.
    """
    if x.shape != out.shape or chosen.shape != x.shape[:2] or x.dtype != out.dtype:
        raise ValueError(
            f"out and chosen must fit x {tuple(x.shape)} {x.dtype}, got {tuple(out.shape)} {out.dtype} and "
            f"{tuple(chosen.shape)}: expand them"
        )
    op = _move_heads if target.use_triton(x) else move_heads_reference
    op(x, out, chosen, permutation)


def move_heads_reference(x, out, chosen, permutation=None) -> None:
    """Specification of `move_heads` in plain torch; same arguments."""
    rows = x if permutation is None else x.gather(2, permutation.long()[..., None].expand_as(x))
    out.copy_(torch.where(chosen[..., None, None] != 0, rows, out))


BLOCK_S = 64


def _move_heads(x, out, chosen, permutation):
    B, H, S, D = x.shape
    with target.on_device(x):
        _move_heads_kernel[(triton.cdiv(S, BLOCK_S), B * H)](
            x, out, chosen.contiguous(), permutation, H, S, D, *x.stride()[:3], *out.stride()[:3],
            *((0, 0, 0) if permutation is None else permutation.stride()),
            BLOCK_S=BLOCK_S, BLOCK_D=triton.next_power_of_2(D), num_warps=8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def _move_heads_kernel(
    x, out, chosen, permutation, H, S, D, stride_xb, stride_xh, stride_xs, stride_ob, stride_oh, stride_os,
    stride_pb, stride_ph, stride_ps, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    if tl.load(chosen + bh) == 0:
        return
    b, h = bh // H, bh % H
    goal = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BS]
    offs_d = tl.arange(0, BLOCK_D)
    inside = goal < S
    source = goal
    if permutation is not None:
        source = tl.load(permutation + b * stride_pb + h * stride_ph + goal * stride_ps, mask=inside, other=0)
        source = source.to(tl.int64)
    mask = inside[:, None] & (offs_d < D)[None, :]
    rows = tl.load(x + b * stride_xb + h * stride_xh + source[:, None] * stride_xs + offs_d[None, :], mask=mask)
    tl.store(out + b * stride_ob + h * stride_oh + goal[:, None] * stride_os + offs_d[None, :], rows, mask=mask)
