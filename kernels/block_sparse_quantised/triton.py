"""Block-sparse attention in 8 bits in Triton: the kernel, its launch table, and what is quantised before it."""

import dataclasses
from functools import partial

import torch

from ..block_sparse.op import block_sparse_attention
from ..clustering.permute import gather_tokens
from ..common import target
from ..common.aligned_tiles import aligned_key_tiles, separate_key_tiles
from ..common.launch import Launch, LaunchTable
from ..common.merge import merge_attention
from ..common.numbers import INT8_MAX, LN_2, LOG2_FP8_MAX, TINY, base2
from ..common.quantised_tile import attend_tile, finish_rows, key_source, value_source
from ..common.smoothing import unsmoothed_lse
from ..common.target import tl, triton
from ..common.tile_lists import key_tiles, query_tiles
from ..quantize.channels import quantize_channels, statistics
from ..quantize.precision import pv_dtype
from ..quantize.tokens import absmax_of_rows, key_groups, padded_head_dim, quantize_tokens, round_to_int8
from . import hopper
from .tail import attend_tail, merge_tail

# arch -> (P V in FP8, padded head dim) -> tile sizes.
LAUNCH = LaunchTable({
    80: {(False, 64): Launch(128, 32, 4, 3), (False, 128): Launch(128, 32, 8, 3)},
    89: {(False, 64): Launch(128, 32, 4, 3), (False, 128): Launch(64, 32, 4, 2),
         (True, 64): Launch(64, 32, 4, 3), (True, 128): Launch(128, 32, 8, 3)},
    90: {(False, 64): Launch(128, 64, 8, 3), (False, 128): Launch(128, 64, 8, 3),
         (True, 64): Launch(128, 64, 8, 3, tma=True, specialised=True),
         (True, 128): Launch(128, 64, 8, 3, tma=True, specialised=True)},
    100: {(False, 64): Launch(128, 64, 8, 3), (False, 128): Launch(128, 64, 8, 3),
          (True, 64): Launch(128, 64, 8, 3, tma=True), (True, 128): Launch(128, 64, 8, 3, tma=True)},
    120: {(False, 64): Launch(128, 32, 4, 3), (False, 128): Launch(64, 32, 4, 2),
          (True, 64): Launch(128, 32, 4, 3, tma=True), (True, 128): Launch(64, 32, 4, 3, tma=True)},
}, measured=[90])  # fmt: skip


def launch(q, k, v, blocks, *, how, sm_scale, failed, return_lse):
    q_permutation, k_permutation, tail = blocks.q_permutation, blocks.k_permutation, blocks.tail
    pv_threshold, kind = how.pv_threshold, how.kind
    fp8 = kind.fp8
    if fp8:
        target.require_fp8(q.device)
    B, H, S, D = q.shape
    Sk, block_d = k.shape[2], padded_head_dim(D)
    row = LAUNCH.row(q.device, fp8, block_d)
    specialised = hopper.supports(q, kind, row)
    if tail is not None and not (specialised and pv_threshold is None):
        alone = dataclasses.replace(blocks, tail=None)
        found = launch(q, k, v, alone, how=how, sm_scale=sm_scale, failed=failed, return_lse=True)
        other = attend_tail(block_sparse_attention, q, blocks, sm_scale)
        return merge_tail(merge_attention, found, other, return_lse)
    stats = statistics(k, v) if how.smooth_k or fp8 else None
    mean = stats.k_mean if how.smooth_k else None
    as_keys = partial(quantize_tokens, side="k", groups=key_groups(blocks.key_multiple), mean=mean)
    as_values = partial(quantize_channels, stats=stats, smooth=how.smooth_v, limit=kind.v_range, interleave=specialised)
    keys, channels = as_keys(k, permutation=k_permutation), None
    if fp8:
        channels = as_values(v, permutation=k_permutation)
        values = channels.values
    else:
        values = (v if k_permutation is None else gather_tokens(v, k_permutation)).to(pv_dtype(v))
    out = torch.empty_like(q)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device) if return_lse else None
    with target.on_device(q):
        q_tiles, q_counts = query_tiles(blocks.q_sizes, S, hopper.QUERY_ROWS if specialised else row.block_m)
        cut = separate_key_tiles if blocks.key_multiple % row.block_n == 0 else aligned_key_tiles if fp8 else key_tiles
        k_tiles, k_counts = cut(blocks.block_map, blocks.k_sizes, Sk, row.block_n)
    if specialised:
        lists = q_tiles, q_counts, k_tiles, k_counts
        if tail is not None:
            tail = as_keys(_used_keys(tail, blocks.map_index, mean)), as_values(tail.v), tail.bias
        hopper.launch(
            q, keys, channels, out, lse, failed, q_permutation, pv_threshold, blocks.map_index, lists, blocks.block_map.shape[1],
            base2(sm_scale), 64 if blocks.key_multiple % 64 == 0 else 16, tail,
        )  # fmt: skip
        return (out, unsmoothed_lse(lse, q, mean, sm_scale)) if return_lse else out
    with target.on_device(q):
        _sparse_quantised_kernel[(q_tiles.shape[1], B * H)](
            q, key_source(keys.values, row), keys.scale, value_source(values, row),
            channels.scale if fp8 else None, channels.mean if fp8 else None, out, lse, failed, q_permutation,
            pv_threshold, blocks.map_index.contiguous(), q_tiles, q_counts, k_tiles, k_counts,
            base2(sm_scale), H, S, Sk, blocks.block_map.shape[1], q_tiles.shape[1], k_tiles.shape[2],
            *q.stride()[:3], *values.stride()[:3], *out.stride()[:3],
            *((0, 0, 0) if q_permutation is None else q_permutation.stride()),
            D=D, BLOCK_D=block_d, BLOCK_M=row.block_m, BLOCK_N=row.block_n, FP8=fp8, ACC16=kind.acc16,
            TMA=row.tma,
            STAGES=None if pv_threshold is None else row.num_stages, num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return (out, unsmoothed_lse(lse, q, mean, sm_scale)) if return_lse else out


def _used_keys(tail, map_index, mean):
    """The tail's keys; those that no query cluster sees, such as of empty clusters, do not widen the scales of others."""
    used = (tail.bias.amax(1) > -torch.inf)[map_index.long()][..., None]  # [B, H, C, 1]
    away = tail.k.new_zeros(()) if mean is None else mean.to(tail.k.dtype)[:, :, None]
    return torch.where(used, tail.k, away)


@triton.jit(do_not_specialize=["S", "Sk", "Cq", "query_width", "key_width"])
def _sparse_quantised_kernel(
    q, k, k_scale, v, v_scale, v_mean, out, lse, failed, permutation, pv_threshold, map_index, query_tiles, query_counts,
    key_tiles, key_counts, scale_log2, H, S, Sk, Cq, query_width, key_width,
    stride_qb, stride_qh, stride_qs, stride_vb, stride_vh, stride_v, stride_ob, stride_oh, stride_os,
    stride_pb, stride_ph, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr,
    ACC16: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    m = tl.load(map_index + bh).to(tl.int64)
    if tl.program_id(0) >= tl.load(query_counts + m):
        return
    tile = query_tiles + (m * query_width + tl.program_id(0)) * 3
    cluster = tl.load(tile)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_m < tl.load(tile + 2)  # [BM]
    token = (tl.load(tile + 1) + offs_m).to(tl.int64)
    if permutation is not None:
        token = tl.load(permutation + b * stride_pb + h * stride_ph + token * stride_ps, mask=inside, other=0)
        token = token.to(tl.int64)
    mask = inside[:, None] & (offs_d < D)[None, :]  # [BM, BD]
    q_ptr = q + b * stride_qb + h * stride_qh + token[:, None] * stride_qs + offs_d[None, :]
    q_wide = tl.load(q_ptr, mask=mask, other=0.0).to(tl.float32)
    largest = absmax_of_rows(q_wide)
    largest = tl.where(largest > TINY, largest, 1.0)
    q_tile = round_to_int8(q_wide, tl.div_rn(tl.full([BLOCK_M], INT8_MAX, tl.float32), largest)[:, None])
    row_scale = tl.where(largest < float("inf"), largest / INT8_MAX, float("nan")) * scale_log2
    k_scale += bh * Sk
    k_row, v_row = (bh * Sk).to(tl.int32), (bh * BLOCK_D).to(tl.int32)
    if not TMA:
        k += bh * Sk * BLOCK_D
    if not (TMA and FP8):
        v += b * stride_vb + h * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    pv_floor = None
    if pv_threshold is not None:
        pv_floor = tl.where(inside, -tl.load(pv_threshold + h), float("inf"))  # rows that are not there ask for nothing
    map_row = m * Cq + cluster
    tiles = key_tiles + map_row * key_width
    full = tl.load(key_counts + map_row * 2)
    # V of a filtered tile is used inside a branch: only a loop that says so has it loaded ahead.
    for i in tl.range(full, num_stages=STAGES):
        first = tl.load(tiles + i) // BLOCK_N
        if FP8:
            first = tl.multiple_of(first, 16)  # aligned_tiles.ALIGN
        acc, l_i, m_i = attend_tile(
            q_tile, row_scale, k, k_scale, v, None, None, 0, k_row, v_row, 0, stride_v, first, BLOCK_N, offs_m,
            acc, l_i, m_i,
            D, BLOCK_D, BLOCK_N, False, False, True, FP8, ACC16, TMA, pv_floor,
        )  # fmt: skip
    for i in range(full, tl.load(key_counts + map_row * 2 + 1)):
        entry = tl.load(tiles + i)
        first, keys = entry // BLOCK_N, entry % BLOCK_N + 1
        skip = first % (16 if FP8 else 1)
        acc, l_i, m_i = attend_tile(
            q_tile, row_scale, k, k_scale, v, None, None, 0, k_row, v_row, 0, stride_v, first - skip, skip + keys, offs_m,
            acc, l_i, m_i,
            D, BLOCK_D, BLOCK_N, True, False, True, FP8, ACC16, TMA, pv_floor, skip,
        )  # fmt: skip
    acc = finish_rows(acc, l_i, v_scale, v_mean, failed, bh, bh * BLOCK_D, BLOCK_D, FP8, ACC16)
    out_ptr = out + b * stride_ob + h * stride_oh + token[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        total = m_i + tl.log2(tl.where(l_i == 0, 1.0, l_i)) - (LOG2_FP8_MAX if FP8 else 0.0)
        tl.store(lse + bh * S + token, total * LN_2, mask=inside)
