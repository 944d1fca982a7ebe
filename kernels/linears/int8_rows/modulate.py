"""Layer norm and what the timestep makes of it, as rotated INT8 rows, in one pass: what goes into q, k, v and feed-forwards.

As `_modulate_kernel` of svg/kernels/elementwise.py, but for several tokens a program, because a matrix product turns them.
"""

import torch

from ...common import target
from ...common.target import tl, triton
from ..rows import QuantizedRows
from .quantize import hadamard, largest_bits, quantized, rotation_width, steps_of

PAIRS = 64  # of a token and one of its parts, of a Hadamard matrix's side, that a program turns
WARPS = 4
PROGRAMS = 6  # of a multiprocessor, which holds three at a time
REGISTERS = {90: 168}  # so that as many fit; elsewhere these would spill


def quantize_modulated(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    total: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    affine: bool,
    strides: tuple[int, ...],
) -> QuantizedRows | None:
    """Rotated INT8 rows of what `svg.kernels.residual_modulate` leaves, rounded to x's dtype; None where no kernel does that.

    Args:
        x, update, gate, scale, shift, eps, affine: as `residual_modulate` takes them.
        total: [B, S, C] contiguous, which x + gate * update is written to; x itself without an update.
        strides: over samples and tokens, of x, update, gate, scale and shift.
    """
    B, S, C = x.shape
    side = rotation_width(C)
    parts = triton.next_power_of_2(C // side)
    if not target.use_triton(x) or side < 16 or x.dtype == torch.float32 or parts > PAIRS:
        return None
    tokens = PAIRS // parts
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    steps = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if not steps.numel():
        return QuantizedRows(values, steps, x.dtype)
    programs = triton.cdiv(PROGRAMS * target.sm_count(x.device), B)
    with target.on_device(x):
        _modulate_int8_rows_kernel[(min(programs, triton.cdiv(S, tokens)), B)](
            x, update, gate, total, scale, shift, hadamard(side, x.device, x.dtype), values, steps, eps, S,
            *strides, AFFINE=affine, C=C, SIDE=side, PARTS=parts, TOKENS=tokens, num_warps=WARPS,
            maxnreg=REGISTERS.get(target.arch(x.device), 255),
        )  # fmt: skip
    return QuantizedRows(values, steps, x.dtype)


@triton.jit(do_not_specialize=["S", "eps"])
def _modulate_int8_rows_kernel(
    x, update, gate, total, scale, shift, rotation, values, steps, eps, S,
    stride_xb, stride_xs, stride_ub, stride_us, stride_gb, stride_gs, stride_cb, stride_cs, stride_hb, stride_hs,
    AFFINE: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS whole rows at a time, in registers from their load to their store; a program takes many, and loads its matrix once."""
    b = tl.program_id(1).to(tl.int64)
    side, pair, few = tl.arange(0, SIDE), tl.arange(0, TOKENS * PARTS).to(tl.int64), tl.arange(0, TOKENS).to(tl.int64)
    channel = tl.arange(0, PARTS * SIDE)[None, :]
    h = tl.load(rotation + side[:, None] * SIDE + side[None, :])
    for turn in tl.range(tl.program_id(0), tl.cdiv(S, TOKENS), tl.num_programs(0), num_stages=1):
        first = turn * TOKENS
        token = (first + few)[:, None]
        mask = (token < S) & (channel < C)
        y = tl.load(x + b * stride_xb + token * stride_xs + channel, mask=mask, other=0.0).to(tl.float32)
        if update is not None:
            u = tl.load(update + b * stride_ub + token * stride_us + channel, mask=mask, other=0.0).to(tl.float32)
            if gate is not None:
                u = u * tl.load(gate + b * stride_gb + token * stride_gs + channel, mask=mask, other=0.0).to(tl.float32)
            added = (y + u).to(total.dtype.element_ty)
            tl.store(total + (b * S + token) * C + channel, added, mask=mask)
            y = added.to(tl.float32)
        y = tl.where(mask, y - tl.sum(y, 1)[:, None] / C, 0.0)
        y = y * tl.rsqrt(tl.sum(y * y, 1) / C + eps)[:, None]
        factor = tl.load(scale + b * stride_cb + token * stride_cs + channel, mask=mask, other=0.0).to(tl.float32)
        if not AFFINE:
            factor = 1 + factor
        y = y * factor + tl.load(shift + b * stride_hb + token * stride_hs + channel, mask=mask, other=0.0).to(
            tl.float32
        )
        turned = tl.dot(y.to(x.dtype.element_ty).reshape(TOKENS * PARTS, SIDE), h)
        step, inverse = steps_of(tl.max(largest_bits(turned).reshape(TOKENS, PARTS), 1), SIDE)
        tl.store(steps + b * S + first + few, step, mask=first + few < S)
        inverse = (inverse[:, None] + tl.zeros([TOKENS, PARTS], tl.float32)).reshape(TOKENS * PARTS)[:, None]
        row, part = first + pair // PARTS, pair % PARTS
        there = ((row < S) & (part < C // SIDE))[:, None]
        to = values + (b * S + row) * C + part * SIDE
        tl.store(to[:, None] + side[None, :], quantized(turned, inverse), mask=there)
