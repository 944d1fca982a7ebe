"""Rows in INT8, rotated first, with a scale a row of activations or an output channel of a weight.

    x H ~ scale * values        scale = absmax of a rotated row / 127,        values = round(x H / scale)
H is block-diagonal: Hadamard matrices of 128, which spread an outlier over its 128 neighbours. INT8 steps are even, where FP8 has three
bits after the leading one: without outliers that is a third of FP8's error.
"""

import torch

from ...common import target
from ...common.activation import HALVED, quick_activation
from ...common.constants import constant
from ...common.numbers import INT8_MAX, INT_AS_FLOAT, SMALLEST, TINY
from ...common.target import tl, triton
from ..rows import DTYPES, QuantizedRows

WIDEST = 128  # of a Hadamard matrix
PAIRS = 64  # of a row and one of its parts, of a matrix's side, that are rotated at a time
WARPS = 4
STAGES = 3
ACTIVATES_ON = (90, 100, 103)  # elsewhere erf spills, or what joins rows needs more shared memory than there is


def rotation_width(width: int) -> int:
    """Side of the Hadamard matrices that rotate rows of a width: the largest power of two that divides it, at most 128."""
    return min(width & -width, WIDEST)


@constant()
def hadamard(side: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A Hadamard matrix of ones and minus ones, symmetric: [side, side], a power of two.

    Source: Sylvester's construction; rotation before quantising as in QuaRot (arXiv 2404.00456).
    """
    found = torch.ones(1, 1, device=device, dtype=dtype)
    while len(found) < side:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def parts_at_a_time(total: int) -> int:
    """Parts of a row that are rotated together: many, so that rows in flight stay in the cache, of which few are none."""
    return next(n for n in (16, 8, 4, 2, 1) if -total % n <= 0.05 * total)


def quantize_int8_rows(x: torch.Tensor) -> QuantizedRows:
    """INT8 values of the rotated last dim, with one scale a row.

    Args:
        x: [..., K] fp16, bf16 or fp32.

    Returns:
        The rows: int8 values. An all-zero row counts as one of absmax 1; one with NaN or infinity has scale NaN.

    Raises:
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, a gradient would be needed.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}: convert it")
    return _launched(x) if _fits(x, x.shape[-1]) else quantize_int8_rows_reference(x)


def quantize_activated(x: torch.Tensor, kind: str, before: torch.Tensor | None = None) -> QuantizedRows | None:
    """The same of what an activation makes, rounded to x's dtype, in one pass; None where no kernel does that.

    Args:
        x, kind, before: as `svg.kernels.activate` takes them.
    """
    first = 0 if before is None else before.shape[-1]
    width = first + x.shape[-1] // (2 if kind in HALVED else 1)
    fits = _fits(x, width) and target.arch(x.device) in ACTIVATES_ON and first % rotation_width(width) == 0
    return _launched(x, kind, before, width) if fits else None


def _fits(x: torch.Tensor, width: int) -> bool:
    # A tile of the kernel's product has 16 rows and columns at least; in fp32 it would spill, and exceed the shared memory.
    return target.use_triton(x) and rotation_width(width) >= 16 and x.dtype != torch.float32


def _launched(
    x: torch.Tensor, kind: str | None = None, before: torch.Tensor | None = None, width: int | None = None
) -> QuantizedRows:
    width = width or x.shape[-1]
    target.refuse_gradients("quantize_int8_rows", *(one for one in (x, before) if one is not None))
    flat, other = _rows(x), None if before is None else _rows(before)
    values = torch.empty((*x.shape[:-1], width), dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    side = rotation_width(width)
    rotation, parts = hadamard(side, x.device, x.dtype), parts_at_a_time(width // side)
    rows = PAIRS // parts
    if len(flat):
        with target.on_device(x):
            _quantize_int8_rows_kernel[(triton.cdiv(len(flat), rows),)](
                flat, other, rotation, values, scale, flat.stride(0), 0 if other is None else other.stride(0), len(flat),
                KIND=kind, FIRST=0 if other is None else other.shape[-1], K=width, SIDE=side, PARTS=parts, ROWS=rows,
                num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip
    return QuantizedRows(values, scale, x.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def quantize_int8_rows_reference(x: torch.Tensor) -> QuantizedRows:
    """Specification of `quantize_int8_rows` in plain torch; same arguments and result."""
    side = rotation_width(x.shape[-1])
    wide = (x.float().unflatten(-1, (-1, side)) @ hadamard(side, x.device)).flatten(-2)
    largest = wide.abs().amax(-1) * side**-0.5
    largest = torch.where(largest <= SMALLEST, 1.0, largest)
    limit = torch.full_like(largest, INT8_MAX.value)
    levels = (wide * (limit / largest * side**-0.5)[..., None]).round().nan_to_num(0).clamp(-127, 127)
    scale = torch.where(largest.isfinite(), largest / limit, torch.nan)
    return QuantizedRows(levels.to(torch.int8).contiguous(), scale.contiguous(), x.dtype)


@triton.jit
def largest_bits(turned):
    """The largest magnitude of every part [PAIRS, SIDE], as an integer, where NaN is above infinity, and it above all numbers."""
    return tl.max(turned.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def steps_of(bits, SIDE: tl.constexpr):
    """Rows' scales, and what their parts are multiplied by, from the largest magnitudes before the rotation's own scale."""
    size: tl.constexpr = SIDE**-0.5
    largest = bits.to(tl.float32, bitcast=True) * size
    largest = tl.where(largest > TINY, largest, 1.0)
    limit = tl.zeros_like(largest) + INT8_MAX
    step = tl.where(bits < 0x7F800000, tl.div_rn(largest, limit), float("nan"))
    return step, tl.div_rn(limit, largest) * size


@triton.jit
def quantized(turned, inverse):
    """The last eight bits of the sum are the nearest integer; those of a row without a scale are anything."""
    return (turned * inverse + INT_AS_FLOAT).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _load(x, before, places, own, mask, KIND: tl.constexpr, GATE: tl.constexpr):
    """Numbers of a row's parts, after the activation: those of `before` where a part is not x's own."""
    place_x, place_before = places
    if KIND is None:
        return tl.load(place_x, mask=mask, other=0.0)
    y = tl.load(place_x, mask=mask & own, other=0.0).to(tl.float32)
    if GATE:
        y = y * quick_activation(tl.load(place_x + GATE, mask=mask & own, other=0.0).to(tl.float32), KIND)
    else:
        y = quick_activation(y, KIND)
    y = y.to(x.dtype.element_ty)
    if before is not None:
        y = tl.where(own, y, tl.load(place_before, mask=mask & (own == 0), other=0.0))
    return y


@triton.jit(do_not_specialize=["M"])
def _quantize_int8_rows_kernel(
    x, before, rotation, values, scale, stride_x, stride_before, M, KIND: tl.constexpr, FIRST: tl.constexpr,
    K: tl.constexpr, SIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, PARTS matrices of each at a time, twice: for the largest number, then to round."""
    TOTAL: tl.constexpr = K // SIDE
    GATE: tl.constexpr = K - FIRST if (KIND == "geglu") or (KIND == "swiglu") else 0
    side = tl.arange(0, SIDE)
    h = tl.load(rotation + side[:, None] * SIDE + side[None, :])
    pair = tl.arange(0, ROWS * PARTS)
    row, part = tl.program_id(0).to(tl.int64) * ROWS + pair // PARTS, pair % PARTS
    inside = row < M
    start = x + row * stride_x + part * SIDE - FIRST
    ahead = start if before is None else before + row * stride_before + part * SIDE
    bits = tl.zeros([ROWS * PARTS], tl.int32)
    for first in range(0, TOTAL, PARTS):
        mask = ((inside & (first + part < TOTAL)) if TOTAL % PARTS else inside)[:, None]
        place, own = (first * SIDE + side)[None, :], (first + part >= FIRST // SIDE)[:, None]
        y = tl.dot(_load(x, before, (start[:, None] + place, ahead[:, None] + place), own, mask, KIND, GATE), h)
        bits = tl.maximum(bits, largest_bits(y))
    step, inverse = steps_of(tl.max(bits.reshape(ROWS, PARTS), 1), SIDE)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(scale + rows, step, mask=rows < M)
    inverse = (inverse[:, None] + tl.zeros([ROWS, PARTS], tl.float32)).reshape(ROWS * PARTS)[:, None]
    to = values + row * K + part * SIDE
    for first in range(0, TOTAL, PARTS):
        mask = ((inside & (first + part < TOTAL)) if TOTAL % PARTS else inside)[:, None]
        place, own = (first * SIDE + side)[None, :], (first + part >= FIRST // SIDE)[:, None]
        y = tl.dot(_load(x, before, (start[:, None] + place, ahead[:, None] + place), own, mask, KIND, GATE), h)
        tl.store(to[:, None] + place, quantized(y, inverse), mask=mask)
