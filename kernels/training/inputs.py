"""Inputs of 8-bit training attention: sequences packed into blocks of 128 tokens, quantised to INT8, and turned.

All sequences of a batch, or of a packed (varlen) row, lie one after the other in [heads, T, Dp]; each begins at a
multiple of 128 tokens and is padded with zeros to the next, so that no tile holds two sequences, and tensor memory
descriptors see aligned rows. Head dims are padded to 64 or 128.

    q ~ q_scale_i q8            k - k_mean ~ k_scale_j k8          v - v_mean ~ v_scale_d v8       grad ~ g_scale_i g8

An all-zero row has scale 1 / 127. What one product sums over cannot keep its own scale, so the scales of tokens move to
the other operand: those of K, Q and the gradient of the output to dS and P, which are quantised afterwards.

8-bit matrix instructions want the summed dimension innermost: `turned` copies are [heads, Dp, T], with the tokens of
every 16 in the order in which a thread holds a row of scores (`operand_order`): P then needs no shuffle.
"""

from dataclasses import dataclass

import torch

from ..common import target
from ..common.launch import LaunchTable
from ..common.numbers import INT8_MAX, INT_AS_FLOAT, SMALLEST, TINY, base2
from ..common.target import tl, triton
from ..quantize.channels import Statistics
from ..quantize.tokens import absmax_of_rows, padded_head_dim
from . import forward_hopper as training_hopper
from .sequences import Sequences, operand_order, pack


@dataclass(frozen=True)
class SavedForBackward:
    """What the backward needs of the forward besides its output.

    Args:
        queries: int8 [H, T, Dp], packed as this module says.
        q_scale: fp32 [H, T].
        keys: int8 [Hkv, Tk, Dp].
        k_scale: fp32 [Hkv, Tk].
        values: bf16 [Hkv, Tk, Dp].
        v_mean: fp32 [B, Hkv, D].
        lse: fp32 [H, T], base 2; infinity where a row is padding or sees no key.
    """

    queries: torch.Tensor
    q_scale: torch.Tensor
    keys: torch.Tensor
    k_scale: torch.Tensor
    values: torch.Tensor
    v_mean: torch.Tensor
    lse: torch.Tensor


def empty_gradients(
    out: torch.Tensor, kv_heads: int, key_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for dq, dk and dv; where tokens come before heads in `out`, they do so in all."""
    B, _, _, D = out.shape
    if out.stride(1) < out.stride(2):
        dk, dv = (out.new_empty(B, key_tokens, kv_heads, D).transpose(1, 2) for _ in range(2))
    else:
        dk, dv = (out.new_empty(B, kv_heads, key_tokens, D) for _ in range(2))
    return torch.empty_like(out), dk, dv


@dataclass(frozen=True)
class PackedKeys:
    """Keys and values as forward and backward read them.

    Args:
        values8: int8 [Hkv, Dp, T], V without its mean, turned; its scale is per channel. None: the forward reads `wide`.
        keys: int8 [Hkv, T, Dp], K without its mean.
        scale: fp32 [Hkv, T], of the keys.
        values: bf16 [Hkv, T, Dp], V without its mean, times the key's scale.
        wide: bf16 [Hkv, T, Dp], V without its mean, for a forward with P V in 16 bits (forward_hopper.py); else None.
        offset: fp32 [B, Hkv, D], with `wide`: V's mean less that of `wide`. bf16 V less a small number rounds to itself, so
            errors have a mean, which would grow beside an output that shrinks with the number of keys.
    """

    values8: torch.Tensor | None
    keys: torch.Tensor
    scale: torch.Tensor
    values: torch.Tensor
    wide: torch.Tensor | None = None
    offset: torch.Tensor | None = None


@dataclass(frozen=True)
class PackedGradients:
    """The gradient of the output as the backward reads it.

    Args:
        turned: int8 [H, Dp, T]; None for products in bf16.
        values: bf16 [H, T, Dp], divided by scale, and for INT8 products times q_scale.
        scale: fp32 [H, T].
        delta: fp32 [H, T], sum over channels of values * (out - v_mean).
        lse: fp32 [H, T], the forward's less log2 scale.
        queries: bf16 [H, T, Dp], the packed queries times q_scale; None for INT8 products.
    """

    turned: torch.Tensor | None
    values: torch.Tensor
    scale: torch.Tensor
    delta: torch.Tensor
    lse: torch.Tensor
    queries: torch.Tensor | None = None


def channel_scale(stats: Statistics) -> torch.Tensor:
    """INT8 scale of every channel of V less its mean, fp32 [B, Hkv, D]; NaN where it has NaN or infinity."""
    largest = torch.maximum(stats.v_high - stats.v_mean, stats.v_mean - stats.v_low)
    largest = torch.where(largest <= SMALLEST, 1.0, largest)
    return torch.where(stats.v_mean.isfinite() & largest.isfinite(), largest / 127, torch.nan)


def pack_queries(q: torch.Tensor, layout: Sequences, sm_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 queries, one scale a token.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        layout: from `sequences`.
        sm_scale: softmax scale, which goes into the scales, as log2 e does.

    Returns:
        int8 [H, T, Dp], and q_scale fp32 [H, T].
    """
    return (_pack_queries if target.use_triton(q) else pack_queries_reference)(q, layout, sm_scale)


def pack_queries_reference(q: torch.Tensor, layout: Sequences, sm_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of `pack_queries` in plain torch; same arguments and result."""
    values, scale = _quantized_rows(pack(q, layout))
    return values, scale * base2(sm_scale)


def pack_keys(
    k: torch.Tensor, v: torch.Tensor, stats: Statistics, layout: Sequences, wide: bool | None = None
) -> PackedKeys:
    """INT8 keys, and values for the forward and for the backward.

    Args:
        k, v: [B, Hkv, Sk, D] fp16, bf16 or fp32, last dim contiguous.
        stats: theirs.
        layout: from `sequences`.
        wide: whether the forward reads values in 16 bits, not 8; None: as the device's does.

    Returns:
        The packed keys.
    """
    if wide is None:
        wide = target.use_triton(k) and training_hopper.supports(k.device)
    return (_pack_keys if target.use_triton(k) else pack_keys_reference)(k, v, stats, layout, wide)


def pack_keys_reference(
    k: torch.Tensor, v: torch.Tensor, stats: Statistics, layout: Sequences, wide: bool = False
) -> PackedKeys:
    """Specification of `pack_keys` in plain torch; same arguments and result."""
    keys, scale = _quantized_rows(pack(k.float() - stats.k_mean[:, :, None], layout))
    centred = v.float() - stats.v_mean[:, :, None]
    values = (pack(centred, layout) * scale[..., None]).bfloat16()
    if wide:
        offset = stats.v_mean + (centred - centred.bfloat16().float()).mean(2)
        return PackedKeys(None, keys, scale, values, pack(centred, layout).bfloat16(), offset)
    steps = pack(centred / channel_scale(stats)[:, :, None], layout).round().nan_to_num(0).to(torch.int8)
    return PackedKeys(turn_reference(steps), keys, scale, values)


def pack_gradients(
    grad: torch.Tensor,
    out: torch.Tensor,
    v_mean: torch.Tensor,
    queries: torch.Tensor,
    q_scale: torch.Tensor,
    lse: torch.Tensor,
    layout: Sequences,
    wide: bool,
) -> PackedGradients:
    """The gradient of the output in INT8 and 16 bits, with what the backward needs of each query.

    Args:
        grad, out: [B, H, S, D], last dim contiguous.
        v_mean: fp32 [B, Hkv, D].
        queries, q_scale: from `pack_queries`.
        lse: fp32 [H, T], base 2.
        layout: of the queries.
        wide: whether dS K, dS^T Q and P^T grad are in bf16.

    Returns:
        The packed gradients.
    """
    op = _pack_gradients if target.use_triton(grad) else pack_gradients_reference
    return op(grad, out, v_mean, queries, q_scale, lse, layout, wide)


def pack_gradients_reference(
    grad: torch.Tensor,
    out: torch.Tensor,
    v_mean: torch.Tensor,
    queries: torch.Tensor,
    q_scale: torch.Tensor,
    lse: torch.Tensor,
    layout: Sequences,
    wide: bool,
) -> PackedGradients:
    """Specification of `pack_gradients` in plain torch; same arguments and result."""
    rows = pack(grad, layout)
    steps, scale = _quantized_rows(rows)
    values = (rows * ((1 if wide else q_scale) / scale)[..., None]).bfloat16()
    mean = v_mean.repeat_interleave(out.shape[1] // v_mean.shape[1], 1)[:, :, None]
    delta = (values.float() * pack(out.float() - mean, layout)).sum(-1)
    shifted = lse - scale.log2()
    if wide:
        return PackedGradients(None, values, scale, delta, shifted, (queries * q_scale[..., None]).bfloat16())
    return PackedGradients(turn_reference(steps), values, scale, delta, shifted)


def turn(x: torch.Tensor) -> torch.Tensor:
    """The turned copy of packed INT8 tokens.

    Args:
        x: int8 [H, T, Dp], contiguous.

    Returns:
        int8 [H, Dp, T], tokens in `operand_order`.
    """
    return _turn(x) if target.use_triton(x) else turn_reference(x)


def turn_reference(x: torch.Tensor) -> torch.Tensor:
    """Specification of `turn` in plain torch; same arguments and result."""
    return x[:, operand_order(x.shape[1], x.device)].transpose(1, 2).contiguous()


def _quantized_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = rows.abs().amax(-1)
    largest = torch.where(largest <= SMALLEST, 1.0, largest)
    # A tensor over a tensor: torch turns a number over a tensor into a reciprocal, rounded twice.
    inverse = torch.full_like(largest, 127.0) / largest
    values = (rows * inverse[..., None]).round().nan_to_num(0).to(torch.int8)
    return values, torch.where(largest.isfinite(), largest / 127, torch.nan)


LAUNCH = LaunchTable({80: 8, 89: 8, 90: 8, 100: 8, 120: 8})  # arch -> warps of a program
ROWS = 64  # that a program quantises


def _pack_queries(q, layout, sm_scale):
    H, D = q.shape[1], q.shape[3]
    block_d = padded_head_dim(D)
    values = torch.empty(H, layout.tokens, block_d, dtype=torch.int8, device=q.device)
    scale = torch.empty(H, layout.tokens, dtype=torch.float32, device=q.device)
    with target.on_device(q):
        _pack_queries_kernel[(layout.tokens // ROWS, H)](
            q, layout.owner, layout.table, values, scale, base2(sm_scale), layout.tokens, *q.stride()[:3],
            D=D, BLOCK_D=block_d, ROWS=ROWS, num_warps=LAUNCH.row(q.device),
        )  # fmt: skip
    return values, scale


def _pack_keys(k, v, stats, layout, wide):
    H, D = k.shape[1], k.shape[3]
    block_d, T = padded_head_dim(D), layout.tokens
    shape, dtype = ((H, T, block_d), torch.bfloat16) if wide else ((H, block_d, T), torch.int8)
    first = torch.empty(shape, dtype=dtype, device=k.device)
    keys = torch.empty(H, T, block_d, dtype=torch.int8, device=k.device)
    scale = torch.empty(H, T, dtype=torch.float32, device=k.device)
    values = torch.empty(H, T, block_d, dtype=torch.bfloat16, device=k.device)
    rest = torch.empty(H, T // ROWS, block_d, dtype=torch.float32, device=k.device) if wide else None
    with target.on_device(k):
        _pack_keys_kernel[(T // ROWS, H)](
            k, v, stats.k_mean, stats.v_mean, channel_scale(stats), layout.owner, layout.table,
            first, keys, scale, values, rest, H, T, *k.stride()[:3], *v.stride()[:3],
            D=D, BLOCK_D=block_d, ROWS=ROWS, WIDE=wide, num_warps=LAUNCH.row(k.device),
        )  # fmt: skip
    if not wide:
        return PackedKeys(first, keys, scale, values)
    rest = rest.unflatten(1, (k.shape[0], -1)).sum(2).transpose(0, 1)[..., :D]
    return PackedKeys(None, keys, scale, values, first, stats.v_mean + rest / k.shape[2])


def _pack_gradients(grad, out, v_mean, queries, q_scale, lse, layout, wide):
    H, D = out.shape[1], out.shape[3]
    block_d, T = padded_head_dim(D), layout.tokens
    shape, dtype = ((H, T, block_d), torch.bfloat16) if wide else ((H, block_d, T), torch.int8)
    second = torch.empty(shape, dtype=dtype, device=out.device)
    values = torch.empty(H, T, block_d, dtype=torch.bfloat16, device=out.device)
    scale, delta, shifted = (torch.empty_like(lse) for _ in range(3))
    with target.on_device(out):
        _pack_gradients_kernel[(T // ROWS, H)](
            grad, out, v_mean, queries, q_scale, lse, layout.owner, layout.table, second, values, scale, delta, shifted,
            v_mean.shape[1], H // v_mean.shape[1], T, *grad.stride()[:3], *out.stride()[:3],
            D=D, BLOCK_D=block_d, ROWS=ROWS, WIDE=wide, num_warps=LAUNCH.row(out.device),
        )  # fmt: skip
    return PackedGradients(None if wide else second, values, scale, delta, shifted, second if wide else None)


def _turn(x):
    H, T, block_d = x.shape
    turned = torch.empty(H, block_d, T, dtype=torch.int8, device=x.device)
    with target.on_device(x):
        _turn_kernel[(T // ROWS, H)](x, turned, T, BLOCK_D=block_d, ROWS=ROWS, num_warps=LAUNCH.row(x.device))
    return turned


@triton.jit
def in_operand_order(place):
    """`operand_order` of places."""
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


@triton.jit
def whole(x):
    """The integers nearest to fp32 of at most 127 in size, as int8."""
    # 1.5 * 2^23 leaves no fraction bits, and the low byte is the integer: no conversion, which would be slower.
    return (x + INT_AS_FLOAT).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _rows(x, row, inside, stride, offs_d, D: tl.constexpr):
    """Rows of x in fp32, zeros outside: [ROWS, BD]."""
    mask = inside[:, None] & (offs_d < D)[None, :]
    return tl.load(x + row[:, None] * stride + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _quantized(rows):
    """INT8 rows, and their scales; a row with NaN or infinity has scale NaN."""
    largest = absmax_of_rows(rows)
    largest = tl.where(largest > TINY, largest, 1.0)
    full = tl.full(largest.shape, INT8_MAX, dtype=tl.float32)
    finite = largest < float("inf")
    values = whole(tl.where(finite[:, None], rows * tl.div_rn(full, largest)[:, None], 0.0))
    return values, tl.where(finite, tl.div_rn(largest, full), float("nan"))


@triton.jit
def _sequence(owner, table, offs):
    """The sequence of this program's rows: batch, and of each row the token and whether it exists."""
    ROWS: tl.constexpr = offs.shape[0]
    n = tl.load(owner + tl.program_id(0) * ROWS // 128)
    batch, first = tl.load(table + n * 4, mask=n >= 0, other=0), tl.load(table + n * 4 + 1, mask=n >= 0, other=0)
    length, start = tl.load(table + n * 4 + 2, mask=n >= 0, other=0), tl.load(table + n * 4 + 3, mask=n >= 0, other=0)
    position = tl.program_id(0) * ROWS - start + offs
    return batch.to(tl.int64), (first + position).to(tl.int64), (position < length) & (n >= 0)


@triton.jit(do_not_specialize=["T"])
def _pack_queries_kernel(
    x, owner, table, values, scale, factor, T, stride_b, stride_h, stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    offs, offs_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    batch, token, inside = _sequence(owner, table, offs)
    rows, size = _quantized(_rows(x + batch * stride_b + h * stride_h, token, inside, stride_s, offs_d, D))
    goal = h * T + tl.program_id(0) * ROWS + offs
    tl.store(values + goal[:, None] * BLOCK_D + offs_d[None, :], rows)
    tl.store(scale + goal, size * factor)


@triton.jit(do_not_specialize=["T"])
def _pack_keys_kernel(
    k, v, k_mean, v_mean, v_scale, owner, table, forward, keys, scale, values, rest, H, T,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    place, offs_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    offs = in_operand_order(place)
    batch, token, inside = _sequence(owner, table, offs)
    channel = (batch * H + h) * D + offs_d
    real = offs_d < D
    rows = _rows(k + batch * stride_kb + h * stride_kh, token, inside, stride_ks, offs_d, D)
    rows = tl.where(inside[:, None], rows - tl.load(k_mean + channel, mask=real, other=0.0)[None, :], 0.0)
    keys8, size = _quantized(rows)
    goal = h * T + tl.program_id(0) * ROWS + offs
    tl.store(keys + goal[:, None] * BLOCK_D + offs_d[None, :], keys8)
    tl.store(scale + goal, size)
    rows = _rows(v + batch * stride_vb + h * stride_vh, token, inside, stride_vs, offs_d, D)
    rows = tl.where(inside[:, None], rows - tl.load(v_mean + channel, mask=real, other=0.0)[None, :], 0.0)
    tl.store(values + goal[:, None] * BLOCK_D + offs_d[None, :], (rows * size[:, None]).to(tl.bfloat16))
    if WIDE:
        wide = rows.to(tl.bfloat16)
        tl.store(forward + goal[:, None] * BLOCK_D + offs_d[None, :], wide)
        part = h * (T // ROWS) + tl.program_id(0)
        tl.store(rest + part * BLOCK_D + offs_d, tl.sum(rows - wide.to(tl.float32), 0))
    else:
        step = tl.broadcast_to(tl.load(v_scale + channel, mask=real, other=1.0)[None, :], rows.shape)
        steps = tl.div_rn(rows, step)
        steps = whole(tl.where(tl.abs(steps) < 128, steps, 0.0))
        goal = (h * BLOCK_D + offs_d)[:, None] * T + (tl.program_id(0) * ROWS + place)[None, :]
        tl.store(forward + goal, tl.trans(steps))


@triton.jit(do_not_specialize=["T"])
def _pack_gradients_kernel(
    grad, out, v_mean, queries, q_scale, lse, owner, table, second, values, scale, delta, shifted, KV_HEADS, HEADS_PER_KEY, T,
    stride_gb, stride_gh, stride_gs, stride_ob, stride_oh, stride_os,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    place, offs_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    offs = in_operand_order(place)
    batch, token, inside = _sequence(owner, table, offs)
    rows = _rows(grad + batch * stride_gb + h * stride_gh, token, inside, stride_gs, offs_d, D)
    steps, size = _quantized(rows)
    goal = h * T + tl.program_id(0) * ROWS + offs
    all_of_them = goal[:, None] * BLOCK_D + offs_d[None, :]
    factor = tl.load(q_scale + goal)
    if WIDE:
        tl.store(second + all_of_them, (tl.load(queries + all_of_them) * factor[:, None]).to(tl.bfloat16))
        factor = tl.full(factor.shape, 1.0, dtype=tl.float32)
    else:
        turned = (h * BLOCK_D + offs_d)[:, None] * T + (tl.program_id(0) * ROWS + place)[None, :]
        tl.store(second + turned, tl.trans(steps))
    rows = (rows * (factor / size)[:, None]).to(tl.bfloat16)
    tl.store(values + all_of_them, rows)
    channel = (batch * KV_HEADS + h // HEADS_PER_KEY) * D + offs_d
    mean = tl.load(v_mean + channel, mask=offs_d < D, other=0.0)
    seen = _rows(out + batch * stride_ob + h * stride_oh, token, inside, stride_os, offs_d, D) - mean[None, :]
    tl.store(delta + goal, tl.sum(rows.to(tl.float32) * seen, 1))
    tl.store(scale + goal, size)
    tl.store(shifted + goal, tl.load(lse + goal) - tl.log2(size))


@triton.jit(do_not_specialize=["T"])
def _turn_kernel(x, turned, T, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    h = tl.program_id(1).to(tl.int64)
    place, offs_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    rows = tl.load(x + (h * T + in_operand_order(place))[:, None] * BLOCK_D + offs_d[None, :])
    tl.store(turned + (h * BLOCK_D + offs_d)[:, None] * T + place[None, :], tl.trans(rows))
