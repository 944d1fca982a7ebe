"""Score every granule for every group of query rows: how much error its mean would leave if it stood for its keys.

    p = softmax_j(sm_scale q_i . k_mean_j + log tokens_j)       q_i: the mean of `pool` neighbouring sorted queries
    score_j = mean over i of p_ij^2 (exp(min(s2_ij, 6)) - 1) weight_j / tokens_j,    s2_ij = sm_scale^2 |q_i|^2 spread_j

Three kernels: queries are pooled; log-sum-exps of their logits; scores. The last two multiply the same matrices, because
a score needs its row's normalizer first, and products are cheaper than keeping S x S / (16 pool) logits. The second one
has queries in columns: what a group averages over is then in one thread but for a quarter. p^2 is one exponential of the
doubled logit, exp(s2) another. fp32 softmax, no atomics: two runs are bit-equal. sm80 and newer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import target
from ..common.launch import LaunchTable
from ..common.numbers import base2
from ..common.target import tl, triton
from .reference import SPREAD_CAP, granule_scores_reference
from .values import ROWS, Granules

MAX_HEAD_DIM = 128
POOLS = (1, 2, 4, 8)
CAP = base2(SPREAD_CAP)


def granule_scores(
    q: Tensor, q_order: Tensor | None, granules: Granules, *, rows: int, pool: int = 4, sm_scale: float | None = None
) -> Tensor:
    """Estimate, for every row group and video granule, the error of its mean standing for it.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        q_order: int32 or int64 [B, H, V], sorted -> original index of the video's queries; None: the first V in order,
            where V is all of S.
        granules: of the keys; only its statistics are read.
        rows: query rows of a group, one of ROWS.
        pool: neighbouring sorted rows whose mean counts as one query, 1, 2, 4 or 8.
        sm_scale: softmax scale, not negative; default D ** -0.5.

    Returns:
        fp32 [B, H, NG, T], an error per key of a granule.

    Raises:
        ValueError: shapes disagree, or a number lies outside its range.
        TypeError: q and the granules differ in dtype.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.

    Source: error-aware routing, arXiv 2603.08982 (SVG-EAR); importance of queries instead of centroids: PARK (2026).
    """
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    _check(q, q_order, granules, rows, pool, sm_scale)
    op = _scores if target.use_triton(q) else granule_scores_reference
    return op(q, q_order, granules, rows=rows, pool=pool, sm_scale=sm_scale)


def _check(q, q_order, granules, rows, pool, sm_scale):
    k_mean = granules.k_mean
    if q.dim() != 4 or (*q.shape[:2], q.shape[3]) != (*k_mean.shape[:2], k_mean.shape[3]):
        raise ValueError(
            f"q must be [B, H, S, D] with the granules' heads, got {tuple(q.shape)} and means {tuple(k_mean.shape)}"
        )
    if q.dtype != k_mean.dtype:
        raise TypeError(f"q must have the granules' dtype {k_mean.dtype}, got {q.dtype}: convert it")
    if q_order is not None and (q_order.dim() != 3 or q_order.shape[:2] != q.shape[:2] or q_order.shape[2] < 1):
        raise ValueError(f"q_order must be [B, H, V] for q {tuple(q.shape)}, got {tuple(q_order.shape)}: expand it")
    if q_order is not None and q_order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"q_order must be int32 or int64, got {q_order.dtype}: convert it")
    if rows not in ROWS:
        raise ValueError(f"rows must be one of {', '.join(map(str, ROWS))}, got {rows}: 128 is the usual choice")
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(map(str, POOLS))}, got {pool}: 4 is the usual choice")
    if sm_scale < 0:
        raise ValueError(f"sm_scale must not be negative, got {sm_scale}: negate q instead")
    if q.stride(-1) != 1 and q.shape[-1] > 1:
        raise ValueError(f"q must be contiguous in its last dim, got strides {q.stride()}: call .contiguous() first")


class Launch(NamedTuple):
    """How the two products run.

    Args:
        queries, means: rows and columns of the normalizers' product.
        warps, stages: of that kernel.
        score_queries, score_means: columns and rows of the scores' product.
        score_warps, score_stages: of that kernel.
    """

    queries: int
    means: int
    warps: int
    stages: int
    score_queries: int
    score_means: int
    score_warps: int
    score_stages: int


# arch -> element bytes -> Launch. Not measured: chosen by ahead-of-time compile (no spills).
AMPERE = {2: Launch(128, 64, 8, 2, 64, 64, 4, 2), 4: Launch(64, 16, 8, 2, 64, 32, 8, 2)}
HOPPER = {2: Launch(128, 64, 8, 3, 128, 64, 8, 3), 4: Launch(64, 16, 8, 2, 64, 32, 8, 2)}
LAUNCH = LaunchTable({80: AMPERE, 89: AMPERE, 90: HOPPER, 100: HOPPER, 120: AMPERE})


def _scores(q, q_order, granules, *, rows, pool, sm_scale, launch=None):
    B, H, S, D = q.shape
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dim must be at most {MAX_HEAD_DIM}, got {D}: use dense attention")
    target.refuse_gradients("granule_scores", q)
    V, T, C = S if q_order is None else q_order.shape[2], granules.k_mean.shape[2], granules.tokens.shape[1]
    groups, P, pools = triton.cdiv(V, rows), triton.cdiv(V, pool), rows // pool
    pooled = torch.empty(B, H, P, D, dtype=q.dtype, device=q.device)
    steepness, shift = (torch.empty(B, H, P, dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty(B, H, groups, T, dtype=torch.float32, device=q.device)
    row = LAUNCH.row(q.device, q.element_size()) if launch is None else launch
    sizes = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D))}
    precision = "tf32x3" if q.dtype == torch.float32 else None
    columns = max(row.score_queries, pools)
    with target.on_device(q):
        _pool_kernel[(triton.cdiv(P, 32), B * H)](
            q, q_order, pooled, steepness, H, V, P, base2(sm_scale * sm_scale), *q.stride()[:3],
            *((0, 0, 1) if q_order is None else q_order.stride()), POOL=pool, BLOCK_P=32, **sizes,
        )  # fmt: skip
        _normalizers_kernel[(triton.cdiv(P, row.queries), B * H)](
            pooled, granules.k_mean, granules.tokens, shift, H, P, T, C, base2(sm_scale), granules.size, pools,
            BLOCK_P=row.queries, BLOCK_T=row.means, PRECISION=precision, num_warps=row.warps, num_stages=row.stages,
            **sizes,
        )  # fmt: skip
        _scores_kernel[(triton.cdiv(P, columns), B * H)](
            pooled, granules.k_mean, granules.tokens, granules.spread, granules.weight, steepness, shift, out,
            H, groups, P, T, C, base2(2 * sm_scale), granules.size,
            CAP=CAP, POOLS=pools, BLOCK_P=columns, BLOCK_T=row.score_means, PRECISION=precision,
            num_warps=row.score_warps * (2 if columns > row.score_queries else 1), num_stages=row.score_stages, **sizes,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["V", "P", "factor"])
def _pool_kernel(
    q, order, pooled, steepness, H, V, P, factor, stride_qb, stride_qh, stride_qs, stride_ob, stride_oh, stride_os,
    POOL: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Means of POOL sorted rows, and the factor of a granule's spread in the exponent, for base 2."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    q += b * stride_qb + h * stride_qh
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    if order is not None:
        order += b * stride_ob + h * stride_oh
    total = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for member in tl.static_range(POOL):
        token = p.to(tl.int64) * POOL + member
        inside = token < V
        if order is not None:
            token = tl.load(order + token * stride_os, mask=inside, other=0).to(tl.int64)
        pointer = q + token[:, None] * stride_qs + offs_d[None, :]
        total += tl.load(pointer, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
    number = tl.minimum(tl.maximum(V - p * POOL, 1), POOL).to(tl.float32)
    mean = (total / number[:, None]).to(pooled.dtype.element_ty)
    at = bh * P + p
    tl.store(pooled + at[:, None] * D + offs_d[None, :], mean, mask=(p < P)[:, None] & (offs_d < D)[None, :])
    mean = mean.to(tl.float32)
    tl.store(steepness + at, tl.sum(mean * mean, 1) * factor, mask=p < P)


@triton.jit
def _tile(x, first, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a contiguous matrix: [BLOCK, BD]; those from `limit` on are zero."""
    rows = first + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    pointer = x + rows[:, None] * D + offs_d[None, :]
    if MASKED:
        return tl.load(pointer, mask=(rows < limit)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointer, mask=(offs_d < D)[None, :] & (rows >= 0)[:, None], other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def _logits(q, k, PRECISION: tl.constexpr):
    """[BP, BT]. In fp32 the keys come first: queries split in two for TF32 would take all registers."""
    if PRECISION is None:
        return tl.dot(q, k.T)
    else:
        return tl.dot(k, q.T, input_precision=PRECISION).T


@triton.jit
def _add(s, total, top, factor):
    """Running maximum of the scores and sum of exponentials of a row."""
    higher = tl.maximum(top, tl.max(s, 1))
    weights = tl.exp2(s * factor - (higher * factor)[:, None])
    return total * tl.exp2((top - higher) * factor) + tl.sum(weights, 1), higher


@triton.jit(do_not_specialize=["P", "T", "C", "factor", "size", "pools"])
def _normalizers_kernel(
    pooled, k_mean, tokens, shift, H, P, T, C, factor, size, pools,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a doubled logit subtracts for a row: 2 log2-sum-exp2, and the log2 of how many rows its group averages."""
    bh = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_P
    pooled += bh * P * D
    k_mean += bh * T * D
    q = _tile(pooled, first, P, D, BLOCK_D, BLOCK_P, True)
    top = tl.full([BLOCK_P], -1e30, dtype=tl.float32)
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    last = (T - 1) // BLOCK_T * BLOCK_T
    for t in range(0, last, BLOCK_T):
        k = _tile(k_mean, t, T, D, BLOCK_D, BLOCK_T, False)
        s = _logits(q, k, PRECISION)
        total, top = _add(s, total, top, factor)
    # Only the last granule may hold fewer keys; against a whole one it weighs tokens / size.
    k = _tile(k_mean, last, T, D, BLOCK_D, BLOCK_T, True)
    s = _logits(q, k, PRECISION)
    offs_t = last + tl.arange(0, BLOCK_T)
    number = tl.load(tokens + bh // H * C + offs_t, mask=offs_t < T, other=0).to(tl.float32)
    higher = tl.maximum(top, tl.max(tl.where((offs_t < T)[None, :], s, -1e30), 1))
    weights = tl.exp2(tl.minimum(s * factor - (higher * factor)[:, None], 0.0)) * (number / size)[None, :]
    total = total * tl.exp2((top - higher) * factor) + tl.sum(weights, 1)
    p = first + tl.arange(0, BLOCK_P)
    members = tl.minimum(P - p // pools * pools, pools).to(tl.float32)
    tl.store(shift + bh * P + p, 2 * (higher * factor + tl.log2(total)) + tl.log2(tl.maximum(members, 1)), mask=p < P)


@triton.jit
def _group_scores(s, steepness, shift, spread, factor, CAP: tl.constexpr, POOLS: tl.constexpr):
    """Squared probabilities times what a granule's spread adds, summed over the pools of each group: [BT, groups]."""
    square = tl.exp2(s * factor - shift[None, :])
    growth = tl.exp2(tl.minimum(spread[:, None] * steepness[None, :], CAP))
    error = square * growth - square  # one fused operation: nothing cancels
    return tl.sum(error.reshape([s.shape[0], s.shape[1] // POOLS, POOLS]), 2)


@triton.jit(do_not_specialize=["groups", "P", "T", "C", "factor", "size"])
def _scores_kernel(
    pooled, k_mean, tokens, spread, weight, steepness, shift, out, H, groups, P, T, C, factor, size,
    CAP: tl.constexpr, POOLS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_P
    pooled += bh * P * D
    k_mean += bh * T * D
    spread += bh * T
    weight += bh * T
    tokens += bh // H * C
    q = _tile(pooled, first, P, D, BLOCK_D, BLOCK_P, True).T  # [BD, BP]
    p = first + tl.arange(0, BLOCK_P)
    steep = tl.load(steepness + bh * P + p, mask=p < P, other=0.0)
    less = tl.load(shift + bh * P + p, mask=p < P, other=float("inf"))
    group = first // POOLS + tl.arange(0, BLOCK_P // POOLS)
    out += (bh * groups + group[None, :]) * T
    for t in range(0, T, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        k = _tile(k_mean, t, T, D, BLOCK_D, BLOCK_T, True)
        s = tl.dot(k, q, input_precision=PRECISION)  # [BT, BP]
        number = tl.load(tokens + offs_t, mask=offs_t < T, other=1).to(tl.float32)
        found = _group_scores(s, steep, less, tl.load(spread + offs_t, mask=offs_t < T, other=0.0), factor, CAP, POOLS)
        # p^2 / tokens is (p^2 of a whole granule) tokens / size^2.
        found *= (tl.load(weight + offs_t, mask=offs_t < T, other=0.0) * number / (size * size).to(tl.float32))[:, None]
        tl.store(out + offs_t[:, None], found, mask=(offs_t < T)[:, None] & (group < groups)[None, :])
