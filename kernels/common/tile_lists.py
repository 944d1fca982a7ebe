"""Lists of tiles that block-sparse kernels walk over, made from a block map and the sizes of its clusters."""

import torch

from .target import tl, triton


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
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def smaller(a, b):
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
    run_start = tl.associative_scan(tl.where(skipped, start + n, 0), 0, larger)
    run_stop = tl.associative_scan(tl.where(skipped, start, tokens), 0, smaller, reverse=True)
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
