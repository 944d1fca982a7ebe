"""Block-sparse attention in Triton: `_attention_kernel`, its launch table, and the choice between it and Hopper's kernel."""

from collections.abc import Iterator

import torch

from ..common import target
from ..common.launch import Launch, LaunchTable
from ..common.numbers import LN_2, LOG2_E, base2
from ..common.target import tl, triton
from ..common.tile_lists import key_tiles, query_tiles
from . import hopper as block_sparse_hopper
from .blocks import Tail

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def candidates() -> Iterator[Launch]:
    """Rows worth timing for 16-bit inputs; what doesn't fit a GPU is refused at its launch."""
    for stages in (2, 3):
        yield Launch(128, 64, 8, stages, tma=True, specialised=True)
    for tma in (False, True):
        for m, n, warps in ((128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4), (256, 64, 16)):
            for stages in (2, 3):
                yield Launch(m, n, warps, stages, tma)


# arch -> (element bytes, padded head dim) -> tile sizes; smaller head dims take the 64 row.
# The Hopper kernel has tiles of 128 x 64 and takes num_stages as its own; `svg bench attention --sweep` times other rows.
LAUNCH = LaunchTable({
    80: {(2, 64): Launch(128, 32, 4, 3), (2, 128): Launch(128, 32, 8, 3),
         (4, 64): Launch(32, 32, 8, 2), (4, 128): Launch(16, 32, 4, 2)},
    89: {(2, 64): Launch(128, 32, 4, 3), (2, 128): Launch(64, 32, 4, 3),
         (4, 64): Launch(32, 32, 8, 2), (4, 128): Launch(16, 32, 4, 2)},
    90: {(2, 64): Launch(128, 64, 8, 3, tma=True, specialised=True),
         (2, 128): Launch(128, 64, 8, 2, tma=True, specialised=True),
         (4, 64): Launch(64, 32, 4, 2), (4, 128): Launch(16, 32, 4, 2)},
    100: {(2, 64): Launch(128, 64, 4, 3), (2, 128): Launch(128, 64, 8, 3),
          (4, 64): Launch(32, 32, 8, 2), (4, 128): Launch(16, 32, 4, 2)},
    120: {(2, 64): Launch(128, 32, 4, 3), (2, 128): Launch(64, 32, 4, 3),
          (4, 64): Launch(32, 32, 8, 2), (4, 128): Launch(16, 32, 4, 2)},
}, measured=[(90, (2, 64)), (90, (2, 128))])  # fmt: skip


def launch(q, k, v, blocks, *, sm_scale, return_lse) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    B, H, S, D = q.shape
    q_sizes, q_permutation, map_index, tail = blocks.q_sizes, blocks.q_permutation, blocks.map_index, blocks.tail
    Cq = blocks.block_map.shape[1]
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head dim must be at most {MAX_HEAD_DIM}, got {D}: use dense attention for this model"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f"q, k and v must be fp16, bf16 or fp32, got {q.dtype}: convert them")
    target.refuse_gradients("block_sparse_attention", q, k, v)
    block_d = max(16, triton.next_power_of_2(D))
    row = LAUNCH.row(q.device, q.element_size(), max(64, block_d))
    out = torch.empty_like(q)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device) if return_lse else None
    tma = row.tma and target.fits_descriptor(k) and target.fits_descriptor(v)
    perm_strides = (0, 0, 0) if q_permutation is None else q_permutation.stride()
    with target.on_device(q):
        q_tiles, query_counts = query_tiles(q_sizes, S, row.block_m)
        k_tiles, key_counts = key_tiles(blocks.block_map, blocks.k_sizes, k.shape[2], row.block_n, q_sizes)
        lists = (q_tiles, query_counts, k_tiles, key_counts)
        tail = None if tail is None else Tail(*(x.contiguous() for x in tail))
        if row.specialised and 4 * S >= k.shape[2]:
            # A copy costs a fiftieth of the call, the other kernel half as much again.
            k, v = k.contiguous(), v.contiguous()
        if row.specialised and block_sparse_hopper.supports(q, k, v, row):
            scale = base2(sm_scale)
            block_sparse_hopper.launch(
                q, k, v, out, lse, q_permutation, map_index, lists, Cq, scale, row.num_stages, tail
            )
            return (out, lse) if return_lse else out
        k_tail, v_tail, bias = (None, None, None) if tail is None else tail
        run = target.with_workspace(_attention_kernel[(q_tiles.shape[1], B * H)], q.device)
        run(
            q, k, v, out, lse, q_permutation, map_index.contiguous(), *lists, k_tail, v_tail, bias,
            base2(sm_scale), H, S, k.shape[2], Cq, q_tiles.shape[1], k_tiles.shape[2],
            0 if tail is None else bias.shape[2],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *perm_strides,
            D=D, BLOCK_D=block_d, BLOCK_M=row.block_m, BLOCK_N=row.block_n,
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", TMA=tma,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return (out, lse) if return_lse else out


@triton.jit
def _load_tile(
    x, first, inside, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows first ... of x, a pointer or a descriptor: [BN, BD]."""
    if TMA:
        return x.load([first, 0])
    else:
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        pointer = x + first.to(tl.int64) * stride + offs_n[:, None] * stride + offs_d[None, :]
        mask = (offs_d < D)[None, :] if D < BLOCK_D else None
        if PARTIAL:
            mask = inside[:, None] if mask is None else mask & inside[:, None]
        return tl.load(pointer, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def _attend_tile(
    q, k, v, tile, acc, l_i, m_i, scale_log2, stride_ks, stride_vs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    first = tile // BLOCK_N
    inside = tl.arange(0, BLOCK_N) <= tile % BLOCK_N  # [BN]
    k_tile = _load_tile(k, first, inside, stride_ks, D, BLOCK_D, BLOCK_N, PARTIAL, TMA)
    v_tile = _load_tile(v, first, inside, stride_vs, D, BLOCK_D, BLOCK_N, PARTIAL, TMA)
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [BM, BN]
    if PARTIAL:
        s = tl.where(inside[None, :], s, float("-inf"))
    return _accumulate(s, scale_log2, v_tile, acc, l_i, m_i, PRECISION)


@triton.jit
def _accumulate(s, scale, v_tile, acc, l_i, m_i, PRECISION: tl.constexpr):
    """One tile of the online softmax; s * scale [BM, BN] in base 2, and one finite entry a row in this tile or before."""
    peak = tl.max(s, 1) * scale  # [BM]
    m_new = tl.maximum(m_i, peak)
    alpha = tl.exp2(m_i - m_new)
    acc = acc * alpha[:, None]
    l_i = l_i * alpha
    p = tl.exp2(s * scale - m_new[:, None])
    l_i = l_i + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, l_i, m_new


@triton.jit
def _attend_means(
    q, k_tail, v_tail, bias, first, C, acc, l_i, m_i, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows first ... of the tail: mean keys with the logs of their clusters' sizes."""
    offs_n = first + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < C)[:, None] & (offs_d < D)[None, :]  # [BN, BD]
    k_tile = tl.load(k_tail + offs_n[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    v_tile = tl.load(v_tail + offs_n[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    log_size = tl.load(bias + offs_n, mask=offs_n < C, other=float("-inf")) * LOG2_E
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2 + log_size[None, :]
    m_i = tl.maximum(m_i, -1e30)  # nothing so far and nothing here: no difference of infinities
    return _accumulate(s, 1.0, v_tile, acc, l_i, m_i, PRECISION)


@triton.jit(do_not_specialize=["S", "Sk", "Cq", "query_width", "key_width", "C"])
def _attention_kernel(
    q, k, v, out, lse, permutation, map_index, query_tiles, query_counts, key_tiles, key_counts,
    k_tail, v_tail, bias, scale_log2, H, S, Sk, Cq, query_width, key_width, C,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    stride_pb, stride_ph, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
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
    q_tile = tl.load(q_ptr, mask=mask, other=0.0)
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    if TMA:
        k = tl.make_tensor_descriptor(k, [Sk, D], [stride_ks, 1], [BLOCK_N, BLOCK_D])
        v = tl.make_tensor_descriptor(v, [Sk, D], [stride_vs, 1], [BLOCK_N, BLOCK_D])
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row = m * Cq + cluster
    tiles = key_tiles + row * key_width
    full = tl.load(key_counts + row * 2)
    for i in range(full):
        acc, l_i, m_i = _attend_tile(
            q_tile, k, v, tl.load(tiles + i), acc, l_i, m_i, scale_log2, stride_ks, stride_vs,
            D, BLOCK_D, BLOCK_N, False, PRECISION, TMA,
        )  # fmt: skip
    for i in range(full, tl.load(key_counts + row * 2 + 1)):
        acc, l_i, m_i = _attend_tile(
            q_tile, k, v, tl.load(tiles + i), acc, l_i, m_i, scale_log2, stride_ks, stride_vs,
            D, BLOCK_D, BLOCK_N, True, PRECISION, TMA,
        )  # fmt: skip
    if bias is not None:
        k_tail += bh * C * D
        v_tail += bh * C * D
        for c in range(0, C, BLOCK_N):
            acc, l_i, m_i = _attend_means(
                q_tile, k_tail, v_tail, bias + row * C, c, C, acc, l_i, m_i, scale_log2, D, BLOCK_D, BLOCK_N, PRECISION
            )
        m_i = tl.where(l_i == 0, float("-inf"), m_i)
    divisor = tl.where(l_i == 0, 1.0, l_i)  # a row with nothing selected gives zeros
    acc = acc / divisor[:, None]
    out_ptr = out + b * stride_ob + h * stride_oh + token[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        natural = (m_i + tl.log2(divisor)) * LN_2  # m_i is -inf where nothing is selected
        tl.store(lse + bh * S + token, natural, mask=inside)
