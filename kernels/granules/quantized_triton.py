"""Attention over granules in 8 bits in plain Triton: one program a tile of query rows, keys gathered through pointers."""

import math

from ..common import target
from ..common.launch import LaunchTable
from ..common.numbers import INT8_MAX, LN_2, LOG2_FP8_MAX, TINY
from ..common.quantised_tile import add_values, finish_rows
from ..common.target import tl, triton
from ..quantize.tokens import absmax_of_rows, round_to_int8

# arch -> (P V in FP8, padded head dim) -> keys of a stage, a multiple of the largest granule; warps; stages. Not measured: chosen by
# ahead-of-time compile (no spills, shared memory).
BLOCK_M = 64
_SMALL = {(False, 64): (64, 4, 2), (False, 128): (64, 8, 2), (True, 64): (64, 4, 2), (True, 128): (64, 8, 2)}
_LARGE = {(False, 64): (64, 4, 2), (False, 128): (64, 4, 2), (True, 64): (64, 4, 2), (True, 128): (64, 4, 2)}
LAUNCH = LaunchTable({80: _SMALL, 89: _SMALL, 90: _LARGE, 100: _LARGE, 120: _SMALL})


def launch(q, granules, lists, out, lse, failed, q_order, scale_log2, tail) -> None:
    """Attention over lists of granules; arguments as `quantized_hopper.launch` has them, values not interleaved."""
    B, H, S, D = q.shape
    V = S if q_order is None else q_order.shape[2]
    block_d, fp8 = granules.k.shape[3], granules.fp8
    block_n, warps, stages = LAUNCH.row(q.device, fp8, block_d)
    slots, means = granules.k.shape[2], granules.tail_k.shape[2]
    block_m = min(BLOCK_M, lists.rows)
    with target.on_device(q):
        _granules_int8_kernel[(triton.cdiv(V, block_m), B * H)](
            q, granules.k, granules.k_scale, granules.v, granules.v_scale, granules.v_mean, granules.tail_k, granules.tail_v,
            out, lse, failed, q_order, granules.tokens, lists.entries, lists.starts, lists.whole, lists.counts, lists.chosen,
            scale_log2, H, V, S, granules.tokens.shape[1], granules.means, slots, means,
            lists.counts.shape[2], lists.chosen.shape[3],
            *q.stride()[:3], *out.stride()[:3], *((0, 0, 0) if q_order is None else q_order.stride()),
            D=D, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, SIZE=granules.size, ROWS=lists.rows,
            BIAS=math.log2(granules.size), FP8=fp8, ACC16=granules.acc16, HAS_TAIL=tail, num_warps=warps, num_stages=stages,
        )  # fmt: skip


@triton.jit
def _values(v, slot, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr):
    """V of slots: FP8 [BD, BN], or 16 bits [BN, BD]."""
    offs_d = tl.arange(0, BLOCK_D)
    if FP8:
        place = slot // 16 * (16 * BLOCK_D) + slot % 16
        return tl.load(v + offs_d[:, None] * 16 + place[None, :])
    else:
        mask = inside[:, None] & (offs_d < D)[None, :]
        return tl.load(v + slot[:, None] * D + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _attend(
    q, scale, k, v, slot, inside, bias, acc, l_i, m_i,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, FP8: tl.constexpr, ACC16: tl.constexpr,
):  # fmt: skip
    """The keys in slots [BN], of which those inside count: running output, sum and maximum (base 2)."""
    offs_d = tl.arange(0, BLOCK_D)
    keys = tl.load(k + slot[:, None] * BLOCK_D + offs_d[None, :])
    x = tl.dot(q, tl.trans(keys), out_dtype=tl.int32).to(tl.float32)
    if MASKED:
        x = tl.where(inside[None, :], x, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(x, 1) * scale + bias)
    # 448 in P and in l cancels; the largest P then takes FP8's whole range.
    p = tl.exp2(x * scale[:, None] - (m_new - (LOG2_FP8_MAX + bias if FP8 else bias))[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = add_values(p, alpha, acc, _values(v, slot, inside, D, BLOCK_D, FP8), FP8, ACC16)
    return acc, l_i, m_new


@triton.jit(do_not_specialize=["V", "S", "C", "T", "slots", "means", "groups", "width"])
def _granules_int8_kernel(
    q, k, k_scale, v, v_scale, v_mean, tail_k, tail_v, out, lse, failed, q_order, tokens, entries, starts, whole, counts, chosen,
    scale_log2, H, V, S, C, T, slots, means, groups, width,
    stride_qb, stride_qh, stride_qs, stride_ob, stride_oh, stride_os, stride_pb, stride_ph, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, FP8: tl.constexpr, ACC16: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row = tl.program_id(0) * BLOCK_M + offs_m
    token = row.to(tl.int64)
    if q_order is not None:
        order = q_order + b * stride_pb + h * stride_ph
        token = tl.load(order + token * stride_ps, mask=row < V, other=0).to(tl.int64)
    mask = (row < V)[:, None] & (offs_d < D)[None, :]
    q_ptr = q + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + offs_d[None, :]
    rows = tl.load(q_ptr, mask=mask, other=0.0).to(tl.float32)
    largest = absmax_of_rows(rows)
    largest = tl.where(largest > TINY, largest, 1.0)
    q_tile = round_to_int8(rows, tl.div_rn(tl.full([BLOCK_M], INT8_MAX, tl.float32), largest)[:, None])
    scale = tl.where(largest < float("inf"), largest / INT8_MAX, float("nan")) * (scale_log2 * tl.load(k_scale + bh))

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -1e30, dtype=tl.float32)  # finite: no difference of infinities
    group = bh * groups + tl.program_id(0) * BLOCK_M // ROWS
    entries += tl.load(starts + group)
    full, total = tl.load(whole + group), tl.load(counts + group)
    k += bh * slots * BLOCK_D
    v += bh * ((slots + 15) // 16 * 16 * BLOCK_D if FP8 else slots * D)
    NUMBER: tl.constexpr = BLOCK_N // SIZE
    full = full // NUMBER * NUMBER
    for i in range(0, full, NUMBER):
        slot = tl.load(entries + i + offs_n // SIZE).to(tl.int64) * SIZE + offs_n % SIZE
        acc, l_i, m_i = _attend(
            q_tile, scale, k, v, slot, offs_n >= 0, 0.0, acc, l_i, m_i, D, BLOCK_D, False, FP8, ACC16
        )  # fmt: skip
    for i in range(full, total, NUMBER):
        place = i + offs_n // SIZE
        granule = tl.load(entries + tl.minimum(place, total - 1)).to(tl.int64)
        inside = (place < total) & (offs_n % SIZE < tl.load(tokens + b * C + granule))
        acc, l_i, m_i = _attend(
            q_tile, scale, k, v, granule * SIZE + offs_n % SIZE, inside, 0.0, acc, l_i, m_i, D, BLOCK_D, True, FP8, ACC16
        )  # fmt: skip
    if HAS_TAIL:
        tail_k += bh * means * BLOCK_D
        tail_v += bh * means * (BLOCK_D if FP8 else D)
        for c in range(0, T, BLOCK_N):
            mean = c + offs_n
            word = tl.load(chosen + group * width + mean // 32, mask=mean < T, other=-1)
            inside = ((word >> mean % 32) & 1) == 0
            acc, l_i, m_i = _attend(
                q_tile, scale, tail_k, tail_v, mean.to(tl.int64), inside, BIAS, acc, l_i, m_i, D, BLOCK_D, True, FP8, ACC16
            )  # fmt: skip
    acc = finish_rows(acc, l_i, v_scale, v_mean, failed, bh, bh * BLOCK_D, BLOCK_D, FP8, ACC16)
    out_ptr = out + b * stride_ob + h * stride_oh + token[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        total_p = m_i + tl.log2(tl.where(l_i == 0, 1.0, l_i)) - (LOG2_FP8_MAX if FP8 else 0.0)
        total_p = tl.where(l_i == 0, float("-inf"), total_p * LN_2)
        tl.store(lse + bh * S + token, total_p, mask=row < V)
