"""Elementwise work around attention, one read and one write each: norm + RoPE, norm + modulation, gate + residual.

    norm_rope:          y = rotate(norm(x) * weight + bias)       pairs (2i, 2i + 1) of a head turn by their angle
    modulate:           y = layer_norm(x) * (1 + scale) + shift
    gate_residual:      y = x + gate * update
    residual_modulate:  both, one after the other; the norm is of the sum as it is rounded

Arithmetic is fp32; norm_rope rounds to x's dtype between norm and rotation, as separate modules do. What goes into a linear in
8 bits can leave as FP8 rows.
fp16, bf16 and fp32, sm80 and newer. They do not know whether attention is dense or sparse: both profit alike.
"""

import dataclasses

import torch

from .common import target
from .common.target import tl, triton
from .linears.int8_rows import quantize_int8_rows, quantize_int8_rows_reference, quantize_modulated
from .linears.rows import QuantizedRows, empty_rows, quantize_rows_reference, store_quantized

MAX_WIDTH = 16384


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    rms: bool,
    first: int = 0,
) -> torch.Tensor:
    """Normalise groups of channels, then rotate the video's tokens.

    Args:
        x: [B, S, G, W] fp16, bf16 or fp32, last two dims contiguous; each of the G groups is normalised by itself (Wan:
            one group of all heads; HunyuanVideo, CogVideoX: one a head).
        weight, bias: [W], or None.
        eps: added to the variance.
        cos, sin: fp32 [T, D], each frequency twice in a row; D divides W.
        rms: divide by the root mean square; else subtract the mean and divide by the standard deviation.
        first: tokens first ... first + T - 1 are rotated, the others normalised only.

    Returns:
        Contiguous [B, S, G, W] of x's dtype.

    Raises:
        ValueError: shapes disagree.
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, groups wider than 16384 or a gradient would be needed.

    Source: RMSNorm (arXiv 1910.07467), RoFormer (arXiv 2104.09864, section 3.4).
    """
    B, S, G, W = x.shape
    T, D = cos.shape
    if sin.shape != cos.shape or W % D or D % 2 or not 0 <= first <= first + T <= S:
        raise ValueError(
            f"cos and sin must be [T, D] with D dividing {W} and tokens {first} ... first + T within {S}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}: pass the video's angles"
        )
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != (W,):
            raise ValueError(f"{name} must be [{W}], got {tuple(p.shape)}: pass the norm's own")
    if not target.use_triton(x):
        return norm_rope_reference(x, weight, bias, eps, cos, sin, rms=rms, first=first)
    _check_triton("norm_rope", W, x)
    if x.stride(3) != 1 or (G > 1 and x.stride(2) != W):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with target.on_device(x):
        _norm_rope_kernel[(S, B)](
            x, weight, bias, cos.contiguous(), sin.contiguous(), out, eps, S, G, first, T, *x.stride()[:2],
            W=W, D=D, RMS=rms, BLOCK_G=triton.next_power_of_2(G), BLOCK_W=triton.next_power_of_2(W),
            num_warps=_warps(G * W),
        )  # fmt: skip
    return out


def norm_rope_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    rms: bool,
    first: int = 0,
) -> torch.Tensor:
    """Specification of `norm_rope` in plain torch; same arguments and result (fp64 stays fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not rms:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    wide = wide if weight is None else wide * weight
    wide = wide if bias is None else wide + bias
    out = wide.to(x.dtype).contiguous()
    T, D = cos.shape
    part = out[:, first : first + T]
    pairs = part.to(wide.dtype).unflatten(-1, (-1, D // 2, 2))  # [B, T, G, W / D, D / 2, 2]
    even, odd = pairs.unbind(-1)
    cos, sin = (angle[:, None, None, 0::2] for angle in (cos, sin))  # [T, 1, 1, D / 2]
    part.copy_(torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-3))
    return out


def modulate(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    *,
    affine: bool = False,
    fp8: bool = False,
    int8: bool = False,
) -> torch.Tensor | QuantizedRows:
    """Layer norm without parameters, then scale and shift given by the timestep.

    Args:
        x: [B, S, C] fp16, bf16 or fp32, last dim contiguous.
        scale, shift: [B, 1, C] or [B, S, C].
        eps: added to the variance.
        affine: scale is the whole factor, as a norm's own weight is, not what comes on top of 1.
        fp8: quantise the result instead of rounding it to x's dtype.
        int8: round it, rotate it and quantise it: see `svg.kernels.linears.quantize_int8_rows`.

    Returns:
        Contiguous [B, S, C] of x's dtype, layer_norm(x) * (1 + scale) + shift; with `fp8` or `int8` its quantised rows.

    Raises:
        ValueError: shapes disagree, or both `fp8` and `int8`.
        TypeError, NotImplementedError: as `norm_rope`; with `fp8` also as `quantize_rows`.

    Source: DiT (arXiv 2212.09748), section 3.2 (adaLN).
    """
    return residual_modulate(x, None, None, scale, shift, eps, affine=affine, fp8=fp8, int8=int8)[1]


def modulate_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    *,
    affine: bool = False,
    fp8: bool = False,
    int8: bool = False,
) -> torch.Tensor | QuantizedRows:
    """Specification of `modulate` in plain torch; same arguments and result (fp64 stays fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    factor = scale.to(wide.dtype) if affine else 1 + scale.to(wide.dtype)
    wide = wide * factor + shift.to(wide.dtype)
    if int8:
        return quantize_int8_rows_reference(wide.to(x.dtype))
    return dataclasses.replace(quantize_rows_reference(wide), dtype=x.dtype) if fp8 else wide.to(x.dtype)


def residual_modulate(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    *,
    affine: bool = False,
    fp8: bool = False,
    int8: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
    """`gate_residual`, then `modulate` of its result, in one pass.

    Args:
        x: [B, S, C] fp16, bf16 or fp32, last dim contiguous.
        update: [B, S, C], last dim contiguous, or None: nothing is added.
        gate: [B, 1, C] or [B, S, C], or None: the update counts whole.
        scale, shift, eps, affine, fp8, int8: as `modulate`.

    Returns:
        x + gate * update, contiguous [B, S, C] of x's dtype (x itself without an update), and what `modulate` makes of it.

    Raises:
        ValueError: shapes disagree, or a gate without an update.
        TypeError, NotImplementedError: as `modulate`.

    Source: DiT (arXiv 2212.09748), section 3.2 (adaLN-Zero).
    """
    _check_rows(x, scale=scale, shift=shift, **({} if gate is None else {"gate": gate}))
    if (update is None and gate is not None) or (update is not None and update.shape != x.shape):
        given = None if update is None else tuple(update.shape)
        raise ValueError(f"update must be {tuple(x.shape)} as x, got {given}: give it with its gate")
    if fp8 and int8:
        raise ValueError("one of fp8 and int8 must be given, got both: drop one")
    if not target.use_triton(x):
        return residual_modulate_reference(x, update, gate, scale, shift, eps, affine=affine, fp8=fp8, int8=int8)
    B, S, C = x.shape
    tensors = [x] if update is None else [x, update]
    _check_triton("modulate", C, *tensors)
    if fp8:
        target.require_fp8(x.device)
    total = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides = (
        *x.stride()[:2], *((0, 0) if update is None else update.stride()[:2]), *((0, 0) if gate is None else _row_strides(gate)),
        *_row_strides(scale), *_row_strides(shift),
    )  # fmt: skip
    if int8:
        rows = quantize_modulated(x, update, gate, total, scale, shift, eps, affine, strides)
        if rows is not None:
            return total, rows
        total, out = residual_modulate(x, update, gate, scale, shift, eps, affine=affine)
        return total, quantize_int8_rows(out)
    out, size = empty_rows(x) if fp8 else (torch.empty(x.shape, dtype=x.dtype, device=x.device), None)
    with target.on_device(x):
        _modulate_kernel[(S, B)](
            x, update, gate, total, scale, shift, out, size, eps, S, *strides, AFFINE=affine,
            C=C, BLOCK_C=triton.next_power_of_2(C), num_warps=_warps(C),
        )  # fmt: skip
    return total, QuantizedRows(out, size, x.dtype) if fp8 else out


def residual_modulate_reference(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    *,
    affine: bool = False,
    fp8: bool = False,
    int8: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | QuantizedRows]:
    """Specification of `residual_modulate` in plain torch; same arguments and result (fp64 stays fp64)."""
    total = x
    if update is not None:
        total = gate_residual_reference(x, update, torch.ones_like(x[:, :1]) if gate is None else gate)
    return total, modulate_reference(total, scale, shift, eps, affine=affine, fp8=fp8, int8=int8)


def gate_residual(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """A block's update, gated by the timestep, added to what went in.

    Args:
        x: [B, S, C] fp16, bf16 or fp32, last dim contiguous.
        update: [B, S, C], last dim contiguous.
        gate: [B, 1, C] or [B, S, C].

    Returns:
        Contiguous [B, S, C] of x's dtype: x + gate * update.

    Raises:
        ValueError: shapes disagree.
        TypeError, NotImplementedError: as `norm_rope`.

    Source: DiT (arXiv 2212.09748), section 3.2 (adaLN-Zero).
    """
    _check_rows(x, gate=gate)
    if update.shape != x.shape:
        raise ValueError(f"update must be {tuple(x.shape)} as x, got {tuple(update.shape)}")
    if not target.use_triton(x):
        return gate_residual_reference(x, update, gate)
    _check_triton("gate_residual", x.shape[-1], x, update)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    B, S, C = x.shape
    with target.on_device(x):
        _gate_kernel[(S, B)](
            x, update, gate, out, S, *x.stride()[:2], *update.stride()[:2], *_row_strides(gate),
            C=C, BLOCK_C=triton.next_power_of_2(C), num_warps=_warps(C),
        )  # fmt: skip
    return out


def gate_residual_reference(x: torch.Tensor, update: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Specification of `gate_residual` in plain torch; same arguments and result (fp64 stays fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + update.to(wide) * gate.to(wide)).to(x.dtype)


def _check_rows(x, **rows):
    for name, row in rows.items():
        if x.dim() != 3 or row.shape not in ((x.shape[0], 1, x.shape[2]), x.shape) or row.stride(-1) != 1:
            raise ValueError(
                f"{name} must be [B, 1, C] or [B, S, C] for x [B, S, C], last dim contiguous, "
                f"got {tuple(row.shape)} and {tuple(x.shape)}: keep the token dim"
            )


def _check_triton(op, width, *tensors):
    if width > MAX_WIDTH:
        raise NotImplementedError(f"{op} normalises at most {MAX_WIDTH} channels, got {width}: use plain modules")
    for x in tensors:
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"{op} takes fp16, bf16 or fp32, got {x.dtype}: convert it")
        if x.stride(-1) != 1:
            raise ValueError(f"{op} needs a contiguous last dim, got strides {x.stride()}: call .contiguous()")
    target.refuse_gradients(op, *tensors)


def _row_strides(row):
    """Strides over batch and tokens; one row for all tokens has none."""
    return row.stride(0), 0 if row.shape[1] == 1 else row.stride(1)


def _warps(channels: int) -> int:
    # 16 bytes a thread and load: memory-bound. Not measured.
    return min(16, max(1, triton.next_power_of_2(channels) // 512))


@triton.jit(do_not_specialize=["S", "first", "T", "eps"])
def _norm_rope_kernel(
    x, weight, bias, cos, sin, out, eps, S, G, first, T, stride_xb, stride_xs,
    W: tl.constexpr, D: tl.constexpr, RMS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group = tl.arange(0, BLOCK_G)[:, None]
    channel = tl.arange(0, BLOCK_W)[None, :]
    mask = (group < G) & (channel < W)  # [BG, BW]
    offs = group * W + channel
    y = tl.load(x + b * stride_xb + token * stride_xs + offs, mask=mask, other=0.0).to(tl.float32)
    if not RMS:
        y = tl.where(mask, y - (tl.sum(y, 1) / W)[:, None], 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 1) / W + eps)[:, None]
    if weight is not None:
        y = y * tl.load(weight + channel, mask=channel < W, other=0.0).to(tl.float32)
    if bias is not None:
        y = y + tl.load(bias + channel, mask=channel < W, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    angle = token - first
    if (angle >= 0) & (angle < T):
        pair = tl.arange(0, BLOCK_W // 2)
        place = angle * D + 2 * pair % D
        turning = pair < W // 2
        c = tl.load(cos + place, mask=turning, other=1.0)[None, :]  # [1, BW / 2]
        s = tl.load(sin + place, mask=turning, other=0.0)[None, :]
        even, odd = tl.split(tl.reshape(y.to(tl.float32), [BLOCK_G, BLOCK_W // 2, 2]))
        turned = tl.join(even * c - odd * s, even * s + odd * c)
        y = tl.reshape(turned, [BLOCK_G, BLOCK_W]).to(out.dtype.element_ty)
    tl.store(out + (b * S + token) * G * W + offs, y, mask=mask)


@triton.jit(do_not_specialize=["S", "eps"])
def _modulate_kernel(
    x, update, gate, total, scale, shift, out, out_scale, eps, S,
    stride_xb, stride_xs, stride_ub, stride_us, stride_gb, stride_gs, stride_cb, stride_cs, stride_hb, stride_hs,
    AFFINE: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = b * S + token
    offs = tl.arange(0, BLOCK_C)
    mask = offs < C
    y = tl.load(x + b * stride_xb + token * stride_xs + offs, mask=mask, other=0.0).to(tl.float32)
    if update is not None:
        u = tl.load(update + b * stride_ub + token * stride_us + offs, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            u = u * tl.load(gate + b * stride_gb + token * stride_gs + offs, mask=mask, other=0.0).to(tl.float32)
        added = (y + u).to(total.dtype.element_ty)
        tl.store(total + row * C + offs, added, mask=mask)
        y = added.to(tl.float32)
    y = tl.where(mask, y - tl.sum(y, 0) / C, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / C + eps)
    factor = tl.load(scale + b * stride_cb + token * stride_cs + offs, mask=mask, other=0.0).to(tl.float32)
    if not AFFINE:
        factor = 1 + factor
    y = y * factor + tl.load(shift + b * stride_hb + token * stride_hs + offs, mask=mask, other=0.0).to(tl.float32)
    if out_scale is not None:
        store_quantized(y, out, out_scale, row, offs, C)
    else:
        tl.store(out + row * C + offs, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S"])
def _gate_kernel(
    x, update, gate, out, S, stride_xb, stride_xs, stride_ub, stride_us, stride_gb, stride_gs,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK_C)
    mask = offs < C
    y = tl.load(x + b * stride_xb + token * stride_xs + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(update + b * stride_ub + token * stride_us + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + b * stride_gb + token * stride_gs + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (b * S + token) * C + offs, (y + u * g).to(out.dtype.element_ty), mask=mask)
