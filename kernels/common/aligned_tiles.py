"""Key tiles whose first column is a multiple of 16: what the tensor memory accelerator asks of 8-bit transposed values.

A run of selected keys that begins elsewhere gets a first tile which reads up to 15 keys before it and hides them; the
tiles after it begin at multiples of 16 by themselves.
"""

import torch

from . import target
from .target import tl, triton
from .tile_lists import larger, smaller

ALIGN = 16  # bytes, and tokens in 8 bits


def aligned_key_tiles(
    block_map: torch.Tensor, k_sizes: torch.Tensor, tokens: int, block_n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of selected key clusters cut into tiles of block_n columns that begin at multiples of ALIGN, full tiles first.

    Args:
        block_map: bool [M, Cq, Ck].
        k_sizes: int32 [M, Ck], tokens in each key cluster.
        tokens: Sk.
        block_n: columns of a tile, a multiple of ALIGN.

    Returns:
        int32 [M, Cq, W] of first key * block_n + keys - 1, where the tile begins first key % ALIGN columns before its
        first key; and int32 [M, Cq, 2], how many are full and how many in all.

    Raises:
        NotImplementedError: too many tokens for 32-bit entries.
    """
    M, Cq, Ck = block_map.shape
    _check_entries(tokens, block_n)
    # A run has at most two partial tiles, and two runs have an unselected cluster between them.
    width = tokens // block_n + 2 * ((Ck + 1) // 2)
    tiles = torch.empty(M, Cq, width, dtype=torch.int32, device=block_map.device)
    counts = torch.empty(M, Cq, 2, dtype=torch.int32, device=block_map.device)
    with target.on_device(block_map):
        _aligned_tiles_kernel[(Cq, M)](
            block_map.contiguous().view(torch.uint8), k_sizes.contiguous(), tiles, counts,
            Cq, Ck, tokens, width, BLOCK_N=block_n, BLOCK_C=max(16, triton.next_power_of_2(Ck)), ALIGN=ALIGN,
        )  # fmt: skip
    return tiles, counts


def separate_key_tiles(
    block_map: torch.Tensor, k_sizes: torch.Tensor, tokens: int, block_n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`aligned_key_tiles` where every key cluster that is selected begins at a multiple of block_n, in less time.

    Args and returns as there: no run has to be found, each cluster is cut by itself.
    """
    M, Cq, Ck = block_map.shape
    _check_entries(tokens, block_n)
    tiles = torch.empty(M, Cq, tokens // block_n + Ck, dtype=torch.int32, device=block_map.device)
    counts = torch.empty(M, Cq, 2, dtype=torch.int32, device=block_map.device)
    with target.on_device(block_map):
        _separate_tiles_kernel[(Cq, M)](
            block_map.contiguous().view(torch.uint8), k_sizes.contiguous(), tiles, counts,
            Cq, Ck, tiles.shape[2], BLOCK_N=block_n, BLOCK_C=max(16, triton.next_power_of_2(Ck)),
        )  # fmt: skip
    return tiles, counts


def _check_entries(tokens: int, block_n: int) -> None:
    if tokens * block_n >= 1 << 31:
        raise NotImplementedError(
            f"k must have fewer than {(1 << 31) // block_n} tokens, got {tokens}: split the video"
        )


def aligned_key_tiles_reference(
    block_map: torch.Tensor, k_sizes: torch.Tensor, tokens: int, block_n: int
) -> list[list[list[tuple[int, int]]]]:
    """Specification of `aligned_key_tiles` in plain Python.

    Returns:
        (first key, keys) of every tile of every map row, in the order of the keys.
    """
    return [
        [_cut(_runs(row.tolist(), sizes.tolist()), block_n) for row in rows] for rows, sizes in zip(block_map, k_sizes)
    ]


def _runs(picked: list[bool], sizes: list[int]) -> list[tuple[int, int]]:
    runs, start = [], 0
    for chosen, size in zip(picked, sizes):
        if chosen and size:
            touches = runs and runs[-1][1] == start
            runs[-1:] = [(runs[-1][0], start + size)] if touches else [*runs[-1:], (start, start + size)]
        start += size
    return runs


def _cut(runs: list[tuple[int, int]], block_n: int) -> list[tuple[int, int]]:
    tiles = []
    for start, stop in runs:
        while start < stop:
            keys = min(block_n - start % ALIGN, stop - start)
            tiles.append((start, keys))
            start += keys
    return tiles


@triton.jit(do_not_specialize=["Cq", "Ck", "tokens", "width"])
def _aligned_tiles_kernel(
    block_map, sizes, tiles, counts, Cq, Ck, tokens, width,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * Cq + tl.program_id(0)
    cluster = tl.arange(0, BLOCK_C)  # [BC]
    n = tl.load(sizes + tl.program_id(1) * Ck + cluster, mask=cluster < Ck, other=0)
    picked = tl.load(block_map + row * Ck + cluster, mask=cluster < Ck, other=0) != 0
    start = tl.cumsum(n) - n
    # A run reaches from the end of the last skipped cluster to the start of the next one; empty clusters do not break it.
    skipped = (n > 0) & ~picked
    run_start = tl.associative_scan(tl.where(skipped, start + n, 0), 0, larger)
    run_stop = tl.associative_scan(tl.where(skipped, start, tokens), 0, smaller, reverse=True)
    before = run_start % ALIGN
    body = run_start + tl.where(before > 0, BLOCK_N - before, 0)  # where the tiles after an unaligned one begin
    front = ((before > 0) & picked & (n > 0) & (start == run_start)).to(tl.int32)
    # Each cluster writes those tiles of its run that begin inside it.
    first = tl.where(picked, tl.cdiv(tl.maximum(start - body, 0), BLOCK_N), 0)
    stop = tl.where(picked, tl.cdiv(tl.maximum(start + n - body, 0), BLOCK_N), 0)
    run_full = tl.maximum(run_stop - body, 0) // BLOCK_N
    full = tl.minimum(stop, run_full) - tl.minimum(first, run_full)
    partial = stop - first - full
    all_full = tl.sum(full)
    tl.store(counts + row * 2, all_full)
    tl.store(counts + row * 2 + 1, all_full + tl.sum(partial + front))
    entry = tiles + row * width + tl.cumsum(full) - full
    for r in range(tl.max(full)):
        key = body + (first + r) * BLOCK_N
        tl.store(entry + r, key * BLOCK_N + (BLOCK_N - 1), mask=r < full)
    entry = tiles + row * width + all_full + tl.cumsum(partial + front) - (partial + front)
    keys = tl.minimum(BLOCK_N - before, run_stop - run_start)
    tl.store(entry, run_start * BLOCK_N + (keys - 1), mask=front > 0)
    key = body + run_full * BLOCK_N
    tl.store(entry + front, key * BLOCK_N + (run_stop - key - 1), mask=partial > 0)


@triton.jit(do_not_specialize=["Cq", "Ck", "width"])
def _separate_tiles_kernel(
    block_map, sizes, tiles, counts, Cq, Ck, width, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64) * Cq + tl.program_id(0)
    cluster = tl.arange(0, BLOCK_C)  # [BC]
    n = tl.load(sizes + tl.program_id(1) * Ck + cluster, mask=cluster < Ck, other=0)
    picked = tl.load(block_map + row * Ck + cluster, mask=cluster < Ck, other=0) != 0
    start = tl.cumsum(n) - n
    full = tl.where(picked, n // BLOCK_N, 0)
    rest = tl.where(picked, n % BLOCK_N, 0)
    partial = (rest > 0).to(tl.int32)
    before = tl.cumsum(full) - full
    all_full = tl.sum(full)
    tl.store(counts + row * 2, all_full)
    tl.store(counts + row * 2 + 1, all_full + tl.sum(partial))
    entry = tiles + row * width + before
    for r in range(tl.max(full)):
        tl.store(entry + r, (start + r * BLOCK_N) * BLOCK_N + (BLOCK_N - 1), mask=r < full)
    entry = tiles + row * width + all_full + tl.cumsum(partial) - partial
    tl.store(entry, (start + full * BLOCK_N) * BLOCK_N + rest - 1, mask=partial > 0)
