"""Token permutation by cluster: sort labels, invert, gather and scatter rows.

    permutation[i] = original index of the i-th token in sorted order
    gather:  out[i] = x[permutation[i]]          scatter:  out[permutation[i]] = x[i]

Any dtype, any head dim, sm80 and newer. Offsets are 64-bit; inputs may be strided (last dim contiguous).
"""

from typing import NamedTuple

import torch

from ..common import target
from ..common.launch import LaunchTable
from ..common.target import tl, triton

INT16_LABELS = 1 << 15
MAX_COUNTED = 4096  # more clusters are sorted by torch
CHUNK = 256  # tokens counted together; a byte holds a rank among them
SCANNED, SCANNED_CHUNKS = 16, 64  # clusters a program, and chunks at a time: more would spill


def sort_labels(labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stable order of tokens by cluster, and the cluster sizes; never waits for the device.

    Args:
        labels: int [B, H, S] (or [..., S]), each in [0, num_clusters).
        num_clusters: C.

    Returns:
        permutation int32 [B, H, S], sorted -> original index; sizes int32 [B, H, C].

    Raises:
        ValueError: num_clusters below 1.
        TypeError: labels are not integers.

    Source: arXiv 2505.18875, section 4.2 (semantic-aware permutation).
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}: pass what kmeans returns")
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, got {num_clusters}: pass the number of centroids")
    if target.use_triton(labels) and num_clusters <= MAX_COUNTED:
        return _count_and_place(labels, num_clusters)
    return sort_labels_reference(labels, num_clusters)


def sort_labels_reference(labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of `sort_labels` in plain torch; same arguments and result."""
    # A radix sort of 16-bit keys takes half the passes.
    narrow = labels.to(torch.int16 if num_clusters <= INT16_LABELS else torch.int32)
    ordered, permutation = torch.sort(narrow, dim=-1, stable=True)
    edges = torch.arange(num_clusters, dtype=narrow.dtype, device=labels.device).expand(*labels.shape[:-1], -1)
    ends = torch.searchsorted(ordered, edges.contiguous(), right=True, out_int32=True)
    return permutation.to(torch.int32), torch.diff(ends, prepend=torch.zeros_like(ends[..., :1]))


def _count_and_place(labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A counting sort: how often each chunk has each label, where that puts its tokens, and each token there."""
    labels = labels.contiguous()
    S = labels.shape[-1]
    flat = labels.view(-1, S)
    counters = new_counters(flat.shape[0], S, num_clusters, labels.device)
    with target.on_device(labels):
        _count_kernel[(counters.counts.shape[1], flat.shape[0])](flat, counters.counts, S, num_clusters, CHUNK=CHUNK)
    return place_counted(labels, counters)[:2]


class Counters(NamedTuple):
    """What a counting sort counts in; zero before and after it.

    Args:
        counts: int32 [rows, chunks, C], how often each CHUNK tokens have each label.
        tickets: int32 [rows], how many programs have finished a row.
    """

    counts: torch.Tensor
    tickets: torch.Tensor


def new_counters(rows: int, S: int, num_clusters: int, device: torch.device) -> Counters:
    """Zeros for sorts of [rows, S] labels."""
    chunks = triton.cdiv(S, CHUNK)
    zeros = torch.zeros(rows * (chunks * num_clusters + 1), dtype=torch.int32, device=device)
    return Counters(zeros[:-rows].view(rows, chunks, num_clusters), zeros[-rows:])


def place_counted(labels: torch.Tensor, counters: Counters) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The second half of a counting sort, on the Triton path.

    Args:
        labels: int [..., S], contiguous.
        counters: with the labels' counts; zero again afterwards.

    Returns:
        permutation int32 [..., S]; sizes and their running sum, int32 [..., C].
    """
    S = labels.shape[-1]
    rows, chunks, C = counters.counts.shape
    permutation = torch.empty(labels.shape, dtype=torch.int32, device=labels.device)
    sizes, ends = (torch.empty(*labels.shape[:-1], C, dtype=torch.int32, device=labels.device) for _ in range(2))
    early = target.overlapped(labels.device)
    with target.on_device(labels):
        _scan_kernel[(triton.cdiv(C, SCANNED), rows)](
            *counters, sizes, ends, chunks, C,
            BLOCK_C=SCANNED, BLOCK=min(SCANNED_CHUNKS, max(16, triton.next_power_of_2(chunks))), SUMMED=1024,
            **early,
        )  # fmt: skip
        _place_kernel[(chunks, rows)](
            labels, counters.counts, sizes, ends, permutation, S, C,
            CHUNK=CHUNK, BLOCK_C=max(16, triton.next_power_of_2(C)), BITS=max(1, (C - 1).bit_length()), **early,
        )  # fmt: skip
    return permutation, sizes, ends


def inverse_permutation(permutation: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes another: inverse[permutation[i]] = i.

    Args:
        permutation: int [B, H, S] (or [..., S]), each row a permutation of 0 .. S-1.

    Returns:
        The same shape and dtype, original -> sorted index.
    """
    positions = torch.arange(permutation.shape[-1], dtype=permutation.dtype, device=permutation.device)
    return torch.empty_like(permutation).scatter_(-1, permutation.long(), positions.expand_as(permutation))


def gather_tokens(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Rows of x in sorted order: out[b, h, i] = x[b, h, permutation[b, h, i]].

    Args:
        x: [B, H, S, D], last dim contiguous, other strides arbitrary.
        permutation: int32 or int64 [B, H, S], sorted -> original index.

    Returns:
        Contiguous [B, H, S, D] of x's dtype.

    Raises:
        ValueError: shapes disagree, or x's last dim is strided.
        TypeError: permutation is not int32 or int64.
        NotImplementedError: a gradient would be needed on the Triton path.
    """
    _check(x, permutation)
    if not target.use_triton(x):
        return gather_tokens_reference(x, permutation)
    return _move(x, permutation, scatter=False)


def gather_tokens_reference(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Specification of `gather_tokens` in plain torch; same arguments and result."""
    return torch.gather(x, 2, permutation.long().unsqueeze(-1).expand_as(x))


def scatter_tokens(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Rows of x back in original order: out[b, h, permutation[b, h, i]] = x[b, h, i].

    Args, Returns, Raises: as of `gather_tokens`, x in sorted order.
    """
    _check(x, permutation)
    if not target.use_triton(x):
        return scatter_tokens_reference(x, permutation)
    return _move(x, permutation, scatter=True)


def scatter_tokens_reference(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Specification of `scatter_tokens` in plain torch; same arguments and result."""
    index = permutation.long().unsqueeze(-1).expand_as(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).scatter_(2, index, x)


def _check(x: torch.Tensor, permutation: torch.Tensor) -> None:
    if x.dim() != 4 or permutation.shape != x.shape[:3]:
        raise ValueError(
            f"permutation must be [B, H, S] for x [B, H, S, D], got {tuple(permutation.shape)} and {tuple(x.shape)}: "
            "expand it over batch and heads"
        )
    if permutation.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"permutation must be int32 or int64, got {permutation.dtype}: convert it")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"x must be contiguous in its last dim, got strides {x.stride()}: call .contiguous() first")


# arch -> (tokens a program, warps); memory-bound and insensitive
LAUNCH = LaunchTable({80: (64, 4), 89: (64, 4), 90: (64, 4), 100: (64, 4), 120: (64, 4)})


def _move(x: torch.Tensor, permutation: torch.Tensor, scatter: bool) -> torch.Tensor:
    target.refuse_gradients("scatter_tokens" if scatter else "gather_tokens", x)
    B, H, S, D = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_s, num_warps = LAUNCH.row(x.device)
    with target.on_device(x):
        _move_kernel[(triton.cdiv(S, block_s), B * H)](
            x, permutation, out, H, S, D,
            x.stride(0), x.stride(1), x.stride(2),
            permutation.stride(0), permutation.stride(1), permutation.stride(2),
            SCATTER=scatter, BLOCK_S=block_s, BLOCK_D=triton.next_power_of_2(D), num_warps=num_warps,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["S", "C"])
def _count_kernel(labels, counts, S, C, CHUNK: tl.constexpr):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    label = tl.load(labels + row * S + offs, mask=offs < S, other=0).to(tl.int32)
    tl.atomic_add(counts + (row * tl.num_programs(0) + chunk) * C + label, 1, mask=offs < S, sem="relaxed")


@triton.jit
def _sum_up(sizes, ends, C, SUMMED: tl.constexpr):
    before = 0
    for first in range(0, C, SUMMED):
        cluster = first + tl.arange(0, SUMMED)
        size = tl.load(sizes + cluster, mask=cluster < C, other=0, cache_modifier=".cg")
        tl.store(ends + cluster, before + tl.cumsum(size, 0), mask=cluster < C)
        before += tl.sum(size, 0)


@triton.jit(do_not_specialize=["tickets", "chunks", "C"])
def _scan_kernel(
    counts, tickets, sizes, ends, chunks, C,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Counts of each chunk become those of the chunks before it; a row's last program sums the sizes up."""
    target.follow(EARLY)
    row = tl.program_id(1).to(tl.int64)
    cluster = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], dtype=tl.int32)
    for first in range(0, chunks, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        mask = (chunk < chunks)[:, None] & (cluster < C)[None, :]  # [BLOCK, BC]
        entry = counts + (row * chunks + chunk[:, None]) * C + cluster[None, :]
        count = tl.load(entry, mask=mask, other=0)
        tl.store(entry, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    tl.store(sizes + row * C + cluster, total, mask=cluster < C)
    tl.debug_barrier()  # the ticket is one thread's, the sizes are all threads'
    if tl.atomic_add(tickets + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        _sum_up(sizes + row * C, ends + row * C, C, SUMMED)
        tl.store(tickets + row, 0)


@triton.jit
def _rank(label, word_label, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """How many tokens of a chunk come before each with the same label: labels as bit planes, 32 tokens a word."""
    place = tl.arange(0, CHUNK)[None, :]
    word = tl.arange(0, CHUNK // 32)[:, None]
    before = tl.minimum(tl.maximum(place - 32 * word, 0), 32)  # of a word's tokens
    same = tl.where(before == 32, -1, (1 << (before & 31)) - 1)  # [words, CHUNK]
    label = label[None, :]
    for bit in tl.static_range(BITS):
        plane = tl.sum(((word_label >> bit) & 1) << tl.arange(0, 32)[None, :], 1)
        same &= ~(plane[:, None] ^ -((label >> bit) & 1))
    # Set bits: of pairs, of fours, of bytes, and all bytes of all words at last.
    bits = same.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((tl.sum(bits, 0) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["S", "C"])
def _place_kernel(
    labels, before, sizes, ends, permutation, S, C,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    target.follow(EARLY)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < S
    label = tl.load(labels + row * S + token, mask=inside, other=0).to(tl.int32)  # [CHUNK]
    start = tl.load(ends + row * C + label) - tl.load(sizes + row * C + label)
    before += (row * tl.num_programs(0) + chunk) * C
    start += tl.load(before + label)
    tl.debug_barrier()
    cluster = tl.arange(0, BLOCK_C)
    tl.store(before + cluster, tl.zeros([BLOCK_C], tl.int32), mask=cluster < C)
    words = chunk * CHUNK + tl.arange(0, CHUNK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    word_label = tl.load(labels + row * S + words, mask=words < S, other=0).to(tl.int32)
    tl.store(permutation + row * S + start + _rank(label, word_label, CHUNK, BITS), token, mask=inside)


@triton.jit(do_not_specialize=["S"])
def _move_kernel(
    x, permutation, out, H, S, D,
    stride_xb, stride_xh, stride_xs, stride_pb, stride_ph, stride_ps,
    SCATTER: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BS]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    inside = offs_s < S
    original = tl.load(permutation + b * stride_pb + h * stride_ph + offs_s * stride_ps, mask=inside, other=0)
    original = original.to(tl.int64)
    source = offs_s if SCATTER else original
    goal = original if SCATTER else offs_s
    mask = inside[:, None] & (offs_d < D)[None, :]  # [BS, BD]
    rows = tl.load(x + b * stride_xb + h * stride_xh + source[:, None] * stride_xs + offs_d[None, :], mask=mask)
    tl.store(out + (bh * S + goal)[:, None] * D + offs_d[None, :], rows, mask=mask)
