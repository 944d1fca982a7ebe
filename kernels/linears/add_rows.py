"""Quantised rows added to a tensor in place: one read of both, one write."""

import torch

from ..common import target
from ..common.target import tl, triton
from .rows import QuantizedRows

ROWS = 32  # of a program


def add_rows(out: torch.Tensor, rows: QuantizedRows, weight: float) -> torch.Tensor:
    """out + weight * rows, in place.

    Args:
        out: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        rows: FP8 rows of the same shape.
        weight: a number.

    Returns:
        out.

    Raises:
        ValueError: shapes disagree, or the last dim is strided.

    Example:
        >>> add_rows(out, quantize_rows(lost), 0.5)
    """
    if out.dim() != 4 or out.shape != rows.shape or out.stride(-1) != 1:
        raise ValueError(
            f"out must be [B, H, S, D] of the rows' {tuple(rows.shape)} with a contiguous last dim, got "
            f"{tuple(out.shape)} with strides {out.stride()}: add to the output of the same call"
        )
    if not target.use_triton(out):
        return add_rows_reference(out, rows, weight)
    B, H, S, D = out.shape
    if out.numel():
        with target.on_device(out):
            _add_rows_kernel[(triton.cdiv(S, ROWS), B * H)](
                out, rows.values, rows.scale, weight, H, S, *out.stride()[:3],
                D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_S=ROWS,
            )  # fmt: skip
    return out


def add_rows_reference(out: torch.Tensor, rows: QuantizedRows, weight: float) -> torch.Tensor:
    """Specification of `add_rows` in plain torch; same arguments and result."""
    return out.copy_(out.float() + rows.dequantize() * weight)


@triton.jit(do_not_specialize=["weight", "S"])
def _add_rows_kernel(
    out, values, scale, weight, H, S, stride_b, stride_h, stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)[None, :]
    inside = (token < S)[:, None] & (offs < D)
    row = bh * S + token
    lost = tl.load(values + row[:, None] * D + offs, mask=inside, other=0.0).to(tl.float32)
    lost = lost * tl.load(scale + row, mask=token < S, other=0.0)[:, None] * weight
    out += bh // H * stride_b + bh % H * stride_h
    place = out + token[:, None] * stride_s + offs
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32) + lost
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)
