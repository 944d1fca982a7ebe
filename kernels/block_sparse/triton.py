"""Attention over a map of variable-size blocks: query cluster i attends to key cluster j where block_map[i, j].

    out[t] = sum_s p_ts v_s / sum_s p_ts,   p_ts = exp(sm_scale * q_t . k_s - max),   s in the selected clusters

With a `Tail` the clusters that are not selected take part too, each as one key: n_j equal keys at the mean key.

Three kernels. `_query_tiles_kernel` cuts every query cluster into tiles of BLOCK_M rows. `_key_tiles_kernel` merges
neighbouring selected key clusters of a map row into runs and cuts those into tiles of BLOCK_N keys, full tiles first,
so that `_attention_kernel` has two flat loops: full tiles without a mask, then each run's last tile with one.
K and V tiles come through the tensor memory accelerator (`tma`) or through pointers, as the launch table says; a tile
may start at any row, so what the accelerator brings beyond a run is masked by its score (those values must be finite).
Surplus programs of the upper-bound grid exit at once, so nothing waits for the device and a CUDA graph can hold it all.
Memory besides the output: 4 bytes for each (query cluster, key tile), which is Cq * (S / BLOCK_N + Ck / 2) a map.

fp16, bf16 and fp32 (fp32 as three TF32 products), fp32 accumulation, base-2 softmax. Head dims up to 128, padded to a
power of two. sm80 and newer.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..common import target
from ..common.target import tl, triton
from . import hopper as block_sparse_hopper

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E = 1.4426950408889634
LSE_CHUNK = 1 << 22


class Tail(NamedTuple):
    """Keys that stand for clusters: their means, and how many keys each one is.

    Args:
        k: [B, H, C, D], q's dtype, contiguous: the mean key of each of the first C key clusters.
        v: [B, H, C, D], q's dtype, contiguous: the mean value.
        bias: fp32 [M, Cq, C], added to the logits: log of the cluster's size; -inf where a query cluster selects it.
    """

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    q_sizes: torch.Tensor,
    k_sizes: torch.Tensor,
    *,
    map_index: torch.Tensor,
    q_permutation: torch.Tensor | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    tail: Tail | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which each query cluster sees only the key clusters its map row selects.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, in original order (in sorted order where q_permutation is None).
        k: [B, H, Sk, D], q's dtype, in sorted order (see `gather_tokens`).
        v: [B, H, Sk, D], q's dtype, in k's order.
        block_map: bool [M, Cq, Ck].
        q_sizes: int32 [M, Cq], tokens in each query cluster; a row sums to S. Zeros are allowed.
        k_sizes: int32 [M, Ck], tokens in each key cluster; a row sums to Sk. Zeros are allowed.
        map_index: int32 or int64 [B, H], which of the M maps a head uses.
        q_permutation: int32 or int64 [B, H, S], sorted -> original index of queries; None: identity.
        sm_scale: softmax scale; default D ** -0.5.
        return_lse: also return the log-sum-exp.
        tail: what stands for the clusters that are not selected, or None: they are left out.

    Returns:
        out [B, H, S, D] in q's original order, dtype and memory layout; with return_lse also lse fp32 [B, H, S],
        natural log. A query with nothing selected gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, a last dim is strided, sm_scale is not positive, or (on CPU) sizes miss tokens.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.

    Source: arXiv 2505.18875, section 4.4 (attention with dynamic block sizes); the tail: arXiv 2603.08982 (SVG-EAR).
    """
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    check(q, k, v, block_map, q_sizes, k_sizes, map_index, q_permutation, sm_scale)
    check_tail(q, q_sizes, tail)
    op = _launch if target.use_triton(q) else block_sparse_attention_reference
    return op(
        q, k, v, block_map, q_sizes, k_sizes,
        map_index=map_index, q_permutation=q_permutation, sm_scale=sm_scale, return_lse=return_lse, tail=tail,
    )  # fmt: skip


def block_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    q_sizes: torch.Tensor,
    k_sizes: torch.Tensor,
    *,
    map_index: torch.Tensor,
    q_permutation: torch.Tensor | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    tail: Tail | None = None,
    attend: Callable[..., torch.Tensor] = F.scaled_dot_product_attention,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Specification of `block_sparse_attention` in plain torch; same arguments and result, any dtype and head dim.

    One dense attention for each query cluster over its selected keys, all heads of a map at once: memory stays linear.
    `attend` is that attention.
    """
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    B, H, S, D = q.shape
    index = None if q_permutation is None else q_permutation.long().reshape(B * H, S)
    rows, keys, values = (x.reshape(B * H, -1, D) for x in (q, k, v))
    if index is not None:
        rows = rows.gather(1, index[..., None].expand(-1, -1, D))
    out = torch.zeros_like(rows)
    lse = torch.full(rows.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    map_index = map_index.reshape(-1)
    for m in map_index.unique().tolist():
        heads = (map_index == m).nonzero().squeeze(1)
        part = None if tail is None else Tail(*(x.flatten(0, 1)[heads] for x in tail[:2]), tail.bias[m])
        out[heads], lse[heads] = _attend_one_map(
            rows[heads], keys[heads], values[heads], block_map[m], q_sizes[m], k_sizes[m], sm_scale, return_lse, attend, part
        )
    if index is not None:
        out = torch.empty_like(out).scatter_(1, index[..., None].expand(-1, -1, D), out)
        lse = torch.empty_like(lse).scatter_(1, index, lse)
    out = torch.empty_like(q).copy_(out.view(B, H, S, D))
    return (out, lse.view(B, H, S)) if return_lse else out


def _attend_one_map(q, k, v, block_map, q_sizes, k_sizes, sm_scale, with_lse, attend, tail):
    """q [N, S, D], k and v [N, Sk, D] of the N heads that share a map -> out [N, S, D], lse [N, S]."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    token_map = block_map.repeat_interleave(k_sizes, dim=1)  # [Cq, Sk]
    selected_counts = token_map.sum(1).tolist()
    stop = 0
    for i, size in enumerate(q_sizes.tolist()):
        start, stop = stop, stop + size
        if size and tail is not None:
            rows = _with_tail(q[:, start:stop], k, v, token_map[i], tail, i, sm_scale, with_lse)
            out[:, start:stop] = rows[0]
            if with_lse:
                lse[:, start:stop] = rows[1]
            continue
        if size == 0 or selected_counts[i] == 0:
            continue
        dense = selected_counts[i] == k.shape[1]
        chosen = None if dense else token_map[i].nonzero().squeeze(1)
        k_i, v_i = (k, v) if dense else (k.index_select(1, chosen), v.index_select(1, chosen))
        q_i = q[:, start:stop]
        out[:, start:stop] = attend(q_i[None], k_i[None], v_i[None], scale=sm_scale)[0]
        if with_lse:
            lse[:, start:stop] = _log_sum_exp(q_i.to(lse.dtype), k_i.to(lse.dtype), sm_scale)
    return out, lse


def _with_tail(q, k, v, selected, tail, i, sm_scale, with_lse):
    """Exact keys and the tail's in one softmax: q [N, n, D] -> out [N, n, D], lse [N, n] or None."""
    wide = torch.promote_types(q.dtype, torch.float32)  # in 16 bits the bias would lose its digits
    bias = tail.bias[i].to(wide)
    exact, counted = selected.nonzero().squeeze(1), bias.isfinite().nonzero().squeeze(1)
    if exact.numel() + counted.numel() == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    keys, values = (
        torch.cat([x.index_select(1, exact), means.index_select(1, counted)], 1).to(wide)
        for x, means in ((k, tail.k), (v, tail.v))
    )
    bias = torch.cat([bias.new_zeros(exact.numel()), bias[counted]])
    q = q.to(wide)
    out = F.scaled_dot_product_attention(q[None], keys[None], values[None], bias[None, None, None], scale=sm_scale)[0]
    return out.to(k.dtype), _log_sum_exp(q, keys, sm_scale, bias) if with_lse else None


def _log_sum_exp(q, k, sm_scale, bias=0.0):
    chunk = max(1, LSE_CHUNK // (k.shape[0] * k.shape[1]))
    parts = [torch.logsumexp(part @ k.transpose(1, 2) * sm_scale + bias, dim=-1) for part in q.split(chunk, dim=1)]
    return torch.cat(parts, dim=1)


def check(q, k, v, block_map, q_sizes, k_sizes, map_index, q_permutation, sm_scale) -> None:
    """Raises ValueError or TypeError where the arguments of a block-sparse attention do not fit together."""
    if q.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            "q must be [B, H, S, D] and k, v [B, H, Sk, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: expand k and v to q's heads"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: convert them")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dim, got strides {x.stride()}: call .contiguous()")
    M, Cq, Ck = block_map.shape if block_map.dim() == 3 else (0, 0, 0)
    if block_map.dtype != torch.bool or M == 0 or q_sizes.shape != (M, Cq) or k_sizes.shape != (M, Ck):
        raise ValueError(
            "block_map must be bool [M, Cq, Ck] with q_sizes [M, Cq] and k_sizes [M, Ck], "
            f"got {block_map.dtype} {tuple(block_map.shape)}, {tuple(q_sizes.shape)}, {tuple(k_sizes.shape)}: reshape them"
        )
    if map_index.shape != q.shape[:2]:
        raise ValueError(f"map_index must be [B, H] = {tuple(q.shape[:2])}, got {tuple(map_index.shape)}: expand it")
    if q_permutation is not None and q_permutation.shape != q.shape[:3]:
        raise ValueError(
            f"q_permutation must be [B, H, S] = {tuple(q.shape[:3])}, got {tuple(q_permutation.shape)}: expand it"
        )
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be positive, got {sm_scale}: scale q instead")
    # On CUDA the sums would cost a wait for the device.
    if not q.is_cuda:
        for name, sizes, total in (("q_sizes", q_sizes, q.shape[2]), ("k_sizes", k_sizes, k.shape[2])):
            if bool((sizes.sum(1) != total).any()):
                raise ValueError(
                    f"{name} must sum to {total} tokens in each row, got {sizes.sum(1).tolist()}: "
                    "count every token once, also text and padding"
                )


def check_tail(q, q_sizes, tail) -> None:
    if tail is None:
        return
    B, H, _, D = q.shape
    C = tail.k.shape[2] if tail.k.dim() == 4 else 0
    if tail.k.shape != (B, H, C, D) or tail.v.shape != tail.k.shape or tail.bias.shape != (*q_sizes.shape, C):
        raise ValueError(
            f"tail must hold k and v [B, H, C, D] = [{B}, {H}, C, {D}] and bias [M, Cq, C], "
            f"got {tuple(tail.k.shape)}, {tuple(tail.v.shape)}, {tuple(tail.bias.shape)}: reshape them"
        )
    if not tail.k.dtype == tail.v.dtype == q.dtype or tail.bias.dtype != torch.float32:
        raise TypeError(
            f"tail must hold k and v of q's dtype {q.dtype} and an fp32 bias, "
            f"got {tail.k.dtype}, {tail.v.dtype}, {tail.bias.dtype}: convert them"
        )


@dataclass(frozen=True)
class Launch:
    """How one architecture, dtype width and padded head dim is computed.

    Args:
        block_m, block_n: rows and keys of a tile.
        num_warps, num_stages: as Triton takes them.
        tma: load K and V through descriptors (Hopper and newer); rows that are no multiple of 16 bytes take pointers.
        lazy: keep a row's stale maximum until it is 2^8 too small, and rescale only then.
        specialised: on sm90, tiles of 128 x 64 and contiguous k and v take block_sparse_hopper.py's kernel with this many
            stages (k and v are copied where there are few keys a query); what it cannot take runs as the other fields say.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    lazy: bool = False
    specialised: bool = False

    def name(self) -> str:
        """Such as 128x64_w8_s3_tma."""
        flags = "".join(f"_{flag}" for flag in ("tma", "lazy", "specialised") if getattr(self, flag))
        return f"{self.block_m}x{self.block_n}_w{self.num_warps}_s{self.num_stages}{flags}"


def candidates() -> Iterator[Launch]:
    """Rows worth timing for 16-bit inputs; what doesn't fit a GPU is refused at its launch."""
    for stages in (2, 3):
        yield Launch(128, 64, 8, stages, tma=True, specialised=True)
    for tma, lazy in itertools.product((False, True), (False, True)):
        for m, n, warps in ((128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4), (256, 64, 16)):
            for stages in (2, 3):
                yield Launch(m, n, warps, stages, tma, lazy)


# arch -> (element bytes, padded head dim) -> tile sizes; smaller head dims take the 64 row.
# sm90 is measured (docs/benchmarks.md), the others are not: chosen by ahead-of-time compile (no spills, shared memory);
# `svg bench attention --sweep` times others.
LAUNCH = {
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
}  # fmt: skip


def _launch(q, k, v, block_map, q_sizes, k_sizes, *, map_index, q_permutation, sm_scale, return_lse, tail):
    B, H, S, D = q.shape
    Cq = block_map.shape[1]
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head dim must be at most {MAX_HEAD_DIM}, got {D}: use dense attention for this model"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f"q, k and v must be fp16, bf16 or fp32, got {q.dtype}: convert them")
    target.refuse_gradients("block_sparse_attention", q, k, v)
    block_d = max(16, triton.next_power_of_2(D))
    row = target.launch_row(LAUNCH, q.device)[q.element_size(), max(64, block_d)]
    out = torch.empty_like(q)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device) if return_lse else None
    tma = row.tma and target.fits_descriptor(k) and target.fits_descriptor(v)
    perm_strides = (0, 0, 0) if q_permutation is None else q_permutation.stride()
    with target.on_device(q):
        q_tiles, query_counts = query_tiles(q_sizes, S, row.block_m)
        k_tiles, key_counts = key_tiles(block_map, k_sizes, k.shape[2], row.block_n, q_sizes)
        lists = (q_tiles, query_counts, k_tiles, key_counts)
        tail = None if tail is None else Tail(*(x.contiguous() for x in tail))
        if row.specialised and 4 * S >= k.shape[2]:
            k, v = k.contiguous(), v.contiguous()  # a copy costs a fiftieth of the call, the other kernel half as much again
        if row.specialised and block_sparse_hopper.takes(q, k, v, row):
            scale = sm_scale * LOG2_E
            block_sparse_hopper.launch(q, k, v, out, lse, q_permutation, map_index, lists, Cq, scale, row.num_stages, tail)
            return (out, lse) if return_lse else out
        k_tail, v_tail, bias = (None, None, None) if tail is None else tail
        launch = target.with_workspace(_attention_kernel[(q_tiles.shape[1], B * H)], q.device)
        launch(
            q, k, v, out, lse, q_permutation, map_index.contiguous(), *lists, k_tail, v_tail, bias,
            sm_scale * LOG2_E, H, S, k.shape[2], Cq, q_tiles.shape[1], k_tiles.shape[2],
            0 if tail is None else bias.shape[2],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *perm_strides,
            D=D, BLOCK_D=block_d, BLOCK_M=row.block_m, BLOCK_N=row.block_n,
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", TMA=tma, LAZY=row.lazy,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def query_tiles(q_sizes: torch.Tensor, tokens: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query cluster cut into tiles of block_m rows.

    Args:
        q_sizes: int32 [M, Cq], tokens in each query cluster.
        tokens: S.
        block_m: rows of a tile.

    Returns:
        int32 [M, T, 3] of (cluster, first sorted row, rows), and how many of the T are used, int32 [M].
    """
    M, Cq = q_sizes.shape
    tiles = torch.empty(M, tokens // block_m + Cq, 3, dtype=torch.int32, device=q_sizes.device)
    counts = torch.empty(M, dtype=torch.int32, device=q_sizes.device)
    _query_tiles_kernel[(M,)](
        q_sizes.contiguous(), tiles, counts, Cq, tiles.shape[1], BLOCK_M=block_m, BLOCK_C=_block_c(Cq)
    )
    return tiles, counts


def key_tiles(
    block_map: torch.Tensor, k_sizes: torch.Tensor, tokens: int, block_n: int, q_sizes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of selected key clusters cut into tiles of block_n keys, full tiles first.

    Args:
        block_map: bool [M, Cq, Ck].
        k_sizes: int32 [M, Ck], tokens in each key cluster.
        tokens: Sk.
        block_n: keys of a tile.
        q_sizes: int32 [M, Cq]: rows of empty query clusters are left unwritten; None: all are written.

    Returns:
        int32 [M, Cq, W] of first key * block_n + keys - 1, and int32 [M, Cq, 2], how many are full and how many in all.
    """
    M, Cq, Ck = block_map.shape
    if tokens * block_n >= 1 << 31:
        raise NotImplementedError(
            f"k must have fewer than {(1 << 31) // block_n} tokens, got {tokens}: split the video"
        )
    # A run ends in at most one partial tile, and two runs have an unselected cluster between them.
    tiles = torch.empty(M, Cq, tokens // block_n + (Ck + 1) // 2, dtype=torch.int32, device=block_map.device)
    counts = torch.empty(M, Cq, 2, dtype=torch.int32, device=block_map.device)
    _key_tiles_kernel[(Cq, M)](
        block_map.contiguous().view(torch.uint8), None if q_sizes is None else q_sizes.contiguous(), k_sizes.contiguous(),
        tiles, counts, Cq, Ck, tokens, tiles.shape[2], BLOCK_N=block_n, BLOCK_C=_block_c(Ck),
    )  # fmt: skip
    return tiles, counts


def _block_c(clusters: int) -> int:
    return max(16, triton.next_power_of_2(clusters))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["Cq", "width"])
def _query_tiles_kernel(sizes, tiles, counts, Cq, width, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    m = tl.program_id(0)
    cluster = tl.arange(0, BLOCK_C)  # [BC]
    n = tl.load(sizes + m * Cq + cluster, mask=cluster < Cq, other=0)
    start = tl.cumsum(n) - n
    own = tl.cdiv(n, BLOCK_M)
    position = tl.cumsum(own) - own
    tl.store(counts + m, tl.sum(own))
    for r in range(tl.max(own)):
        entry = tiles + (m * width + position + r) * 3
        todo = r < own
        tl.store(entry, cluster, mask=todo)
        tl.store(entry + 1, start + r * BLOCK_M, mask=todo)
        tl.store(entry + 2, tl.minimum(n - r * BLOCK_M, BLOCK_M), mask=todo)


@triton.jit(do_not_specialize=["Cq", "Ck", "tokens", "width"])
def _key_tiles_kernel(
    block_map, q_sizes, sizes, tiles, counts, Cq, Ck, tokens, width, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64) * Cq + tl.program_id(0)
    if q_sizes is not None:
        if tl.load(q_sizes + row) == 0:
            return
    cluster = tl.arange(0, BLOCK_C)  # [BC]
    n = tl.load(sizes + tl.program_id(1) * Ck + cluster, mask=cluster < Ck, other=0)
    picked = tl.load(block_map + row * Ck + cluster, mask=cluster < Ck, other=0) != 0
    start = tl.cumsum(n) - n
    # A run reaches from the end of the last skipped cluster to the start of the next one; empty clusters do not break it.
    skipped = (n > 0) & ~picked
    run_start = tl.associative_scan(tl.where(skipped, start + n, 0), 0, _larger)
    run_stop = tl.associative_scan(tl.where(skipped, start, tokens), 0, _smaller, reverse=True)
    # Each cluster writes those tiles of its run that begin inside it.
    offset = start - run_start
    first = tl.where(picked, tl.cdiv(offset, BLOCK_N), 0)
    stop = tl.where(picked, tl.cdiv(offset + n, BLOCK_N), 0)
    run_full = (run_stop - run_start) // BLOCK_N
    full = tl.minimum(stop, run_full) - tl.minimum(first, run_full)
    partial = stop - first - full
    all_full = tl.sum(full)
    tl.store(counts + row * 2, all_full)
    tl.store(counts + row * 2 + 1, all_full + tl.sum(partial))
    entry = tiles + row * width + tl.cumsum(full) - full
    for r in range(tl.max(full)):
        key = run_start + (first + r) * BLOCK_N
        tl.store(entry + r, key * BLOCK_N + (BLOCK_N - 1), mask=r < full)
    entry = tiles + row * width + all_full + tl.cumsum(partial) - partial
    key = run_start + run_full * BLOCK_N
    tl.store(entry, key * BLOCK_N + (run_stop - key - 1), mask=partial > 0)


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
    TMA: tl.constexpr, LAZY: tl.constexpr,
):  # fmt: skip
    first = tile // BLOCK_N
    inside = tl.arange(0, BLOCK_N) <= tile % BLOCK_N  # [BN]
    k_tile = _load_tile(k, first, inside, stride_ks, D, BLOCK_D, BLOCK_N, PARTIAL, TMA)
    v_tile = _load_tile(v, first, inside, stride_vs, D, BLOCK_D, BLOCK_N, PARTIAL, TMA)
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # [BM, BN]
    if PARTIAL:
        s = tl.where(inside[None, :], s, float("-inf"))
    return _accumulate(s, scale_log2, v_tile, acc, l_i, m_i, PRECISION, LAZY)


@triton.jit
def _accumulate(s, scale, v_tile, acc, l_i, m_i, PRECISION: tl.constexpr, LAZY: tl.constexpr):
    """One tile of the online softmax; s * scale [BM, BN] in base 2, and one finite entry a row in this tile or before."""
    peak = tl.max(s, 1) * scale  # [BM]
    if LAZY:
        m_new = tl.where(peak > m_i + 8.0, peak, m_i)
        if tl.max((m_new > m_i).to(tl.int32), 0) > 0:
            alpha = tl.exp2(m_i - m_new)
            acc = acc * alpha[:, None]
            l_i = l_i * alpha
    else:
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
    log_size = tl.load(bias + offs_n, mask=offs_n < C, other=float("-inf")) * 1.4426950408889634  # log2 e
    s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2 + log_size[None, :]
    m_i = tl.maximum(m_i, -1e30)  # nothing so far and nothing here: no difference of infinities
    return _accumulate(s, 1.0, v_tile, acc, l_i, m_i, PRECISION, False)


@triton.jit(do_not_specialize=["S", "Sk", "Cq", "query_width", "key_width", "C"])
def _attention_kernel(
    q, k, v, out, lse, permutation, map_index, query_tiles, query_counts, key_tiles, key_counts,
    k_tail, v_tail, bias, scale_log2, H, S, Sk, Cq, query_width, key_width, C,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    stride_pb, stride_ph, stride_ps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, LAZY: tl.constexpr,
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
            D, BLOCK_D, BLOCK_N, False, PRECISION, TMA, LAZY,
        )  # fmt: skip
    for i in range(full, tl.load(key_counts + row * 2 + 1)):
        acc, l_i, m_i = _attend_tile(
            q_tile, k, v, tl.load(tiles + i), acc, l_i, m_i, scale_log2, stride_ks, stride_vs,
            D, BLOCK_D, BLOCK_N, True, PRECISION, TMA, LAZY,
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
        natural = (m_i + tl.log2(divisor)) * 0.6931471805599453  # ln 2; m_i is -inf where nothing is selected
        tl.store(lse + bh * S + token, natural, mask=inside)
