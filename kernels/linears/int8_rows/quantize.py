"""Rows in INT8, rotated first, with a scale a row of activations or an output channel of a weight.

    x H ~ scale * values        scale = absmax of a rotated row / 127,        values = round(x H / scale)
H is block-diagonal: Hadamard matrices of 128, which spread an outlier over its 128 neighbours. INT8 steps are even, where FP8 has three
bits after the leading one: without outliers that is a third of FP8's error.
"""

from functools import cache

import torch

from ...common import target
from ...common.numbers import INT8_MAX, SMALLEST, TINY
from ...common.target import tl, triton
from ...quantize.tokens import round_to_int8
from ..rows import DTYPES, MAX_WIDTH, QuantizedRows, warps

WIDEST = 128  # of a Hadamard matrix
ROWS = 8  # of a program, which reads the matrix once: it is three times as large as a row


def rotation_width(width: int) -> int:
    """Side of the Hadamard matrices that rotate rows of a width: the largest power of two that divides it, at most 128."""
    return min(width & -width, WIDEST)


@cache
def hadamard(side: int, device: torch.device) -> torch.Tensor:
    """A Hadamard matrix of ones and minus ones, symmetric: fp32 [side, side], a power of two.

    Source: Sylvester's construction; rotation before quantising as in QuaRot (arXiv 2404.00456).
    """
    found = torch.ones(1, 1, device=device)
    while len(found) < side:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def quantize_int8_rows(x: torch.Tensor) -> QuantizedRows:
    """INT8 values of the rotated last dim, with one scale a row.

    Args:
        x: [..., K] fp16, bf16 or fp32.

    Returns:
        The rows: int8 values. An all-zero row counts as one of absmax 1; one with NaN or infinity has scale NaN.

    Raises:
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, of 16-bit inputs, rows wider than 32768, or a gradient would be needed.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}: convert it")
    width = x.shape[-1]
    # A tile of the kernel's product has 16 rows and columns at least; in fp32 it would spill, and exceed the shared memory.
    if not target.use_triton(x) or rotation_width(width) < 16 or x.dtype == torch.float32:
        return quantize_int8_rows_reference(x)
    if width > MAX_WIDTH:
        raise NotImplementedError(
            f"quantize_int8_rows takes rows of at most {MAX_WIDTH} numbers, got {width}: stay in 16 bits"
        )
    target.refuse_gradients("quantize_int8_rows", x)
    flat = x.reshape(-1, width)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    side = rotation_width(width)
    rotation = hadamard(side, x.device).to(x.dtype)
    if len(flat):
        with target.on_device(x):
            _quantize_int8_rows_kernel[(triton.cdiv(len(flat), ROWS),)](
                flat, rotation, values, scale, flat.stride(0), len(flat), K=width, SIDE=side, ROWS=ROWS,
                PARTS=max(16, triton.next_power_of_2(width // side)), num_warps=max(4, warps(width)), num_stages=1,
            )  # fmt: skip
    return QuantizedRows(values, scale, x.dtype)


def quantize_int8_rows_reference(x: torch.Tensor) -> QuantizedRows:
    """Specification of `quantize_int8_rows` in plain torch; same arguments and result."""
    side = rotation_width(x.shape[-1])
    wide = (x.float().unflatten(-1, (-1, side)) @ hadamard(side, x.device)).flatten(-2) * side**-0.5
    largest = wide.abs().amax(-1)
    largest = torch.where(largest <= SMALLEST, 1.0, largest)
    limit = torch.full_like(largest, INT8_MAX.value)
    levels = (wide * (limit / largest)[..., None]).round().nan_to_num(0).clamp(-127, 127)
    scale = torch.where(largest.isfinite(), largest / limit, torch.nan)
    return QuantizedRows(levels.to(torch.int8).contiguous(), scale.contiguous(), x.dtype)


@triton.jit(do_not_specialize=["M"])
def _quantize_int8_rows_kernel(
    x, rotation, values, scale, stride_x, M, K: tl.constexpr, SIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    side = tl.arange(0, SIDE)
    offs = tl.arange(0, PARTS)[:, None] * SIDE + side[None, :]
    h = tl.load(rotation + side[:, None] * SIDE + side[None, :])
    size: tl.constexpr = SIDE**-0.5
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(tl.minimum(M - first, ROWS)):
        row = first + i
        y = tl.load(x + row * stride_x + offs, mask=offs < K, other=0.0)
        y = tl.dot(y, h) * size
        finite = tl.abs(y) < float("inf")
        largest = tl.max(tl.max(tl.where(finite, tl.abs(y), float("inf")), 1), 0)
        largest = tl.where(largest > TINY, largest, 1.0)
        inverse = tl.div_rn(tl.zeros_like(largest) + INT8_MAX, largest)
        tl.store(values + row * K + offs, round_to_int8(y, inverse), mask=offs < K)
        step = tl.div_rn(largest, tl.zeros_like(largest) + INT8_MAX)
        tl.store(scale + row, tl.where(largest < float("inf"), step, float("nan")))
