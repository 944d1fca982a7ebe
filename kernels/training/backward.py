"""The backward of forward.py: all products in INT8 but dP = grad V^T, which stays in 16 bits.

With products="bf16", dS K, dS^T Q and P^T grad are in bf16 too, and only Q K^T is in INT8: where a GPU spends more time on
rounding P and dS than 8-bit products save, that is both faster and more accurate. Hopper is such a GPU: its kernels
(backward_hopper.py) sum in bf16 whatever is asked for.

    P = 2^(S - lse)      dP = grad V^T      delta_i = grad_i . out_i      dS = P (dP - delta)
    dV = P^T grad        dQ = sm_scale dS K         dK = sm_scale dS^T Q

A row of a tile of P or dS, as it enters a product, has its own INT8 scale. The scales of the tokens that a product sums
over enter P and dS beforehand, without a multiplication of their own where they come with the 16-bit operands:

    grad16_i = grad_i q_scale_i / g_scale_i       v16_j = v_j k_scale_j       lse'_i = lse_i - log2 g_scale_i

so that 2^(S - lse') = P g_scale, and P (grad16 v16^T - delta16 k_scale) = dS q_scale / g_scale k_scale. Products in bf16
need no q_scale in grad16.

Queries have a kernel, keys and values another, so that sums have one order: no atomics, the same bits in every run. Both
compute S and dP again. The one for keys can also run twice, once for dK and once for dV, where both sums at once would
not fit the registers. Heads that share a key head are summed one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..common import target
from ..common.launch import Launch, LaunchTable
from ..common.numbers import INT8_MAX, LN_2
from ..common.target import tl, triton
from . import backward_hopper as training_backward_hopper
from . import forward_hopper as training_hopper
from .forward import larger, operand, options, tile
from .inputs import PackedGradients, SavedForBackward, empty_gradients, pack_gradients, turn, whole
from .sequences import Sequences, layouts


def packed_gradients(
    grad: torch.Tensor, out: torch.Tensor, kept: SavedForBackward, rows: Sequences, products: str
) -> PackedGradients:
    """`pack_gradients` for what the forward kept; Hopper's kernels sum in bf16 whatever is asked for."""
    wide = products == "bf16" or _specialised(launch_of(kept, products).query, out.device)
    return pack_gradients(grad, out, kept.v_mean, kept.queries, kept.q_scale, kept.lse, rows, wide)


def launch_of(kept: SavedForBackward, products: str) -> "BackwardLaunch":
    """The launches for what the forward kept, on its device."""
    return LAUNCH.row(kept.queries.device, products, kept.queries.shape[2])


def _specialised(row: Launch, device: torch.device) -> bool:
    return row.specialised and training_hopper.supports(device)


@dataclass(frozen=True)
class BackwardLaunch:
    """Launches of the backward: of dQ, of dK, and of dV, or of dK and dV in one where that is None."""

    query: Launch
    key: Launch
    value: Launch | None


def query_candidates(products: str) -> Iterator[Launch]:
    """Rows of dQ worth timing; in INT8 more keys in a tile cost accuracy, because they share a scale."""
    for m, n, warps, stages in ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2), (128, 128, 8, 2)):
        yield Launch(m, n, warps, stages, tma=True)
    if products == "int8":
        yield Launch(128, 64, 8, 3)


def key_candidates(products: str) -> Iterator[tuple[Launch, Launch | None]]:
    """Rows of dK and dV worth timing, both in one or apart; in INT8 more queries in a tile cost accuracy."""
    yield Launch(64, 128, 8, 2, tma=True), None
    yield Launch(64, 128, 8, 3, tma=True), None
    yield Launch(64, 64, 4, 2, tma=True), None
    value = Launch(64, 128, 8, 2, tma=True)
    for m, n, warps, stages in ((64, 128, 8, 2), (64, 128, 8, 3), (128, 128, 8, 2)):
        yield Launch(m, n, warps, stages, tma=True), value
    key = Launch(64, 128, 8, 2, tma=True)
    yield key, Launch(128, 128, 8, 2, tma=True)
    if products == "int8":
        yield Launch(128, 128, 8, 1, tma=True), value
        yield key, Launch(64, 128, 8, 3, tma=True)
        yield key, Launch(64, 64, 4, 3, tma=True)
        yield key, Launch(64, 128, 8, 3, tma=True, registers=128)


# arch -> products, padded head dim -> launches.
_NARROW = BackwardLaunch(Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2))
_NARROW_TMA = BackwardLaunch(Launch(64, 64, 4, 2, tma=True), Launch(64, 64, 4, 2, tma=True), None)
_WIDE = BackwardLaunch(Launch(64, 64, 8, 2), Launch(64, 128, 8, 2), Launch(64, 128, 8, 2))
_HOPPER = BackwardLaunch(
    Launch(128, 64, 8, 3, tma=True, specialised=True), Launch(64, 128, 8, 2, tma=True, specialised=True), None
)
_APART = BackwardLaunch(_HOPPER.query, _HOPPER.key, Launch(64, 128, 8, 2, tma=True))
LAUNCH = LaunchTable(
    {
        80: {("int8", 64): _NARROW, ("int8", 128): _WIDE, ("bf16", 64): _NARROW, ("bf16", 128): _WIDE},
        89: {("int8", 64): _NARROW, ("int8", 128): _WIDE, ("bf16", 64): _NARROW, ("bf16", 128): _WIDE},
        90: {("int8", 64): _HOPPER, ("int8", 128): _APART, ("bf16", 64): _HOPPER, ("bf16", 128): _HOPPER},
        100: {
            ("int8", 64): _NARROW_TMA,
            ("int8", 128): BackwardLaunch(Launch(128, 64, 8, 2, tma=True), _APART.value, _APART.value),
            ("bf16", 64): _NARROW_TMA,
            ("bf16", 128): BackwardLaunch(Launch(128, 64, 8, 2, tma=True), _APART.value, _APART.value),
        },
        120: {
            ("int8", 64): _NARROW_TMA,
            ("int8", 128): BackwardLaunch(Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 128, 8, 2, tma=True)),
            ("bf16", 64): _NARROW,
            ("bf16", 128): BackwardLaunch(Launch(64, 64, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
        },
    },
    measured=[90],
)


def launch(grad, out, kept, *, key_tokens, is_causal, sm_scale, cu_seqlens_q, cu_seqlens_k, products):
    dq, dk, dv = empty_gradients(out, kept.keys.shape[0], key_tokens)
    rows, columns = layouts(out, dk, cu_seqlens_q, cu_seqlens_k)
    packed = packed_gradients(grad, out, kept, rows, products)
    chosen = launch_of(kept, products)
    query_gradient(chosen.query, dq, kept, packed, rows, columns, is_causal, sm_scale, products)
    key_gradients(chosen, dk, dv, kept, packed, rows, columns, is_causal, products)
    return dq, dk, dv


def query_gradient(
    row: Launch,
    dq: torch.Tensor,
    kept: SavedForBackward,
    packed: PackedGradients,
    rows: Sequences,
    columns: Sequences,
    is_causal: bool,
    sm_scale: float,
    products: str,
) -> None:
    """Writes dq.

    Args:
        row: the launch.
        dq: [B, H, S, D], written.
        kept: from the forward.
        packed: from `pack_gradients`.
        rows, columns: from `layouts`.
        is_causal, sm_scale: the forward's.
        products: as in `training_attention_backward`.
    """
    if _specialised(row, dq.device):
        training_backward_hopper.query_gradient(dq, kept, packed, rows, columns, is_causal, sm_scale)
        return
    H, T, block_d = kept.queries.shape
    int8 = products == "int8"
    with target.on_device(dq):
        _query_gradient_kernel[(T // row.block_m, H)](
            row.source(kept.queries, row.block_m, block_d), row.source(packed.values, row.block_m, block_d),
            row.source(kept.keys, row.block_n, block_d), row.source(kept.values, row.block_n, block_d),
            row.source(turn(kept.keys), block_d, row.block_n) if int8 else row.source(kept.keys.bfloat16(), row.block_n, block_d),
            kept.q_scale, packed.scale, kept.lse, packed.delta, kept.k_scale, rows.owner, rows.table, columns.table, dq,
            sm_scale, H // kept.keys.shape[0], T, columns.tokens, *dq.stride()[:3],
            D=dq.shape[3], BLOCK_D=block_d, CAUSAL=is_causal, INT8=int8, **options(row),
        )  # fmt: skip


def key_gradients(
    launch: BackwardLaunch,
    dk: torch.Tensor,
    dv: torch.Tensor,
    kept: SavedForBackward,
    packed: PackedGradients,
    rows: Sequences,
    columns: Sequences,
    is_causal: bool,
    products: str,
) -> None:
    """Writes dk and dv; arguments as in `query_gradient`."""
    if _specialised(launch.key, dk.device):
        training_backward_hopper.key_gradients(dk, dv, kept, packed, rows, columns, is_causal)
        return
    H, T, block_d = kept.queries.shape
    int8 = products == "int8"
    other = turn(kept.queries) if int8 else packed.queries
    # A maximum skips NaN, so single tokens that are not finite are told apart.
    broken = packed.delta.isnan().any(1).to(torch.float32)
    # The loop over heads that share keys takes registers that both sums at once don't leave.
    value = launch.value or (launch.key if H > kept.keys.shape[0] else None)
    for row, with_k, with_v in ((launch.key, True, value is None), (value, False, True)):
        if row is None:
            continue
        with target.on_device(dk):
            _key_gradient_kernel[(columns.tokens // row.block_n, kept.keys.shape[0])](
                row.source(kept.queries, row.block_m, block_d), row.source(packed.values, row.block_m, block_d),
                row.source(other, block_d, row.block_m) if int8 else row.source(other, row.block_m, block_d),
                row.source(packed.turned, block_d, row.block_m) if int8 else None,
                row.source(kept.keys, row.block_n, block_d), row.source(kept.values, row.block_n, block_d),
                kept.q_scale, packed.lse, packed.delta, kept.k_scale, broken, columns.owner, columns.table, rows.table,
                dk, dv,
                H // kept.keys.shape[0], T, columns.tokens, *dk.stride()[:3],
                D=dk.shape[3], BLOCK_D=block_d, CAUSAL=is_causal, INT8=int8,
                WITH_K=with_k, WITH_V=with_v, **options(row),
            )  # fmt: skip


@triton.jit
def _in_8_bits(x):
    """A tile of INT8 for a product, one scale a row, and those scales."""
    scale = larger(tl.max(tl.abs(x), 1), 1e-36) / INT8_MAX
    return operand(whole(x * (1.0 / scale)[:, None])), scale


@triton.jit
def _query_tile(
    q, grad, row_scale, lse, delta, k, v, other, k_scale, k_row, d_row, Tk, first, start, keys, position, acc,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """dQ after one tile of keys, the sequence's [first, first + BLOCK_N), which begins at packed row `start`."""
    offs_n = first + tl.arange(0, BLOCK_N)
    scale = tl.load(k_scale + start + offs_n)[None, :]
    row = k_row + start + first
    k_tile, v_tile = tile(k, row, 0, BLOCK_D, BLOCK_N, BLOCK_D, TMA), tile(v, row, 0, BLOCK_D, BLOCK_N, BLOCK_D, TMA)
    x = tl.dot(q, tl.trans(k_tile), out_dtype=tl.int32).to(tl.float32)  # [BM, BN]
    dp = tl.dot(grad, tl.trans(v_tile))
    x = (x * scale) * row_scale[:, None] - lse[:, None]
    if MASKED:
        seen = (offs_n < keys)[None, :]
        if CAUSAL:
            seen = seen & (offs_n[None, :] <= position[:, None])
        x = tl.where(seen, x, float("-inf"))
    ds = tl.exp2(x) * (dp - delta[:, None] * scale)
    if INT8:
        ds, size = _in_8_bits(ds)
        factor = tile(other, d_row, start + first, Tk, BLOCK_D, BLOCK_N, TMA)
        acc += tl.dot(ds, tl.trans(factor), out_dtype=tl.int32).to(tl.float32) * size[:, None]
    else:
        acc = tl.dot(ds.to(tl.bfloat16), tile(other, row, 0, BLOCK_D, BLOCK_N, BLOCK_D, TMA), acc)
    return acc


@triton.jit(do_not_specialize=["T", "Tk"])
def _query_gradient_kernel(
    q, grad, k, v, other, q_scale, g_scale, lse, delta, k_scale, owner, rows, columns, dq,
    sm_scale, HEADS_PER_KEY, T, Tk, stride_b, stride_h, stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    TMA: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    kv = h // HEADS_PER_KEY
    # The longest rows first, so that the last programs are short.
    row = (tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)) * BLOCK_M
    n = tl.load(owner + row // 128)
    if n < 0:
        return
    place = row - tl.load(rows + n * 4 + 3)
    position = place + tl.arange(0, BLOCK_M)
    keys, start = tl.load(columns + n * 4 + 2), tl.load(columns + n * 4 + 3)
    offs_m, offs_d = h * T + row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_tile = tile(q, (h * T).to(tl.int32) + row, 0, BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    grad_tile = tile(grad, (h * T).to(tl.int32) + row, 0, BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    row_scale, l_i, delta_i = tl.load(q_scale + offs_m), tl.load(lse + offs_m), tl.load(delta + offs_m)  # [BM]
    k_scale += kv * Tk
    k_row, d_row = (kv * Tk).to(tl.int32), (kv * BLOCK_D).to(tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    full = tl.minimum(place + 1, keys) // BLOCK_N if CAUSAL else keys // BLOCK_N
    stop = tl.minimum(place + BLOCK_M, keys) if CAUSAL else keys
    for i in range(full):
        acc = _query_tile(
            q_tile, grad_tile, row_scale, l_i, delta_i, k, v, other, k_scale, k_row, d_row, Tk, i * BLOCK_N, start,
            keys, position, acc, BLOCK_D, BLOCK_N, False, CAUSAL, TMA, INT8,
        )  # fmt: skip
    for i in range(full, tl.cdiv(stop, BLOCK_N)):
        acc = _query_tile(
            q_tile, grad_tile, row_scale, l_i, delta_i, k, v, other, k_scale, k_row, d_row, Tk, i * BLOCK_N, start,
            keys, position, acc, BLOCK_D, BLOCK_N, True, CAUSAL, TMA, INT8,
        )  # fmt: skip
    factor = sm_scale * tl.load(g_scale + offs_m)
    acc = acc * (factor / row_scale if INT8 else factor)[:, None]
    batch, first = tl.load(rows + n * 4).to(tl.int64), tl.load(rows + n * 4 + 1).to(tl.int64)
    goal = dq + batch * stride_b + h * stride_h + (first + position)[:, None] * stride_s + offs_d[None, :]
    mask = (position < tl.load(rows + n * 4 + 2))[:, None] & (offs_d < D)[None, :]
    tl.store(goal, acc.to(dq.dtype.element_ty), mask=mask)


@triton.jit
def _key_tile(
    k, v, k_scale, q, grad, q_other, g_other, q_scale, lse, delta, q_row, d_row, T, first, start, position,
    acc_k, acc_v,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, INT8: tl.constexpr,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    """dK and dV after one tile of queries, the sequence's [first, first + BLOCK_M), which begins at packed row `start`."""
    offs_m = first + tl.arange(0, BLOCK_M)
    row = start + first
    q_tile = tile(q, q_row + row, 0, BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    x = tl.dot(k, tl.trans(q_tile), out_dtype=tl.int32).to(tl.float32)  # [BN, BM]
    x = (x * k_scale[:, None]) * tl.load(q_scale + start + offs_m)[None, :] - tl.load(lse + start + offs_m)[None, :]
    if MASKED:
        x = tl.where(position[:, None] <= offs_m[None, :], x, float("-inf"))
    p = tl.exp2(x)  # zero in padding, whose lse is infinity
    if WITH_V and INT8:
        p8, size = _in_8_bits(p)
        factor = tile(g_other, d_row, row, T, BLOCK_D, BLOCK_M, TMA)
        acc_v += tl.dot(p8, tl.trans(factor), out_dtype=tl.int32).to(tl.float32) * size[:, None]
    if WITH_K or not INT8:
        grad_tile = tile(grad, q_row + row, 0, BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    if WITH_V and not INT8:
        acc_v = tl.dot(p.to(tl.bfloat16), grad_tile, acc_v)
    if WITH_K:
        dp = tl.dot(v, tl.trans(grad_tile))
        ds = p * (dp - k_scale[:, None] * tl.load(delta + start + offs_m)[None, :])
        if INT8:
            ds, size = _in_8_bits(ds)
            factor = tile(q_other, d_row, row, T, BLOCK_D, BLOCK_M, TMA)
            acc_k += tl.dot(ds, tl.trans(factor), out_dtype=tl.int32).to(tl.float32) * size[:, None]
        else:
            acc_k = tl.dot(ds.to(tl.bfloat16), tile(q_other, q_row + row, 0, BLOCK_D, BLOCK_M, BLOCK_D, TMA), acc_k)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["T", "Tk"])
def _key_gradient_kernel(
    q, grad, q_other, g_other, k, v, q_scale, lse, delta, k_scale, broken, owner, columns, rows, dk, dv,
    HEADS_PER_KEY, T, Tk, stride_b, stride_h, stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    TMA: tl.constexpr, INT8: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N
    n = tl.load(owner + column // 128)
    if n < 0:
        return
    place = column - tl.load(columns + n * 4 + 3)
    position = place + tl.arange(0, BLOCK_N)
    queries, start = tl.load(rows + n * 4 + 2), tl.load(rows + n * 4 + 3)
    offs_n, offs_d = kv * Tk + column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    scale = tl.load(k_scale + offs_n)  # [BN]
    k_tile = tile(k, (kv * Tk).to(tl.int32) + column, 0, BLOCK_D, BLOCK_N, BLOCK_D, TMA)
    v_tile = tile(v, (kv * Tk).to(tl.int32) + column, 0, BLOCK_D, BLOCK_N, BLOCK_D, TMA)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    shown = 0.0  # NaN where a query's gradient is not finite
    tiles = tl.cdiv(queries, BLOCK_M)
    # Causal: earlier queries see none of these keys, later ones all.
    begin = place // BLOCK_M if CAUSAL else 0
    full = tl.minimum(tl.cdiv(place + BLOCK_N - 1, BLOCK_M), tiles) if CAUSAL else 0
    for g in range(HEADS_PER_KEY):
        h = kv * HEADS_PER_KEY + g
        q_row, d_row, offset = (h * T).to(tl.int32), (h * BLOCK_D).to(tl.int32), h * T
        shown += tl.where(tl.load(broken + h) > 0, float("nan"), 0.0)
        if CAUSAL:
            for i in range(begin, full):
                acc_k, acc_v = _key_tile(
                    k_tile, v_tile, scale, q, grad, q_other, g_other, q_scale + offset, lse + offset, delta + offset,
                    q_row, d_row, T, i * BLOCK_M, start, position, acc_k, acc_v, BLOCK_D, BLOCK_M, True, TMA, INT8, WITH_K, WITH_V,
                )  # fmt: skip
        for i in range(full, tiles):
            acc_k, acc_v = _key_tile(
                k_tile, v_tile, scale, q, grad, q_other, g_other, q_scale + offset, lse + offset, delta + offset,
                q_row, d_row, T, i * BLOCK_M, start, position, acc_k, acc_v, BLOCK_D, BLOCK_M, False, TMA, INT8, WITH_K, WITH_V,
            )  # fmt: skip
    batch, first = tl.load(columns + n * 4).to(tl.int64), tl.load(columns + n * 4 + 1).to(tl.int64)
    goal = batch * stride_b + kv * stride_h + (first + position)[:, None] * stride_s + offs_d[None, :]
    mask = (position < tl.load(columns + n * 4 + 2))[:, None] & (offs_d < D)[None, :]
    if WITH_K:
        acc_k = acc_k * (tl.full(scale.shape, LN_2, tl.float32) / scale)[:, None] + shown
        tl.store(dk + goal, acc_k.to(dk.dtype.element_ty), mask=mask)
    if WITH_V:
        tl.store(dv + goal, (acc_v + shown).to(dv.dtype.element_ty), mask=mask)
