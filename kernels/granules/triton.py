"""Attention over lists of granules: every GPU from compute capability 8.0 on, 16 and 32 bits.

A program has BLOCK_M rows of one row group. It walks over the group's list, gathers BLOCK_N keys and values a step
through pointers, whole granules without a mask and the last few with one, then over the means of what is not listed.
"""

from __future__ import annotations

import torch

from ..common.launch import Launch, LaunchTable
from ..common.numbers import LN_2
from ..common.target import tl, triton

# arch -> (element bytes, padded head dim) -> row: query rows of a program, a divisor of a row group's, and keys of a step, a
# multiple of a granule's. Smaller head dims take the 64 row.
LAUNCH = LaunchTable({
    80: {(2, 64): Launch(64, 64, 4, 2), (2, 128): Launch(64, 32, 4, 3),
         (4, 64): Launch(32, 64, 8, 1), (4, 128): Launch(16, 64, 8, 1)},
    89: {(2, 64): Launch(64, 64, 4, 2), (2, 128): Launch(64, 64, 8, 2),
         (4, 64): Launch(32, 64, 8, 1), (4, 128): Launch(16, 64, 8, 1)},
    90: {(2, 64): Launch(64, 64, 4, 3), (2, 128): Launch(64, 64, 4, 3),
         (4, 64): Launch(32, 64, 8, 1), (4, 128): Launch(16, 64, 8, 1)},
    100: {(2, 64): Launch(64, 64, 4, 3), (2, 128): Launch(64, 64, 4, 3),
          (4, 64): Launch(32, 64, 8, 1), (4, 128): Launch(16, 64, 8, 1)},
    120: {(2, 64): Launch(64, 64, 4, 2), (2, 128): Launch(64, 64, 8, 2),
          (4, 64): Launch(32, 64, 8, 1), (4, 128): Launch(16, 64, 8, 1)},
})  # fmt: skip


def launch(q, granules, lists, out, lse, q_order, scale_log2, tail, only) -> None:
    """Attention over lists of granules; arguments as `op.granule_attention` has checked them.

    Args:
        scale_log2: softmax scale times log2 e.
        tail: whether means stand for granules that are not listed.
        only: int32 [B, H], heads that are 0 are left out; or None.
    """
    B, H, S, D = q.shape
    NG, C, T = lists.counts.shape[2], granules.tokens.shape[1], granules.k_mean.shape[2]
    V = S if q_order is None else q_order.shape[2]
    block_d = max(16, triton.next_power_of_2(D))
    row = LAUNCH.row(q.device, q.element_size(), max(64, block_d))
    block_m = min(row.block_m, lists.rows)
    num_warps = row.num_warps if block_m == row.block_m else 4  # short groups: less to divide
    parts = lists.rows // block_m
    strides = (0, 0, 0) if q_order is None else q_order.stride()
    _granules_kernel[(NG * parts, B * H)](
        q, granules.k, granules.v, granules.k_mean, granules.v_mean, out, lse, q_order, granules.tokens, lists.entries,
        lists.starts, lists.whole, lists.counts, lists.chosen, only, scale_log2, H, S, V, NG, parts, C, T,
        lists.chosen.shape[3] if tail else 0, *q.stride()[:3], *out.stride()[:3], *strides,
        D=D, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=row.block_n, SIZE=granules.size, TAIL=tail,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", num_warps=num_warps, num_stages=row.num_stages,
    )  # fmt: skip


@triton.jit
def _load_rows(x, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a contiguous matrix: [BN, BD]."""
    offs_d = tl.arange(0, BLOCK_D)
    pointer = x + rows[:, None] * D + offs_d[None, :]
    mask = (offs_d < D)[None, :] if D < BLOCK_D else None
    if MASKED:
        mask = inside[:, None] if mask is None else mask & inside[:, None]
    return tl.load(pointer, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def _accumulate(s, v_tile, acc, l_i, m_i, PRECISION: tl.constexpr):
    """One step of the online softmax over logits s [BM, BN] in base 2; m_i is finite from the start."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(s - m_new[:, None])
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
    return acc, l_i * alpha + tl.sum(p, 1), m_new


@triton.jit
def _attend_listed(
    q, k, v, listed, i, count, tokens, acc, l_i, m_i, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N slots from list entry i on."""
    slot = tl.arange(0, BLOCK_N)
    entry, place = i + slot // SIZE, slot % SIZE
    if MASKED:
        granule = tl.load(listed + entry, mask=entry < count, other=0)
        inside = place < tl.load(tokens + granule, mask=entry < count, other=0)
    else:
        granule, inside = tl.load(listed + entry), None
    rows = granule.to(tl.int64) * SIZE + place
    k_tile = _load_rows(k, rows, inside, D, BLOCK_D, MASKED)
    v_tile = _load_rows(v, rows, inside, D, BLOCK_D, MASKED)
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2  # [BM, BN]
    if MASKED:
        s = tl.where(inside[None, :], s, float("-inf"))
    return _accumulate(s, v_tile, acc, l_i, m_i, PRECISION)


@triton.jit
def _attend_means(
    q, k_mean, v_mean, chosen, first, T, acc, l_i, m_i, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, LOG_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Means from granule `first` on, but for those that are listed."""
    granule = first + tl.arange(0, BLOCK_N)
    exists = granule < T
    k_tile = _load_rows(k_mean, granule.to(tl.int64), exists, D, BLOCK_D, True)
    v_tile = _load_rows(v_mean, granule.to(tl.int64), exists, D, BLOCK_D, True)
    word = tl.load(chosen + granule // 32, mask=exists, other=-1)
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2 + LOG_SIZE
    s = tl.where(((word >> (granule % 32)) & 1)[None, :] == 0, s, float("-inf"))
    return _accumulate(s, v_tile, acc, l_i, m_i, PRECISION)


@triton.jit(do_not_specialize=["S", "V", "NG", "C", "T", "words"])
def _granules_kernel(
    q, k, v, k_mean, v_mean, out, lse, q_order, tokens, entries, starts, whole, counts, chosen, only,
    scale_log2, H, S, V, NG, parts, C, T, words,
    stride_qb, stride_qh, stride_qs, stride_ob, stride_oh, stride_os, stride_pb, stride_ph, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    if only is not None:
        if tl.load(only + bh) == 0:
            return
    group = bh * NG + tl.program_id(0) // parts
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    inside = row < V  # [BM]
    token = row.to(tl.int64)
    if q_order is not None:
        token = tl.load(q_order + b * stride_pb + h * stride_ph + token * stride_ps, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (offs_d < D)[None, :]  # [BM, BD]
    q_ptr = q + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + offs_d[None, :]
    q_tile = tl.load(q_ptr, mask=mask, other=0.0)
    k += bh * C * SIZE * D
    v += bh * C * SIZE * D
    tokens += b * C
    listed = entries + tl.load(starts + group)
    count = tl.load(counts + group)
    EACH: tl.constexpr = BLOCK_N // SIZE
    unmasked = tl.load(whole + group) // EACH * EACH
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -1e30, dtype=tl.float32)  # finite: no difference of infinities
    for i in range(0, unmasked, EACH):
        acc, l_i, m_i = _attend_listed(
            q_tile, k, v, listed, i, count, tokens, acc, l_i, m_i, scale_log2, D, BLOCK_D, BLOCK_N, SIZE, False, PRECISION
        )  # fmt: skip
    for i in range(unmasked, count, EACH):
        acc, l_i, m_i = _attend_listed(
            q_tile, k, v, listed, i, count, tokens, acc, l_i, m_i, scale_log2, D, BLOCK_D, BLOCK_N, SIZE, True, PRECISION
        )  # fmt: skip
    if TAIL:
        LOG_SIZE: tl.constexpr = 3 if SIZE == 8 else (4 if SIZE == 16 else (5 if SIZE == 32 else 6))
        if count < C:
            for first in range(0, T, BLOCK_N):
                acc, l_i, m_i = _attend_means(
                    q_tile, k_mean + bh * T * D, v_mean + bh * T * D, chosen + group * words, first, T, acc, l_i, m_i,
                    scale_log2, D, BLOCK_D, BLOCK_N, LOG_SIZE, PRECISION,
                )  # fmt: skip
    divisor = tl.where(l_i == 0, 1.0, l_i)  # a row with nothing to attend to gives zeros
    out_ptr = out + b * stride_ob + h * stride_oh + token[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptr, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        natural = (m_i + tl.log2(divisor)) * LN_2
        tl.store(lse + bh * S + token, tl.where(l_i == 0, float("-inf"), natural), mask=inside)
