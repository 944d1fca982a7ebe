"""What the dense and the block-sparse quantised attention share: one tile of keys, and which launches are worth timing."""

import itertools
from collections.abc import Iterator

import torch

from .launch import Launch
from .numbers import FP8_MAX, LOG2_FP8_MAX
from .target import tl, triton


def candidates() -> Iterator[Launch]:
    """Rows worth timing; what doesn't fit a GPU is refused at its launch."""
    for m, n, warps in ((128, 128, 8), (128, 64, 8), (64, 128, 4), (64, 64, 4), (128, 128, 4), (128, 64, 4)):
        for stages, tma in itertools.product((2, 3, 4), (True, False)):
            yield Launch(m, n, warps, stages, tma)


def key_source(keys: torch.Tensor, row: Launch):
    """Quantised keys as the kernels read them: a tensor, or a descriptor of tiles of its rows.

    Args:
        keys: int8 [B, H, Sk, Dp], contiguous.
        row: the launch.
    """
    return row.source(keys, row.block_n, keys.shape[3])


def value_source(values: torch.Tensor, row: Launch):
    """Quantised or 16-bit values as the kernels read them: a tensor, or a descriptor of tiles of transposed values.

    Args:
        values: float8_e4m3fn [B, H, Dp, Sp] contiguous, or 16 bits [B, H, Sk, D].
        row: the launch.
    """
    transposed = values.dtype == torch.float8_e4m3fn
    return row.source(values, values.shape[2], row.block_n) if transposed else values


@triton.jit
def attend_tile(
    q, row_scale, k, k_scale, v, bias, mask, stride_mk, k_row, v_row, v_column, stride_v, first, keys, row, acc, l_i, m_i,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, CAUSAL: tl.constexpr,
    K_PER_TOKEN: tl.constexpr, FP8: tl.constexpr, ACC16: tl.constexpr,
    TMA: tl.constexpr, pv_floor=None, skip=None,
):  # fmt: skip
    """One tile of keys [first, first + BLOCK_N), columns [skip, keys) of which count: running output, sum and maximum.

    k, k_scale, v and bias point at the head, mask [BM] at each row's mask (or is None); k_row, v_row and v_column
    are where the head begins in the descriptors. P V is left out where no row's maximum of this tile is at least its
    running one plus pv_floor [BM] (or is None).
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_n < keys if skip is None else (offs_n >= skip) & (offs_n < keys)
    token = first + offs_n.to(tl.int64)
    if TMA:
        k_tile = k.load([k_row + first, 0])  # [BN, BD]
    elif PARTIAL:
        k_tile = tl.load(k + token[:, None] * BLOCK_D + offs_d[None, :], mask=inside[:, None], other=0)
    else:
        k_tile = tl.load(k + token[:, None] * BLOCK_D + offs_d[None, :])
    x = tl.dot(q, tl.trans(k_tile), out_dtype=tl.int32).to(tl.float32)  # [BM, BN]
    if K_PER_TOKEN:
        if PARTIAL:
            x = x * tl.load(k_scale + token, mask=inside, other=1.0)[None, :]
        else:
            x = x * tl.load(k_scale + token)[None, :]
        scale = row_scale
    else:
        scale = row_scale * tl.load(k_scale + first // 128)  # tokens.BLOCK
    if bias is not None:
        x = x * scale[:, None] + tl.load(bias + token, mask=inside, other=0.0)[None, :]
        scale = tl.full([q.shape[0]], 1.0, dtype=tl.float32)
    x = hide(x, mask, stride_mk, token, inside, row, PARTIAL, CAUSAL)
    m_tile = tl.max(x, 1) * scale  # [BM], base 2
    m_new = tl.maximum(m_i, m_tile)
    top = m_new if mask is None else tl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen no key yet
    # 448 in P and in l cancels; the largest P then takes FP8's whole range.
    p = tl.exp2(x * scale[:, None] - (top - LOG2_FP8_MAX if FP8 else top)[:, None])
    alpha = tl.exp2(m_i - top)
    l_i = l_i * alpha + tl.sum(p, 1)
    v_tile = load_values(v, v_row, v_column + first, stride_v, token, inside, D, BLOCK_D, PARTIAL, FP8, TMA)
    if pv_floor is None:
        acc = add_values(p, alpha, acc, v_tile, FP8, ACC16)
    elif tl.max((m_tile - m_i >= pv_floor).to(tl.int32), 0) > 0:
        # Else no maximum rose, alpha is 1, and what V would add is below what the caller asked for.
        acc = add_values(p, alpha, acc, v_tile, FP8, ACC16)
    return acc, l_i, m_new


@triton.jit
def load_values(
    v, v_row, v_column, stride_v, token, inside,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTIAL: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """V of one tile of keys: FP8 [BD, BN], transposed, or 16 bits [BN, BD]."""
    offs_d = tl.arange(0, BLOCK_D)
    if FP8:
        if TMA:
            return v.load([v_row, v_column])
        else:
            v_ptr = v + offs_d[:, None] * stride_v + token[None, :]
            return tl.load(v_ptr, mask=inside[None, :], other=0.0) if PARTIAL else tl.load(v_ptr)
    else:
        v_ptr = v + token[:, None] * stride_v + offs_d[None, :]
        if PARTIAL or D < BLOCK_D:
            return tl.load(v_ptr, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)
        else:
            return tl.load(v_ptr)


@triton.jit
def add_values(p, alpha, acc, v, FP8: tl.constexpr, ACC16: tl.constexpr):
    """alpha acc + P V of one tile of keys."""
    if not FP8:
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    elif ACC16:
        # P up to 448, V up to 2.25: sums of 64 products stay below fp16's largest number.
        part = tl.dot(p.to(tl.float8e4nv), tl.trans(v), out_dtype=tl.float16).to(tl.float32)
        acc = tl.fma(acc, tl.broadcast_to(alpha[:, None], acc.shape), part)
    else:
        # FP8 products keep too few bits to be summed over tiles. An fma, not a sum: the compiler would fold that into the product.
        acc = tl.fma(acc, tl.broadcast_to(alpha[:, None], acc.shape), tl.dot(p.to(tl.float8e4nv), tl.trans(v)))
    return acc


@triton.jit
def hide(x, mask, stride_mk, token, inside, row, PARTIAL: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores [BM, BN] with minus infinity where a query does not see a key."""
    if CAUSAL:
        x = tl.where((token[None, :] <= row[:, None]) & inside[None, :], x, float("-inf"))
    elif PARTIAL:
        x = tl.where(inside[None, :], x, float("-inf"))
    if mask is not None:
        seen = tl.load(mask[:, None] + token[None, :] * stride_mk, mask=inside[None, :], other=0)
        x = tl.where(seen != 0, x, float("-inf"))
    return x


@triton.jit
def note_failure(failed, head, acc, limit):
    """Sets a head's flag where sums left the range that rounding can explain, or are not finite."""
    if tl.max(tl.where(tl.abs(acc) <= limit, 0, 1)) > 0:
        tl.store(failed + head, 1)


@triton.jit
def finish_rows(
    acc, l_i, v_scale, v_mean, failed, head, channel, BLOCK_D: tl.constexpr, FP8: tl.constexpr, ACC16: tl.constexpr,
):  # fmt: skip
    """Weighted means of V from running sums; `channel` is the head's first. A row that saw no key gives zeros."""
    acc = acc / tl.where(l_i == 0, 1.0, l_i)[:, None]
    limit: tl.constexpr = (2.25 if ACC16 else FP8_MAX) if FP8 else 3.0e38
    if failed is not None:
        note_failure(failed, head, acc, 1.07 * limit)  # e4m3 rounds P by 6.25 % at most
    if FP8:
        offs_d = channel + tl.arange(0, BLOCK_D)
        acc = tl.clamp(acc, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        acc = acc * tl.load(v_scale + offs_d)[None, :]
        if v_mean is not None:
            acc += tl.where((l_i == 0)[:, None], 0.0, tl.load(v_mean + offs_d)[None, :])
    return acc
