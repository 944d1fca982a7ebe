"""What stands between the two linears of a feed-forward, in one pass: activation, then rows in 8 bits for the second linear.

    gelu_tanh, gelu:  y = gelu(x)                    with its tanh approximation, or exact
    geglu, swiglu:    y = x[first half] * act(x[second half])          act: exact GELU, SiLU

Other columns may stand before y, as in blocks whose attention and feed-forward share their last linear: they are copied, or
quantised, with it. Arithmetic is fp32.
"""

import dataclasses

import torch
import torch.nn.functional as F

from .common import target
from .common.activation import HALVED, KINDS, activation
from .common.target import tl, triton
from .linears.int8_rows import quantize_activated, quantize_int8_rows, quantize_int8_rows_reference
from .linears.rows import MAX_WIDTH, QuantizedRows, empty_rows, quantize_rows_reference, store_quantized, warps


def activate(
    x: torch.Tensor, kind: str, *, before: torch.Tensor | None = None, fp8: bool = False, int8: bool = False
) -> torch.Tensor | QuantizedRows:
    """Activation of a feed-forward.

    Args:
        x: [B, S, W] fp16, bf16 or fp32, last dim contiguous; for "geglu" and "swiglu" W is twice the result's.
        kind: one of KINDS.
        before: [B, S, C] of x's dtype, last dim contiguous, columns to stand before the result; or None.
        fp8: quantise the rows instead of rounding them to x's dtype.
        int8: round them, rotate them and quantise them: see `svg.kernels.linears.quantize_int8_rows`.

    Returns:
        Contiguous [B, S, C + W] (C + W / 2) of x's dtype; with `fp8` or `int8` its quantised rows.

    Raises:
        ValueError: an unknown kind, shapes disagree, or both `fp8` and `int8`.
        TypeError: `before` has another dtype.
        NotImplementedError: on the Triton path, rows wider than 32768, or a gradient would be needed.

    Source: GELU (arXiv 1606.08415), GLU variants (arXiv 2002.05202).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    width = x.shape[-1]
    if x.dim() != 3 or (kind in HALVED and width % 2) or (before is not None and before.shape[:2] != x.shape[:2]):
        given = None if before is None else tuple(before.shape)
        raise ValueError(f"x must be [B, S, W], W even for {kind}, and before [B, S, C], got {tuple(x.shape)}, {given}")
    if fp8 and int8:
        raise ValueError("one of fp8 and int8 must be given, got both: drop one")
    if before is not None and before.dtype != x.dtype:
        raise TypeError(f"before must have x's dtype {x.dtype}, got {before.dtype}: convert it")
    if not target.use_triton(x):
        return activate_reference(x, kind, before=before, fp8=fp8, int8=int8)
    if int8:
        rows = quantize_activated(x, kind, before)
        return quantize_int8_rows(activate(x, kind, before=before)) if rows is None else rows
    tensors = [x] if before is None else [x, before]
    target.refuse_gradients("activate", *tensors)
    if fp8:
        target.require_fp8(x.device)
    B, S, _ = x.shape
    width, first = width // 2 if kind in HALVED else width, 0 if before is None else before.shape[-1]
    columns = first + width
    if columns > MAX_WIDTH:
        raise NotImplementedError(f"activate takes rows of at most {MAX_WIDTH} numbers, got {columns}: use torch's")
    x, before = (None if one is None else one if one.stride(-1) == 1 else one.contiguous() for one in (x, before))
    out = torch.empty(B, S, columns, dtype=x.dtype, device=x.device)
    out, size = empty_rows(out) if fp8 else (out, None)
    with target.on_device(x):
        _activate_kernel[(S, B)](
            x, before, out, size, S, *x.stride()[:2], *((0, 0) if before is None else before.stride()[:2]),
            KIND=kind, FIRST=first, W=width, BLOCK=triton.next_power_of_2(columns), num_warps=warps(columns),
        )  # fmt: skip
    return QuantizedRows(out, size, x.dtype) if fp8 else out


def activate_reference(
    x: torch.Tensor, kind: str, *, before: torch.Tensor | None = None, fp8: bool = False, int8: bool = False
) -> torch.Tensor | QuantizedRows:
    """Specification of `activate` in plain torch; same arguments and result (fp64 stays fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind in HALVED:
        value, gate = wide.chunk(2, -1)
        wide = value * (F.gelu(gate) if kind == "geglu" else F.silu(gate))
    else:
        wide = F.gelu(wide, approximate="tanh" if kind == "gelu_tanh" else "none")
    if before is not None:
        wide = torch.cat([before.to(wide.dtype), wide], -1)
    if int8:
        return quantize_int8_rows_reference(wide.to(x.dtype))
    return dataclasses.replace(quantize_rows_reference(wide), dtype=x.dtype) if fp8 else wide.to(x.dtype)


@triton.jit(do_not_specialize=["S"])
def _activate_kernel(
    x, before, out, out_scale, S, stride_xb, stride_xs, stride_bb, stride_bs,
    KIND: tl.constexpr, FIRST: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, columns = b * S + token, FIRST + W
    offs = tl.arange(0, BLOCK)
    own = (offs >= FIRST) & (offs < columns)
    place = x + b * stride_xb + token * stride_xs + offs - FIRST
    y = tl.load(place, mask=own, other=0.0).to(tl.float32)
    if (KIND == "geglu") | (KIND == "swiglu"):
        y = y * activation(tl.load(place + W, mask=own, other=0.0).to(tl.float32), KIND)
    else:
        y = activation(y, KIND)
    if before is not None:
        copied = tl.load(before + b * stride_bb + token * stride_bs + offs, mask=offs < FIRST, other=0.0)
        y = tl.where(offs < FIRST, copied.to(tl.float32), y)
    if out_scale is not None:
        store_quantized(y, out, out_scale, row, offs, columns)
    else:
        tl.store(out + row * columns + offs, y.to(out.dtype.element_ty), mask=offs < columns)
