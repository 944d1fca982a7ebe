"""Block-sparse attention with INT8 Q K^T, and P V in FP8 or 16 bits: `block_sparse_attention`'s tiles, quantised.

Keys and values are quantised while they are gathered into sorted order, one pass each after one read for statistics; a
tile of queries is quantised by the program that attends with it. Every query and every 16 keys have a scale of their own,
because runs of keys may start anywhere. V is stored transposed, and its tiles begin at multiples of 16 tokens: the tensor
memory accelerator takes no others, and wide loads through pointers want the same.

SpargeAttn's second stage (`pv_threshold`): a tile of keys whose scores are all far below the running maximum of all
rows of the query tile still counts in the row sums and maxima, but its P V is skipped. Which tiles those are depends on
the order of the keys and on the tile sizes of the launch.

A `Tail` is quantised too where Hopper's kernel takes it. Elsewhere it is an attention of its own, in the inputs' precision,
and the two are put together by their log-sum-exps.

Precisions, dtypes, head dims and archs as in `quantised_attention`, but no INT4: its smoothing of Q needs fixed blocks.
"""

from functools import partial

import torch

from ..block_sparse.triton import (
    LOG2_E,
    Tail,
    block_sparse_attention,
    block_sparse_attention_reference,
    check,
    check_tail,
    key_tiles,
    query_tiles,
)
from ..clustering.permute import gather_tokens, gather_tokens_reference
from ..common import target
from ..common.aligned_tiles import aligned_key_tiles, separate_key_tiles
from ..common.merge import merge_attention, merge_attention_reference
from ..common.quantised_tile import Launch, attend_tile, finish_rows, key_source, value_source
from ..common.rounded import note_failure_reference, rounded_attention, unsmoothed_lse, unsmoothed_lse_reference
from ..common.target import tl, triton
from ..quantize.channels import (
    fp8_values,
    quantize_channels,
    quantize_channels_reference,
    statistics,
    statistics_reference,
)
from ..quantize.precision import PRECISIONS, SPARSE_PRECISIONS, find_precision, pv_dtype
from ..quantize.tokens import (
    absmax_of_rows,
    dequantize_tokens,
    padded_head_dim,
    quantize_tokens,
    quantize_tokens_reference,
    round_to_int8,
)
from . import hopper

PV_TILE = 64  # keys of a tile that pv_threshold skips, in the specification


def block_sparse_attention_quantised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    q_sizes: torch.Tensor,
    k_sizes: torch.Tensor,
    *,
    map_index: torch.Tensor,
    q_permutation: torch.Tensor | None = None,
    k_permutation: torch.Tensor | None = None,
    sm_scale: float | None = None,
    precision: str = "int8-fp8",
    smooth_k: bool = True,
    smooth_v: bool = False,
    pv_threshold: torch.Tensor | None = None,
    key_multiple: int = 1,
    failed: torch.Tensor | None = None,
    return_lse: bool = False,
    tail: Tail | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in 8 bits in which each query cluster sees only the key clusters its map row selects.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, in original order (in sorted order where q_permutation is None).
        k, v: [B, H, Sk, D], q's dtype, in original order (in sorted order where k_permutation is None).
        block_map: bool [M, Cq, Ck].
        q_sizes: int32 [M, Cq], tokens in each query cluster; a row sums to S. Zeros are allowed.
        k_sizes: int32 [M, Ck], tokens in each key cluster; a row sums to Sk. Zeros are allowed.
        map_index: int32 or int64 [B, H], which of the M maps a head uses.
        q_permutation: int32 or int64 [B, H, S], sorted -> original index of queries; None: identity.
        k_permutation: the same [B, H, Sk] for keys and values.
        sm_scale: softmax scale; default D ** -0.5.
        precision: "int8-fp8", "int8-fp8-acc16" (FP8 products summed in fp16) or "int8-fp16" (P V in 16 bits).
        smooth_k: take K's mean over all tokens off.
        smooth_v: take V's channel means off and add them to the output (FP8 only).
        pv_threshold: fp32 [H], >= 0: skip P V of a tile of keys where in no row of the query tile the tile's largest
            score comes within this many powers of two of the running maximum; None: never.
        key_multiple: every key cluster that is selected begins at a multiple of it; from 64 on, 64 keys share a scale and
            not 16, which takes less time.
        failed: int32 [B, H], set to 1 for a head whose sums are not finite or left the range of the quantised values.
        return_lse: also return the log-sum-exp.
        tail: what stands for the clusters that are not selected, or None: they are left out.

    Returns:
        out [B, H, S, D] in q's original order, dtype and memory layout; with return_lse also lse fp32 [B, H, S],
        natural log, of the scores before smoothing. A query with nothing selected gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, an unknown precision, smooth_v without FP8, a last dim is strided.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: head dim above 128; on the Triton path, a GPU without FP8 or a gradient would be needed.

    Source: arXiv 2505.18875, section 4.4 (dynamic block sizes), with the quantisation of arXiv 2411.10958, section 3.
    """
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    check(q, k, v, block_map, q_sizes, k_sizes, map_index, q_permutation, sm_scale)
    check_tail(q, q_sizes, tail)
    if pv_threshold is not None and (pv_threshold.shape != q.shape[1:2] or pv_threshold.dtype != torch.float32):
        raise ValueError(
            f"pv_threshold must be fp32 [H] = [{q.shape[1]}], got {pv_threshold.dtype} {tuple(pv_threshold.shape)}"
        )
    find_precision(precision, SPARSE_PRECISIONS, smooth_v)
    if key_multiple < 1:
        raise ValueError(f"key_multiple must be 1 or more, got {key_multiple}")
    if k_permutation is not None and k_permutation.shape != k.shape[:3]:
        raise ValueError(
            f"k_permutation must be [B, H, Sk] = {tuple(k.shape[:3])}, got {tuple(k_permutation.shape)}: expand it"
        )
    target.refuse_gradients("block_sparse_attention_quantised", q, k, v)
    if tail is not None and tail.bias.shape[2] == 0:
        tail = None
    op = _launch if target.use_triton(q) else block_sparse_attention_quantised_reference
    return op(
        q, k, v, block_map, q_sizes, k_sizes, map_index=map_index, q_permutation=q_permutation,
        k_permutation=k_permutation, sm_scale=sm_scale, precision=precision, smooth_k=smooth_k, smooth_v=smooth_v,
        pv_threshold=pv_threshold, key_multiple=key_multiple, failed=failed, return_lse=return_lse, tail=tail,
    )  # fmt: skip


def block_sparse_attention_quantised_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    q_sizes: torch.Tensor,
    k_sizes: torch.Tensor,
    *,
    map_index: torch.Tensor,
    q_permutation: torch.Tensor | None = None,
    k_permutation: torch.Tensor | None = None,
    sm_scale: float | None = None,
    precision: str = "int8-fp8",
    smooth_k: bool = True,
    smooth_v: bool = False,
    pv_threshold: torch.Tensor | None = None,
    key_multiple: int = 1,
    failed: torch.Tensor | None = None,
    return_lse: bool = False,
    tail: Tail | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Specification of `block_sparse_attention_quantised` in plain torch; same arguments and result.

    Quantised and turned back into fp32, then the unquantised specification with P rounded in its attention. For
    pv_threshold a query cluster is one query tile, and each PV_TILE of its selected keys one tile of keys. The tail is
    not quantised.
    """
    if tail is not None:
        found = block_sparse_attention_quantised_reference(
            q, k, v, block_map, q_sizes, k_sizes, map_index=map_index, q_permutation=q_permutation,
            k_permutation=k_permutation, sm_scale=sm_scale, precision=precision, smooth_k=smooth_k, smooth_v=smooth_v,
            pv_threshold=pv_threshold, key_multiple=key_multiple, failed=failed, return_lse=True,
        )  # fmt: skip
        other = _attend_tail(block_sparse_attention_reference, q, q_sizes, map_index, q_permutation, sm_scale, tail)
        return _merge(merge_attention_reference, found, other, return_lse)
    D = q.shape[-1]
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    kind = PRECISIONS[precision]
    stats = statistics_reference(k, v)
    mean = stats.k_mean if smooth_k else None
    keys = quantize_tokens_reference(k, side="k", groups=key_groups(key_multiple), mean=mean, permutation=k_permutation)
    if kind.fp8:
        channels = quantize_channels_reference(v, stats, smooth=smooth_v, limit=kind.v_range, permutation=k_permutation)
        values = fp8_values(channels, v.shape[2], D)
    else:
        values = v if k_permutation is None else gather_tokens_reference(v, k_permutation)
        values = values.to(pv_dtype(v)).float()
    rows, keys = dequantize_tokens(quantize_tokens_reference(q, side="q"), D), dequantize_tokens(keys, D)
    attend = partial(_attend, p_dtype=kind.p_dtype(v), acc16=kind.acc16)

    def sparse(heads, attend):
        order = None if q_permutation is None else q_permutation[:, heads]
        return block_sparse_attention_reference(
            rows[:, heads], keys[:, heads], values[:, heads], block_map, q_sizes, k_sizes,
            map_index=map_index[:, heads], q_permutation=order, sm_scale=sm_scale, return_lse=True, attend=attend,
        )  # fmt: skip

    if pv_threshold is None:
        out, lse = sparse(slice(None), attend)
    else:
        limits = pv_threshold.tolist()
        parts = [sparse(slice(h, h + 1), partial(attend, threshold=limit)) for h, limit in enumerate(limits)]
        out, lse = (torch.cat(part, 1) for part in zip(*parts))
    if kind.fp8:
        out = out * channels.scale[:, :, None, :D]
    if smooth_v:
        out = torch.where(lse[..., None] == -torch.inf, 0.0, out + channels.mean[:, :, None, :D])
    note_failure_reference(failed, out)
    out = torch.empty_like(q).copy_(out)
    return (out, unsmoothed_lse_reference(lse, q, mean, sm_scale)) if return_lse else out


def _attend_tail(op, q, q_sizes, map_index, q_permutation, sm_scale, tail):
    """Attention to the tail alone, without quantisation, and its log-sum-exp."""
    maps, clusters = q_sizes.shape
    nothing = torch.zeros(maps, clusters, 1, dtype=torch.bool, device=q.device)
    k_sizes = torch.full((maps, 1), tail.k.shape[2], dtype=torch.int32, device=q.device)
    return op(
        q, tail.k, tail.v, nothing, q_sizes, k_sizes,
        map_index=map_index, q_permutation=q_permutation, sm_scale=sm_scale, return_lse=True, tail=tail,
    )  # fmt: skip


def _merge(op, found, other, return_lse):
    """One attention of the selected keys' and the tail's, each an output and a log-sum-exp."""
    (out, lse), (_, other_lse) = found, other
    op(out, lse, *other)
    return (out, torch.logaddexp(lse, other_lse)) if return_lse else out


def key_groups(key_multiple: int) -> str:
    """Which keys share a scale, as `quantize_tokens` has it: no tile of keys may begin inside of a group.

    Args:
        key_multiple: tiles begin at multiples of 16, and runs of tiles at multiples of this.
    """
    return "warp" if key_multiple % 64 == 0 else "sixteen"


def _attend(q, k, v, scale, p_dtype, acc16, threshold=None):
    if threshold is None:
        return rounded_attention(q, k, v, scale, p_dtype, acc16=acc16)[0]
    scores = q @ k.transpose(2, 3) * (scale * LOG2_E)  # [1, N, s, n], base 2
    p = torch.exp2(scores - scores.amax(-1, keepdim=True))
    largest = 448 if p_dtype == torch.float8_e4m3fn else 1
    rounded = (p * largest).to(p_dtype).float() / largest
    skipped = skipped_tiles(scores, threshold).repeat_interleave(PV_TILE, -1)[..., : k.shape[2]]  # [1, N, n]
    return rounded.masked_fill(skipped[:, :, None], 0) @ v / p.sum(-1, keepdim=True)


def skipped_tiles(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which tiles of PV_TILE keys are left out of P V, where `threshold` is given and the rows are one query tile.

    Args:
        scores: fp32 [..., s, n], base 2, keys in the order in which they are computed.
        threshold: powers of two.

    Returns:
        bool [..., ceil(n / PV_TILE)].

    Source: arXiv 2502.18137, section 3.4 (sparse warp online softmax).
    """
    peaks = torch.stack([tile.amax(-1) for tile in scores.split(PV_TILE, -1)], -1)  # [..., s, tiles]
    before = peaks.cummax(-1).values.roll(1, -1)
    before[..., 0] = -torch.inf
    return (peaks - before < -threshold).all(-2)


# arch -> (P V in FP8, padded head dim) -> tile sizes. sm90 was measured on an H100, the others were not: chosen by ahead-of-time
# compile (no spills, shared memory).
LAUNCH = {
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
}  # fmt: skip


def _launch(
    q, k, v, block_map, q_sizes, k_sizes,
    *, map_index, q_permutation, k_permutation, sm_scale, precision, smooth_k, smooth_v, pv_threshold, key_multiple,
    failed, return_lse, tail,
):  # fmt: skip
    kind = PRECISIONS[precision]
    fp8 = kind.fp8
    if fp8:
        target.require_fp8(q.device)
    B, H, S, D = q.shape
    Sk, block_d = k.shape[2], padded_head_dim(D)
    row = target.launch_row(LAUNCH, q.device)[fp8, block_d]
    specialised = hopper.takes(q, kind, row)
    if tail is not None and not (specialised and hopper.FUSED_TAIL and pv_threshold is None):
        found = _launch(
            q, k, v, block_map, q_sizes, k_sizes, map_index=map_index, q_permutation=q_permutation,
            k_permutation=k_permutation, sm_scale=sm_scale, precision=precision, smooth_k=smooth_k, smooth_v=smooth_v,
            pv_threshold=pv_threshold, key_multiple=key_multiple, failed=failed, return_lse=True, tail=None,
        )  # fmt: skip
        other = _attend_tail(block_sparse_attention, q, q_sizes, map_index, q_permutation, sm_scale, tail)
        return _merge(merge_attention, found, other, return_lse)
    stats = statistics(k, v) if smooth_k or fp8 else None
    mean = stats.k_mean if smooth_k else None
    as_keys = partial(quantize_tokens, side="k", groups=key_groups(key_multiple), mean=mean)
    as_values = partial(quantize_channels, stats=stats, smooth=smooth_v, limit=kind.v_range, interleave=specialised)
    keys, channels = as_keys(k, permutation=k_permutation), None
    if fp8:
        channels = as_values(v, permutation=k_permutation)
        values = channels.values
    else:
        values = (v if k_permutation is None else gather_tokens(v, k_permutation)).to(pv_dtype(v))
    out = torch.empty_like(q)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device) if return_lse else None
    with target.on_device(q):
        q_tiles, q_counts = query_tiles(q_sizes, S, hopper.QUERY_ROWS if specialised else row.block_m)
        cut = separate_key_tiles if key_multiple % row.block_n == 0 else aligned_key_tiles if fp8 else key_tiles
        k_tiles, k_counts = cut(block_map, k_sizes, Sk, row.block_n)
    if specialised:
        lists = q_tiles, q_counts, k_tiles, k_counts
        if tail is not None:
            tail = as_keys(_used_keys(tail, map_index, mean)), as_values(tail.v), tail.bias
        hopper.launch(
            q, keys, channels, out, lse, failed, q_permutation, pv_threshold, map_index, lists, block_map.shape[1],
            sm_scale * LOG2_E, 64 if key_multiple % 64 == 0 else 16, tail,
        )  # fmt: skip
        return (out, unsmoothed_lse(lse, q, mean, sm_scale)) if return_lse else out
    with target.on_device(q):
        _sparse_quantised_kernel[(q_tiles.shape[1], B * H)](
            q, key_source(keys.values, row), keys.scale, value_source(values, row),
            channels.scale if fp8 else None, channels.mean if fp8 else None, out, lse, failed, q_permutation,
            pv_threshold, map_index.contiguous(), q_tiles, q_counts, k_tiles, k_counts,
            sm_scale * LOG2_E, H, S, Sk, block_map.shape[1], q_tiles.shape[1], k_tiles.shape[2],
            *q.stride()[:3], *values.stride()[:3], *out.stride()[:3],
            *((0, 0, 0) if q_permutation is None else q_permutation.stride()),
            D=D, BLOCK_D=block_d, BLOCK_M=row.block_m, BLOCK_N=row.block_n, FP8=fp8, ACC16=kind.acc16,
            TWO_LEVEL=row.two_level, MAGIC=row.magic, TMA=row.tma,
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
    ACC16: tl.constexpr, TWO_LEVEL: tl.constexpr, MAGIC: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
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
    largest = tl.where(largest > 1e-30, largest, 1.0)  # quantize.TINY
    q_tile = round_to_int8(q_wide, tl.div_rn(tl.full([BLOCK_M], 127.0, tl.float32), largest)[:, None])
    row_scale = tl.where(largest < float("inf"), largest / 127.0, float("nan")) * scale_log2
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
            D, BLOCK_D, BLOCK_N, False, False, True, FP8, ACC16, TWO_LEVEL, MAGIC, TMA, pv_floor,
        )  # fmt: skip
    for i in range(full, tl.load(key_counts + map_row * 2 + 1)):
        entry = tl.load(tiles + i)
        first, keys = entry // BLOCK_N, entry % BLOCK_N + 1
        skip = first % (16 if FP8 else 1)
        acc, l_i, m_i = attend_tile(
            q_tile, row_scale, k, k_scale, v, None, None, 0, k_row, v_row, 0, stride_v, first - skip, skip + keys, offs_m,
            acc, l_i, m_i,
            D, BLOCK_D, BLOCK_N, True, False, True, FP8, ACC16, TWO_LEVEL, MAGIC, TMA, pv_floor, skip,
        )  # fmt: skip
    acc = finish_rows(acc, l_i, v_scale, v_mean, failed, bh, bh * BLOCK_D, BLOCK_D, FP8, ACC16)
    out_ptr = out + b * stride_ob + h * stride_oh + token[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        total = m_i + tl.log2(tl.where(l_i == 0, 1.0, l_i)) - (8.807354922057604 if FP8 else 0.0)
        tl.store(lse + bh * S + token, total * 0.6931471805599453, mask=inside)  # ln 2
