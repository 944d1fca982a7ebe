"""k-means assignment for Hopper: products of token rows and centroids that the tensor memory accelerator brings (Gluon).

Persistent programs of one warp that fetches and warpgroups that hold rows in registers, score them on the tensor cores and
compare one product's scores while the next one runs.

    many centroids    tiles of them stream past two slabs of 64 rows in each of two warpgroups
    up to `FEW`       a head's centroids stay in shared memory and slabs stream past them, each to one of three warpgroups,
                      which share nothing else: one's fetching and finishing hides behind the others' products

A thread compares neighbouring columns with each other, then with its best pair so far: 3.5 instructions a score, not 4.
Threads meet once, at a slab's end. Same scores as `kmeans._assign_kernel`, same rule for ties: the lowest index.
"""

import torch

from ..common import target
from ..gluon import LOADABLE

SLAB = 64  # token rows of one product
GROUPS, SLABS, ROW_STAGES = 2, 2, 2  # consumer warpgroups, slabs of each, buffered row tiles
BLOCK_C, STAGES = 128, 3  # centroids of a tile, buffered tiles
PAD = 128  # offsets of a head are padded to a multiple of it


FEW = 320  # centroids that stay in shared memory
FEW_TILE, FEW_GROUPS, FEW_ROW_STAGES = 64, 3, 3  # centroids of a product, consumer warpgroups, buffered slabs of each


def supports(x: torch.Tensor) -> bool:
    """Whether this kernel assigns these tokens: Hopper, 16 bits, head dim up to 128, rows that a descriptor can address.

    Args:
        x: [B, H, S, D].
    """
    return (
        LOADABLE and target.arch(x.device) == 90 and x.element_size() == 2 and x.shape[-1] <= 128
        and x.shape[-1] % 8 == 0 and target.fits_descriptor(x) and min(x.stride()) > 0
    )  # fmt: skip


def launch(x, directions, offsets, labels, counts, chunk: int, few: bool | None = None) -> None:
    """Labels of all tokens, and how often each chunk has each.

    Args:
        x: [B, H, S, D].
        directions: [B, H, C, D] of x's dtype, contiguous: centroids minus their mean.
        offsets: fp32 [B, H, C rounded up to PAD], what a score subtracts from x . d; +inf past C.
        labels: int32 [B, H, S], written.
        counts: int32 [B * H, chunks, C], zero, added to; or None.
        chunk: tokens of a chunk, a power of two.
        few: centroids stay; None: where they fit.
    """
    B, H, S, D = x.shape
    C = directions.shape[2]
    few = C <= FEW if few is None else few
    cdiv = target.triton.cdiv
    x_desc = TensorDescriptor(
        x, list(x.shape), list(x.stride()), [1, 1, SLAB, 64], gl.NVMMASharedLayout(128, 16, rank=4)
    )
    block_c = FEW_TILE if few else BLOCK_C
    d_desc = TensorDescriptor.from_tensor(directions.view(-1, D), [block_c, 64], gl.NVMMASharedLayout(128, 16))
    tiles = cdiv(S, SLAB * (FEW_GROUPS if few else GROUPS * SLABS)) * B * H
    common = {
        "BLOCK_D": 64 if D <= 64 else 128, "CHUNK": chunk, "HAS_COUNTS": counts is not None, "PAD": PAD, "num_warps": 4,
    }  # fmt: skip
    arguments = (x_desc, d_desc, offsets, labels, counts, tiles, H, S, C, cdiv(S, chunk))
    grid = (min(tiles, target.sm_count(x.device)),)
    if few:
        _hopper_assign_few_kernel[grid](
            *arguments, TILES=cdiv(C, FEW_TILE), GROUPS=FEW_GROUPS, ROW_STAGES=FEW_ROW_STAGES, maxnreg=128, **common
        )
    else:
        _hopper_assign_kernel[grid](
            *arguments, BLOCK_C=BLOCK_C, GROUPS=GROUPS, SLABS=SLABS, STAGES=STAGES, ROW_STAGES=ROW_STAGES, maxnreg=168,
            **common,
        )  # fmt: skip


if LOADABLE:
    from ..gluon import TensorDescriptor, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from ..gluon.ring import acquire, await_stage, new_ring, release

    @gluon.jit
    def _produce(
        x_desc, d_desc, boxes, barriers, sizes,
        BLOCK_D: gl.constexpr, BLOCK_C: gl.constexpr, ROW_SLABS: gl.constexpr, STAGES: gl.constexpr,
        ROW_STAGES: gl.constexpr,
    ):  # fmt: skip
        x_boxes, d_boxes = boxes
        x_ready, x_empty, d_ready, d_empty = barriers
        programs, H, S, C, _ = sizes
        PANELS: gl.constexpr = BLOCK_D // 64
        row_tiles = (S + ROW_SLABS * 64 - 1) // (ROW_SLABS * 64)
        n = 0
        for t in range(gl.program_id(0), programs, gl.num_programs(0)):
            bh = t // row_tiles
            r = t // gl.num_programs(0)  # how many tiles came before
            slot = r % ROW_STAGES
            acquire(x_empty, r, ROW_STAGES)
            mbarrier.expect(x_ready.index(slot), ROW_SLABS * PANELS * 64 * 64 * 2)
            for i in gl.static_range(ROW_SLABS * PANELS):
                first = t % row_tiles * (ROW_SLABS * 64) + i // PANELS * 64
                x_box = x_boxes.index(slot * ROW_SLABS * PANELS + i)
                tma.async_copy_global_to_shared(
                    x_desc, [bh // H, bh % H, first, i % PANELS * 64], x_ready.index(slot), x_box
                )
            for c in range(0, C, BLOCK_C):
                stage = n % STAGES
                acquire(d_empty, n, STAGES)
                mbarrier.expect(d_ready.index(stage), PANELS * BLOCK_C * 64 * 2)
                for panel in gl.static_range(PANELS):
                    d_box = d_boxes.index(stage * PANELS + panel)
                    tma.async_copy_global_to_shared(d_desc, [bh * C + c, panel * 64], d_ready.index(stage), d_box)
                n += 1

    @gluon.jit
    def _score(rows, d_stages, n, STAGES: gl.constexpr, BLOCK_C: gl.constexpr, s_layout: gl.constexpr):
        """Starts x . d of a slab and stage n."""
        zero = gl.zeros([64, BLOCK_C], gl.float32, s_layout)
        return warpgroup_mma(rows, d_stages.index(n % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)

    @gluon.jit
    def _wait(s, best, PENDING: gl.constexpr):
        score, group, even = best
        # Among the dependencies, so that comparisons stay in front of the wait.
        s, score, group, even = warpgroup_mma_wait(PENDING, deps=[s, score, group, even])
        return s, (score, group, even)

    @gluon.jit
    def _halves(s, N: gl.constexpr):
        return s.reshape([64, 2, N // 2]).permute((0, 2, 1)).split()

    @gluon.jit
    def _keep_best(best, s, first, N: gl.constexpr, layout: gl.constexpr):
        """The best of 4 pairs of columns, N / 8 scores further: its score, where it was, in eights, its even column's score."""
        if N > 8:
            low, high = _halves(s, N)
            best = _keep_best(best, low, first, N // 2, layout)
            return _keep_best(best, high, first + N // 16, N // 2, layout)
        else:
            s = gl.convert_layout(s, layout, assert_trivial=True)
            score, group, even = best
            a, b = s.reshape([64, 4, 2]).split()
            s = gl.maximum(a, b)
            closer = s > score
            return gl.where(closer, s, score), gl.where(closer, first, group), gl.where(closer, a, even)

    @gluon.jit
    def _compare(best, s, offset, c, BLOCK_C: gl.constexpr, layout: gl.constexpr):
        return _keep_best(best, s - offset[None, :], c // 8, BLOCK_C, layout)

    @gluon.jit
    def _nothing(layout: gl.constexpr):
        score, even = gl.full([64, 8], float("-inf"), gl.float32, layout).reshape([64, 4, 2]).split()
        group, _ = gl.full([64, 8], 0, gl.int32, layout).reshape([64, 4, 2]).split()
        return score, group, even

    @gluon.jit
    def _finish(best, labels, counts, bh, first, sizes, CHUNK: gl.constexpr, HAS_COUNTS: gl.constexpr):
        _, _, S, C, chunks = sizes
        score, group, even = best
        rows: gl.constexpr = gl.SliceLayout(1, score.type.layout)
        pair = gl.arange(0, 4, gl.SliceLayout(0, score.type.layout))
        column = group * 8 + 2 * pair[None, :] + (even != score).to(gl.int32)
        column = gl.where(score == gl.max(score, 1)[:, None], column, C - 1)
        # NaN scores are never best: the label stays in range, and the caller's finite check reports the input.
        label = gl.minimum(gl.min(column, 1), C - 1)
        token = first + gl.arange(0, 64, rows)
        bh = bh.to(gl.int64)
        gl.store(labels + bh * S + token, label, mask=token < S)
        if HAS_COUNTS:
            entry = counts + (bh * chunks + token // CHUNK) * C + label
            gl.atomic_add(entry, gl.full([64], 1, gl.int32, rows), mask=token < S, sem="relaxed")

    @gluon.jit
    def _consume(
        GROUP: gl.constexpr, tensors, stages, barriers, sizes,
        BLOCK_D: gl.constexpr, BLOCK_C: gl.constexpr, GROUPS: gl.constexpr, SLABS: gl.constexpr, STAGES: gl.constexpr,
        ROW_STAGES: gl.constexpr, CHUNK: gl.constexpr, HAS_COUNTS: gl.constexpr, PAD: gl.constexpr,
    ):  # fmt: skip
        offsets, labels, counts = tensors
        x_slabs, d_stages = stages
        x_ready, x_empty, d_ready, d_empty = barriers
        programs, _, S, C, _ = sizes
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_C, 16])
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
        ROW_SLABS: gl.constexpr = GROUPS * SLABS
        row_tiles = (S + ROW_SLABS * 64 - 1) // (ROW_SLABS * 64)
        columns = gl.arange(0, BLOCK_C, gl.SliceLayout(0, s_layout))
        n = 0
        for t in range(gl.program_id(0), programs, gl.num_programs(0)):
            bh = t // row_tiles
            first = t % row_tiles * (ROW_SLABS * 64) + GROUP * SLABS * 64
            r = t // gl.num_programs(0)
            slot = r % ROW_STAGES
            row = offsets + bh * ((C + PAD - 1) // PAD * PAD)
            best0 = _nothing(layout)
            best1 = _nothing(layout)
            await_stage(x_ready, r, ROW_STAGES)
            slab = slot * ROW_SLABS + GROUP * SLABS
            rows0 = x_slabs.index(slab).load(gl.DotOperandLayout(0, s_layout, 2))
            rows1 = x_slabs.index(slab + 1).load(gl.DotOperandLayout(0, s_layout, 2))
            await_stage(d_ready, n, STAGES)
            s0 = _score(rows0, d_stages, n, STAGES, BLOCK_C, s_layout)
            s0 = warpgroup_mma_wait(0, deps=[s0])
            for c in range(0, C - BLOCK_C, BLOCK_C):
                s1 = _score(rows1, d_stages, n, STAGES, BLOCK_C, s_layout)
                offset = gl.load(row + c + columns)
                best0 = _compare(best0, s0, offset, c, BLOCK_C, layout)
                await_stage(d_ready, n + 1, STAGES)
                s0 = _score(rows0, d_stages, n + 1, STAGES, BLOCK_C, s_layout)
                offset = gl.load(row + c + columns)  # again: no registers for it in between
                s1, best0 = _wait(s1, best0, 1)
                release(d_empty, n, STAGES)
                best1 = _compare(best1, s1, offset, c, BLOCK_C, layout)
                s0, best1 = _wait(s0, best1, 0)
                n += 1
            c = (C - 1) // BLOCK_C * BLOCK_C
            s1 = _score(rows1, d_stages, n, STAGES, BLOCK_C, s_layout)
            offset = gl.load(row + c + columns)
            best0 = _compare(best0, s0, offset, c, BLOCK_C, layout)
            s1, best0 = _wait(s1, best0, 0)
            release(d_empty, n, STAGES)
            n += 1
            # Not earlier: an arrival doesn't wait for loads from shared memory, products of what was loaded do.
            release(x_empty, r, ROW_STAGES)
            best1 = _compare(best1, s1, offset, c, BLOCK_C, layout)
            _finish(best0, labels, counts, bh, first, sizes, CHUNK, HAS_COUNTS)
            _finish(best1, labels, counts, bh, first + 64, sizes, CHUNK, HAS_COUNTS)

    @gluon.jit(do_not_specialize=["programs", "H", "S", "C", "chunks"])
    def _hopper_assign_kernel(
        x_desc, d_desc, offsets, labels, counts, programs, H, S, C, chunks,
        BLOCK_D: gl.constexpr, BLOCK_C: gl.constexpr, GROUPS: gl.constexpr, SLABS: gl.constexpr, STAGES: gl.constexpr,
        ROW_STAGES: gl.constexpr, CHUNK: gl.constexpr, HAS_COUNTS: gl.constexpr, PAD: gl.constexpr,
        num_warps: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = x_desc.dtype
        PANELS: gl.constexpr = BLOCK_D // 64
        ROW_SLABS: gl.constexpr = GROUPS * SLABS
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
        x_slabs = gl.allocate_shared_memory(dtype, [ROW_STAGES * ROW_SLABS, 64, BLOCK_D], layout)
        d_stages = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_C, BLOCK_D], layout)
        # What one copy fills: one panel of 64 columns.
        x_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
        x_boxes = x_slabs._reinterpret(dtype, [ROW_STAGES * ROW_SLABS * PANELS, 1, 1, 64, 64], x_layout)
        d_boxes = d_stages._reinterpret(dtype, [STAGES * PANELS, BLOCK_C, 64], layout)
        x_ready, x_empty = new_ring(ROW_STAGES, GROUPS)
        d_ready, d_empty = new_ring(STAGES, GROUPS)
        barriers = (x_ready, x_empty, d_ready, d_empty)
        tensors = (offsets, labels, counts)
        sizes = (programs, H, S, C, chunks)
        stages = (x_slabs, d_stages)
        boxes = (x_boxes, d_boxes)
        gl.warp_specialize(
            [
                (_consume, (0, tensors, stages, barriers, sizes, BLOCK_D, BLOCK_C, GROUPS, SLABS, STAGES,
                            ROW_STAGES, CHUNK, HAS_COUNTS, PAD)),
                (_consume, (1, tensors, stages, barriers, sizes, BLOCK_D, BLOCK_C, GROUPS, SLABS, STAGES,
                            ROW_STAGES, CHUNK, HAS_COUNTS, PAD)),
                (_produce, (x_desc, d_desc, boxes, barriers, sizes, BLOCK_D, BLOCK_C, ROW_SLABS, STAGES, ROW_STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip

    @gluon.jit
    def _span(tiles):
        """This program's first tile and where it stops: neighbours, so that it seldom changes heads."""
        share = (tiles + gl.num_programs(0) - 1) // gl.num_programs(0)
        begin = gl.program_id(0) * share
        return begin, gl.minimum(begin + share, tiles)

    @gluon.jit
    def _produce_few(
        x_desc, d_desc, boxes, barriers, sizes,
        PANELS: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, ROW_STAGES: gl.constexpr,
    ):  # fmt: skip
        x_boxes, d_boxes = boxes
        x_ready, x_empty, d_ready, d_empty = barriers
        tiles, H, S, C, _ = sizes
        row_tiles = (S + GROUPS * 64 - 1) // (GROUPS * 64)
        begin, end = _span(tiles)
        for t in range(begin, end):
            bh = t // row_tiles
            r = t - begin
            for group in gl.static_range(GROUPS):
                slot = group * ROW_STAGES + r % ROW_STAGES
                mbarrier.wait(x_empty.index(slot), (r // ROW_STAGES & 1) ^ 1)
                mbarrier.expect(x_ready.index(slot), PANELS * 64 * 64 * 2)
                for panel in gl.static_range(PANELS):
                    first = (t % row_tiles * GROUPS + group) * 64
                    x_box = x_boxes.index(slot * PANELS + panel)
                    tma.async_copy_global_to_shared(
                        x_desc, [bh // H, bh % H, first, panel * 64], x_ready.index(slot), x_box
                    )
            if (t == begin) | (t % row_tiles == 0):
                mbarrier.wait(d_empty.index(0), (bh - begin // row_tiles & 1) ^ 1)
                mbarrier.expect(d_ready.index(0), TILES * PANELS * 64 * 64 * 2)
                for i in gl.static_range(TILES * PANELS):
                    place = [bh * C + i // PANELS * 64, i % PANELS * 64]
                    tma.async_copy_global_to_shared(d_desc, place, d_ready.index(0), d_boxes.index(i))

    @gluon.jit
    def _consume_few(
        GROUP: gl.constexpr, tensors, stages, barriers, sizes,
        TILES: gl.constexpr, GROUPS: gl.constexpr, ROW_STAGES: gl.constexpr, CHUNK: gl.constexpr,
        HAS_COUNTS: gl.constexpr, PAD: gl.constexpr,
    ):  # fmt: skip
        offsets, labels, counts = tensors
        x_slabs, d_tiles = stages
        x_ready, x_empty, d_ready, d_empty = barriers
        tiles, _, S, C, _ = sizes
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
        row_tiles = (S + GROUPS * 64 - 1) // (GROUPS * 64)
        columns = gl.arange(0, 64, gl.SliceLayout(0, s_layout))
        begin, end = _span(tiles)
        for t in range(begin, end):
            bh = t // row_tiles
            r = t - begin
            slot = GROUP * ROW_STAGES + r % ROW_STAGES
            row = offsets + bh * ((C + PAD - 1) // PAD * PAD)
            best = _nothing(layout)
            mbarrier.wait(d_ready.index(0), bh - begin // row_tiles & 1)
            mbarrier.wait(x_ready.index(slot), r // ROW_STAGES & 1)
            rows = x_slabs.index(slot).load(gl.DotOperandLayout(0, s_layout, 2))
            n = t * TILES  # is stage 0, but what depends on t isn't kept in registers over all of t
            s = _score(rows, d_tiles, n, TILES, 64, s_layout)
            for i in gl.static_range(TILES - 1):
                following = _score(rows, d_tiles, n + i + 1, TILES, 64, s_layout)
                offset = gl.load(row + i * 64 + columns)
                s, best = _wait(s, best, 1)
                best = _compare(best, s, offset, i * 64, 64, layout)
                s = following
            offset = gl.load(row + (TILES - 1) * 64 + columns)
            s, best = _wait(s, best, 0)
            # Not earlier: an arrival doesn't wait for loads from shared memory, products of what was loaded do.
            mbarrier.arrive(x_empty.index(slot), count=1)
            if (t + 1) % row_tiles == 0:
                mbarrier.arrive(d_empty.index(0), count=1)
            best = _compare(best, s, offset, (TILES - 1) * 64, 64, layout)
            _finish(best, labels, counts, bh, (t % row_tiles * GROUPS + GROUP) * 64, sizes, CHUNK, HAS_COUNTS)

    @gluon.jit(do_not_specialize=["tiles", "H", "S", "C", "chunks"])
    def _hopper_assign_few_kernel(
        x_desc, d_desc, offsets, labels, counts, tiles, H, S, C, chunks,
        BLOCK_D: gl.constexpr, TILES: gl.constexpr, GROUPS: gl.constexpr, ROW_STAGES: gl.constexpr,
        CHUNK: gl.constexpr, HAS_COUNTS: gl.constexpr, PAD: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = x_desc.dtype
        PANELS: gl.constexpr = BLOCK_D // 64
        SLOTS: gl.constexpr = GROUPS * ROW_STAGES
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
        x_slabs = gl.allocate_shared_memory(dtype, [SLOTS, 64, BLOCK_D], layout)
        d_tiles = gl.allocate_shared_memory(dtype, [TILES, 64, BLOCK_D], layout)
        x_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
        x_boxes = x_slabs._reinterpret(dtype, [SLOTS * PANELS, 1, 1, 64, 64], x_layout)
        d_boxes = d_tiles._reinterpret(dtype, [TILES * PANELS, 64, 64], layout)
        x_ready, x_empty = new_ring(SLOTS, 1)
        d_ready, d_empty = new_ring(1, GROUPS)
        barriers = (x_ready, x_empty, d_ready, d_empty)
        tensors = (offsets, labels, counts)
        sizes = (tiles, H, S, C, chunks)
        stages = (x_slabs, d_tiles)
        gl.warp_specialize(
            [
                (_consume_few, (0, tensors, stages, barriers, sizes, TILES, GROUPS, ROW_STAGES, CHUNK, HAS_COUNTS, PAD)),
                (_consume_few, (1, tensors, stages, barriers, sizes, TILES, GROUPS, ROW_STAGES, CHUNK, HAS_COUNTS, PAD)),
                (_consume_few, (2, tensors, stages, barriers, sizes, TILES, GROUPS, ROW_STAGES, CHUNK, HAS_COUNTS, PAD)),
                (_produce_few, (x_desc, d_desc, (x_boxes, d_boxes), barriers, sizes, PANELS, TILES, GROUPS, ROW_STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip
