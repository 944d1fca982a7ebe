"""Block-sparse attention for Hopper: the loops of triton.py with one producer and two consumers (Gluon).

A persistent program walks over query tiles of 128 rows. One warp fetches K and V tiles through the tensor memory
accelerator, two at a time into 128-key stages, as fast as stages come free, also for the next query tile. Two warpgroups of
64 rows each compute: while the softmax of one tile runs, the tensor cores do the next Q K^T and the previous P V, and the
warpgroups drift apart so that one's softmax hides under the other's products. Same tile lists, same arithmetic as
`triton._attention_kernel`.

Source: the schedule is FlashAttention-3's (arXiv 2407.08608, section 3), here over lists of tiles.
"""

import torch

from ..common import target
from ..common.numbers import LN_2, LOG2_E
from ..gluon import LOADABLE

QUERY_ROWS, TILE_KEYS = 128, 64  # of a query tile and of a list entry; two entries make a stage
MAX_REGISTERS = 168  # a thread, for 12 warps; the consumers take 240 each, the producer 24


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row) -> bool:
    """Whether this kernel computes these inputs: Hopper, 16 bits, head dim up to 128, contiguous k and v, tiles 128 x 64.

    Args:
        q, k, v: as `block_sparse_attention` takes them.
        row: a `triton.Launch`.
    """
    return (
        LOADABLE and target.arch(q.device) == 90 and q.element_size() == 2
        and (row.block_m, row.block_n) == (QUERY_ROWS, TILE_KEYS) and q.shape[-1] <= 128
        and all(x.is_contiguous() and target.fits_descriptor(x) for x in (k, v))
    )  # fmt: skip


def launch(q, k, v, out, lse, permutation, map_index, lists, Cq, scale_log2, stages, tail) -> None:
    """Attention over tile lists; arguments as `triton.launch` makes them, with `stages` K and V buffers of 128 keys.

    At 3 stages a head dim above 64 leaves 2 KB of shared memory.
    """
    B, H, S, D = q.shape
    q_tiles, q_counts, key_tiles, key_counts = lists
    programs = q_tiles.shape[1] * B * H
    layout = gl.NVMMASharedLayout(128, 16)
    tail = None if tail is None or tail.bias.shape[2] == 0 else tail
    means, bias = ((k, v), None) if tail is None else (tail[:2], tail.bias)
    k_desc, v_desc, k_tail, v_tail = (
        TensorDescriptor.from_tensor(x.view(-1, D), [TILE_KEYS, 64], layout) for x in (k, v, *means)
    )
    strides = (0, 0, 0) if permutation is None else permutation.stride()
    _hopper_attention_kernel[(min(programs, target.sm_count(q.device)),)](
        k_desc, v_desc, k_tail, v_tail, q, out, lse, bias, permutation, map_index.contiguous(), q_tiles, q_counts, key_tiles,
        key_counts, scale_log2, programs, H, S, k.shape[2], Cq, q_tiles.shape[1], key_tiles.shape[2],
        0 if tail is None else bias.shape[2], *q.stride()[:3], *out.stride()[:3], *strides,
        D=D, BLOCK_D=64 if D <= 64 else 128, STAGES=stages, HAS_PERMUTATION=permutation is not None,
        HAS_LSE=lse is not None, HAS_TAIL=tail is not None, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


if LOADABLE:
    from ..gluon import (
        TensorDescriptor,
        fence_async_shared,
        gl,
        gluon,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from ..gluon.packed import packed, unpacked
    from ..gluon.ring import acquire, await_stage, new_ring, release
    from ..gluon.tile_walk import keys_of, tile_of, tokens_of

    @gluon.jit
    def _fetch(desc, first, second, ready, boxes, stage, PANELS: gl.constexpr):
        # A stage is PANELS column panels of 128 rows; each list entry fills one half of every panel.
        mbarrier.expect(ready.index(stage), 2 * PANELS * 64 * 64 * 2)
        for panel in gl.static_range(PANELS):
            box = (stage * PANELS + panel) * 2
            tma.async_copy_global_to_shared(desc, [first, panel * 64], ready.index(stage), boxes.index(box))
            tma.async_copy_global_to_shared(desc, [second, panel * 64], ready.index(stage), boxes.index(box + 1))

    @gluon.jit
    def _produce(
        descriptors, boxes, barriers, lists, sizes, STAGES: gl.constexpr, PANELS: gl.constexpr, HAS_TAIL: gl.constexpr
    ):
        k_desc, v_desc, k_tail, v_tail = descriptors
        k_boxes, v_boxes = boxes
        k_ready, k_empty, v_ready, v_empty = barriers
        q_tiles, q_counts, key_tiles, key_counts, map_index = lists
        programs, Sk, Cq, query_width, key_width, C = sizes
        n = 0
        for t in range(gl.program_id(0), programs, gl.num_programs(0)):
            bh, m, entry, exists = tile_of(t, q_tiles, q_counts, map_index, query_width)
            if exists:
                row, _, total = keys_of(m, entry, q_tiles, key_counts, Cq, query_width)
                tiles = key_tiles + row * key_width
                for i in range(0, total, 2):
                    first = bh * Sk + gl.load(tiles + i) // 64
                    second = bh * Sk + gl.load(tiles + gl.minimum(i + 1, total - 1)) // 64
                    acquire(k_empty, n, STAGES)
                    _fetch(k_desc, first, second, k_ready, k_boxes, n % STAGES, PANELS)
                    acquire(v_empty, n, STAGES)
                    _fetch(v_desc, first, second, v_ready, v_boxes, n % STAGES, PANELS)
                    n += 1
                if HAS_TAIL:
                    for c in range(0, C, 128):
                        first = bh * C + c
                        acquire(k_empty, n, STAGES)
                        _fetch(k_tail, first, first + 64, k_ready, k_boxes, n % STAGES, PANELS)
                        acquire(v_empty, n, STAGES)
                        _fetch(v_tail, first, first + 64, v_ready, v_boxes, n % STAGES, PANELS)
                        n += 1

    @gluon.jit
    def _scores(q, k_stages, k_ready, n, STAGES: gl.constexpr, s_layout: gl.constexpr):
        """Starts Q K^T of stage n."""
        zero = gl.zeros([64, 128], gl.float32, s_layout)
        await_stage(k_ready, n, STAGES)
        return warpgroup_mma(q, k_stages.index(n % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)

    @gluon.jit
    def _mask(s, tiles, i, total, s_layout: gl.constexpr):
        """Scores outside list entries i and i + 1 become -inf."""
        column = gl.arange(0, 128, gl.SliceLayout(0, s_layout))
        first = gl.load(tiles + i) & 63
        second = gl.where(i + 1 < total, gl.load(tiles + gl.minimum(i + 1, total - 1)) & 63, -1)
        # Only the low bits of a column differ between threads: registers for them, constants for the rest.
        inside = (column & 57) <= gl.where(column < 64, first, second) - (column & 6)
        return gl.where(inside[None, :], s, float("-inf"))

    @gluon.jit
    def _count(s, bias, c, C, scale_log2, s_layout: gl.constexpr):
        """Adds the logs of the sizes of clusters c ...; -inf past the last one."""
        column = c + gl.arange(0, 128, gl.SliceLayout(0, s_layout))
        log_size = gl.load(bias + column, mask=column < C, other=float("-inf"))
        return s + (log_size * (LOG2_E / scale_log2))[None, :]  # the softmax multiplies by scale_log2

    @gluon.jit
    def _softmax(s, m_i, l_i, scale_log2):
        m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)  # m_i is finite from the start: no difference of infinities
        alpha = gl.exp2(m_i - m_new)
        p = gl.exp2(s * scale_log2 - m_new[:, None])
        return p, alpha, m_new, l_i * alpha + gl.sum(p, 1)

    @gluon.jit
    def _step(
        q, p, acc, m_i, l_i, i, tiles, total, bias, C, n, k_stages, v_stages, barriers, scale_log2,
        KIND: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr, p_layout: gl.constexpr,
    ):  # fmt: skip
        """Q K^T and softmax of stage n under P V of stage n - 1"""
        k_ready, k_empty, v_ready, v_empty = barriers
        before = n - 1
        s = _scores(q, k_stages, k_ready, n, STAGES, s_layout)
        await_stage(v_ready, before, STAGES)
        weights = unpacked(p, v_stages.dtype, p_layout)
        acc = warpgroup_mma(weights, v_stages.index(before % STAGES), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        release(k_empty, n, STAGES)
        if KIND == "partial":
            s = _mask(s, tiles, i, total, s_layout)
        elif KIND == "tail":
            s = _count(s, bias, i, C, scale_log2, s_layout)
        p_new, alpha, m_i, l_i = _softmax(s, m_i, l_i, scale_log2)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(v_empty, before, STAGES)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
        return packed(p_new, v_stages.dtype), acc, m_i, l_i

    @gluon.jit
    def _attend(
        q, tiles, full, total, bias, C, n, k_stages, v_stages, barriers, scale_log2,
        BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HAS_TAIL: gl.constexpr,
        s_layout: gl.constexpr, o_layout: gl.constexpr, p_layout: gl.constexpr,
    ):  # fmt: skip
        """All stages of one query tile: the sums, the maxima, and how many stages have been used so far."""
        k_ready, k_empty, v_ready, v_empty = barriers
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
        l_i = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
        if HAS_TAIL or total > 0:
            s = _scores(q, k_stages, k_ready, n, STAGES, s_layout)
            s = warpgroup_mma_wait(0, deps=[s])
            release(k_empty, n, STAGES)
            if HAS_TAIL:
                if total > 0:
                    s = _mask(s, tiles, 0, total, s_layout)
                else:
                    s = _count(s, bias, 0, C, scale_log2, s_layout)
            else:
                s = _mask(s, tiles, 0, total, s_layout)
            p_new, _, m_i, l_i = _softmax(s, m_i, l_i, scale_log2)
            p = packed(p_new, v_stages.dtype)
            n += 1
            whole = full // 2 * 2
            for i in range(2, whole, 2):
                p, acc, m_i, l_i = _step(
                    q, p, acc, m_i, l_i, i, tiles, total, bias, C, n, k_stages, v_stages, barriers, scale_log2,
                    "full", STAGES, s_layout, p_layout,
                )  # fmt: skip
                n += 1
            for i in range(gl.maximum(whole, 2), total, 2):
                p, acc, m_i, l_i = _step(
                    q, p, acc, m_i, l_i, i, tiles, total, bias, C, n, k_stages, v_stages, barriers, scale_log2,
                    "partial", STAGES, s_layout, p_layout,
                )  # fmt: skip
                n += 1
            if HAS_TAIL:
                # where nothing is selected, the first stage was the tail's
                for c in range(gl.where(total > 0, 0, 128), C, 128):
                    p, acc, m_i, l_i = _step(
                        q, p, acc, m_i, l_i, c, tiles, total, bias, C, n, k_stages, v_stages, barriers, scale_log2,
                        "tail", STAGES, s_layout, p_layout,
                    )  # fmt: skip
                    n += 1
            await_stage(v_ready, n - 1, STAGES)
            weights = unpacked(p, v_stages.dtype, p_layout)
            acc = warpgroup_mma(weights, v_stages.index((n - 1) % STAGES), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            release(v_empty, n - 1, STAGES)
        return acc, m_i, l_i, n

    @gluon.jit
    def _consume(
        HALF: gl.constexpr, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2,
        D: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HAS_PERMUTATION: gl.constexpr,
        HAS_LSE: gl.constexpr, HAS_TAIL: gl.constexpr,
    ):  # fmt: skip
        q, permutation, out, lse, bias = tensors
        q_stages, k_stages, v_stages = stages
        q_tiles, q_counts, key_tiles, key_counts, map_index = lists
        programs, _, Cq, query_width, key_width, C = sizes
        H, S = shape
        sqb, sqh, sqs, sob, soh, sos, spb, sph, sps = strides
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
        p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
        across: gl.constexpr = BLOCK_D // 8
        rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
        q_shared = q_stages.index(HALF)
        offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows_layout))
        n = 0
        for t in range(gl.program_id(0), programs, gl.num_programs(0)):
            bh, m, entry, exists = tile_of(t, q_tiles, q_counts, map_index, query_width)
            if exists:
                row, full, total = keys_of(m, entry, q_tiles, key_counts, Cq, query_width)
                b, h = (bh // H).to(gl.int64), (bh % H).to(gl.int64)
                tile = q_tiles + (m * query_width + entry) * 3
                order = permutation + b * spb + h * sph if HAS_PERMUTATION else permutation
                token, inside = tokens_of(tile, HALF * 64, order, sps, HAS_PERMUTATION, gl.SliceLayout(1, rows_layout))
                mask = inside[:, None] & (offs_d < D)[None, :]
                q_ptr = q + b * sqb + h * sqh + token[:, None] * sqs + offs_d[None, :]
                q_shared.store(gl.load(q_ptr, mask=mask, other=0.0))
                fence_async_shared()
                acc, m_i, l_i, n = _attend(
                    q_shared, key_tiles + row * key_width, full, total, bias + row * C if HAS_TAIL else bias, C, n,
                    k_stages, v_stages, barriers, scale_log2, BLOCK_D, STAGES, HAS_TAIL, s_layout, o_layout, p_layout,
                )  # fmt: skip
                divisor = gl.where(l_i == 0, 1.0, l_i)  # a row with nothing selected gives zeros
                acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, o_layout))[:, None]
                q_shared.store(acc.to(out.dtype.element_ty))  # through shared memory: whole rows to global memory
                # Once more: no registers for it over the loops.
                inside = tokens_of(tile, HALF * 64, order, sps, False, gl.SliceLayout(1, rows_layout))[1]
                mask = inside[:, None] & (offs_d < D)[None, :]
                out_ptr = out + b * sob + h * soh + token[:, None] * sos + offs_d[None, :]
                gl.store(out_ptr, q_shared.load(rows_layout), mask=mask)
                if HAS_LSE:
                    natural = (m_i + gl.log2(divisor)) * LN_2
                    natural = gl.where(l_i == 0, float("-inf"), natural)
                    natural = gl.convert_layout(natural, gl.SliceLayout(1, rows_layout))
                    gl.store(lse + (b * H + h) * S + token, natural, mask=inside)

    @gluon.jit(do_not_specialize=["programs", "S", "Sk", "Cq", "query_width", "key_width", "C"])
    def _hopper_attention_kernel(
        k_desc, v_desc, k_tail, v_tail, q, out, lse, bias, permutation, map_index, q_tiles, q_counts, key_tiles,
        key_counts, scale_log2, programs, H, S: gl.int64, Sk, Cq: gl.int64, query_width, key_width: gl.int64, C,
        sqb: gl.int64, sqh: gl.int64, sqs: gl.int64, sob: gl.int64, soh: gl.int64, sos: gl.int64,
        spb: gl.int64, sph: gl.int64, sps: gl.int64,
        D: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HAS_PERMUTATION: gl.constexpr,
        HAS_LSE: gl.constexpr, HAS_TAIL: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = q.dtype.element_ty
        PANELS: gl.constexpr = BLOCK_D // 64
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
        q_stages = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], layout)
        k_stages = gl.allocate_shared_memory(dtype, [STAGES, 128, BLOCK_D], layout)
        v_stages = gl.allocate_shared_memory(dtype, [STAGES, 128, BLOCK_D], layout)
        # What one copy fills: 64 keys of one panel of 64 columns.
        k_boxes = k_stages._reinterpret(dtype, [STAGES * PANELS * 2, 64, 64], layout)
        v_boxes = v_stages._reinterpret(dtype, [STAGES * PANELS * 2, 64, 64], layout)
        k_ready, k_empty = new_ring(STAGES, 2)
        v_ready, v_empty = new_ring(STAGES, 2)
        barriers = (k_ready, k_empty, v_ready, v_empty)
        stages = (q_stages, k_stages, v_stages)
        tensors = (q, permutation, out, lse, bias)
        lists = (q_tiles, q_counts, key_tiles, key_counts, map_index)
        sizes = (programs, Sk, Cq, query_width, key_width, C)
        shape = (H, S)
        strides = (sqb, sqh, sqs, sob, soh, sos, spb, sph, sps)
        gl.warp_specialize(
            [
                (_consume, (0, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2,
                            D, BLOCK_D, STAGES, HAS_PERMUTATION, HAS_LSE, HAS_TAIL)),
                (_consume, (1, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2,
                            D, BLOCK_D, STAGES, HAS_PERMUTATION, HAS_LSE, HAS_TAIL)),
                (_produce, ((k_desc, v_desc, k_tail, v_tail), (k_boxes, v_boxes), barriers, lists, sizes,
                            STAGES, PANELS, HAS_TAIL)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
