"""Attention over granules in INT8 and FP8 for Hopper: dense 8-bit attention's loop, filled granule by granule.

The loop of a warpgroup is dense_quantised/hopper.py's: integer scores used as the floats their bits spell, P left in the registers
that Q K^T put it in, P V of a stage from zero and added in fp32. As in block_sparse_quantised/hopper.py each of three
warpgroups has 64 query rows, a list and a ring of stages of its own, and a warp that fills it.

A stage of 128 keys is 128 / size granules, copied one by one. Rows of 128 bytes in the swizzle of 128 bytes repeat every 8
rows, so a granule of K lands where it would in a box of the whole stage. V cannot do that: 8-bit products want its keys side
by side, and a granule has 16 of a row's 128. So V lies in blocks [D, 16] of 16 keys (2 KB in one piece), and a stage is eight
of them, which is the operand layout without a swizzle: core matrices of 8 channels x 16 keys.

The scale of a head's keys goes into those of the queries: nothing in the loop multiplies by it. The means of granules that are
not listed are further stages of the same loop; bits say which, and all weigh as much as a granule has keys.

Source: SageAttention2 (arXiv 2411.10958); roles: FlashAttention-3 (arXiv 2407.08608, section 3).
"""

import math

import torch

from ..common import target
from ..common.numbers import INT_AS_FLOAT, LN_2, LOG2_FP8_MAX
from ..gluon import LOADABLE

ROWS = 64  # of a warpgroup: lists must be for as many at least
CONSUMERS, STAGES = 3, 2  # warpgroups of ROWS query rows, and stages of 128 keys of each
SIZES = (16, 32, 64)  # keys of a granule: V's blocks hold 16
MAX_REGISTERS = 128  # a thread, for 16 warps; the consumers take 160 each, the producers 24


def supports(k: torch.Tensor, kind, size: int, rows: int) -> bool:
    """Whether this kernel attends to keys: Hopper, 16 bits, P V in FP8 with fp32 sums, granules of 16 keys and lists for
    64 rows and more.

    Args:
        k: [B, H, S, D] in the queries' dtype.
        kind: one of `precision.PRECISIONS`.
        size: keys a granule.
        rows: query rows that share a list.
    """
    return (
        LOADABLE and target.arch(k.device) == 90 and k.element_size() == 2
        and kind.fp8 and not kind.acc16 and size in SIZES and rows >= ROWS
    )  # fmt: skip


def launch(q, granules, lists, out, lse, failed, q_order, scale_log2, tail) -> None:
    """Attention over lists of granules.

    Args:
        q: [B, H, S, D] in 16 bits.
        granules: `QuantizedGranules`.
        lists: `GranuleLists`.
        out: [B, H, S, D], rows that q_order names are written.
        lse: fp32 [B, H, S], written likewise, or None.
        failed: int32 [B, H], set to 1 where sums left their range, or None.
        q_order: int [B, H, V], or None for all rows in order.
        scale_log2: softmax scale times log2 e.
        tail: whether means of unlisted granules take part.
    """
    B, H, S, D = q.shape
    V = S if q_order is None else q_order.shape[2]
    block_d, C = granules.k.shape[3], granules.tokens.shape[1]
    T, means = granules.means, granules.tail_k.shape[2]
    tiles = lists.counts.numel() * lists.rows // 64  # of 64 rows; the last group's second may have none
    descriptors = _descriptors(granules.k, granules.v, granules.size)
    descriptors += _descriptors(granules.tail_k, granules.tail_v, 128) if tail else (None, None)
    strides = (0, 0, 0) if q_order is None else q_order.stride()
    with target.on_device(out):
        # Three tiles a program: the hardware hands out the next ones wherever a program ends.
        _hopper_granules_int8_kernel[(-(-tiles // CONSUMERS),)](
            *descriptors, q, granules.k_scale, granules.v_scale, granules.v_mean, out, lse, failed, q_order, granules.tokens,
            lists.entries, lists.starts, lists.whole, lists.counts, lists.chosen, lists.schedule,
            scale_log2, tiles, H, V, S, C, T, means, lists.counts.shape[2], lists.chosen.shape[3], lists.rows // 64,
            *q.stride()[:3], *out.stride()[:3], *strides,
            CONSUMERS=CONSUMERS, D=D, BLOCK_D=block_d, SIZE=granules.size, STAGES=STAGES,
            BIAS=math.log2(granules.size), HAS_ORDER=q_order is not None, HAS_LSE=lse is not None,
            HAS_FAILED=failed is not None, HAS_TAIL=tail, num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip


def _descriptors(k, v, keys):
    """Boxes of `keys` quantised keys, and of as many values: pieces of memory, as rows of 128 bytes."""
    block_d = k.shape[3]
    return (
        TensorDescriptor.from_tensor(k.view(-1, block_d), [keys, block_d], gl.NVMMASharedLayout(block_d, 8)),
        TensorDescriptor.from_tensor(v.view(-1, 128), [keys * block_d // 128, 128], gl.NVMMASharedLayout(0, 8)),
    )


if LOADABLE:
    from ..gluon import (
        TensorDescriptor,
        gl,
        gluon,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from ..gluon.mma import (
        by_sixteens,
        in_values_range,
        integer_scores,
        one_column,
        own_sum,
        rows_to_int8,
        store_ones,
        to_bytes,
    )
    from ..gluon.ring import new_ring, place_of
    from ..gluon.tile_walk import tokens_from

    @gluon.constexpr_function
    def values_layout(block_d):
        """V of a stage, [128 keys, channels]: 16 keys in a row, channels below each other, blocks of both in one piece."""
        keys = [[1 << bit, 0] for bit in range(7)]
        channels = [[0, 1 << bit] for bit in range(block_d.bit_length() - 1)]
        return gl.SharedLinearLayout(keys[:4] + channels + keys[4:], [], 1024)

    @gluon.jit
    def _list_of(t, lists, sizes):
        """Head, first row, group and list of the t-th query tile: where the list begins, its whole entries, all entries."""
        entries, starts, whole, counts, _, schedule = lists
        groups, shared = sizes
        group = gl.load(schedule + t // shared)
        bh, first = group // groups, (group % groups * shared + t % shared) * 64
        group = group.to(gl.int64)
        return bh, first, group, entries + gl.load(starts + group), gl.load(whole + group), gl.load(counts + group)

    @gluon.jit
    def _produce(
        PART: gl.constexpr, descriptors, boxes, barriers, lists, sizes, shape, CONSUMERS: gl.constexpr, BLOCK_D: gl.constexpr,
        SIZE: gl.constexpr, STAGES: gl.constexpr, HAS_TAIL: gl.constexpr,
    ):  # fmt: skip
        """Fills the stages of one consumer."""
        k_desc, v_desc, k_tail, v_tail = descriptors
        k_boxes, v_boxes, k_stages, v_stages = boxes
        ready, empty = barriers
        count, C, T, means = shape
        NUMBER: gl.constexpr = 128 // SIZE
        BLOCK: gl.constexpr = SIZE * BLOCK_D // 128  # rows of 128 bytes that a granule of V has
        n = 0
        for t in range(gl.program_id(0) * CONSUMERS + PART, count, gl.num_programs(0) * CONSUMERS):
            bh, _, _, entries, _, total = _list_of(t, lists, sizes)
            for i in range(0, total, NUMBER):
                stage, phase = place_of(n, PART, STAGES)
                bar = ready.index(stage)
                found = ()
                for j in gl.static_range(NUMBER):
                    found = found + (bh * C + gl.load(entries + gl.minimum(i + j, total - 1)),)
                mbarrier.wait(empty.index(stage), phase ^ 1)
                mbarrier.expect(bar, 2 * 128 * BLOCK_D)
                for j in gl.static_range(NUMBER):
                    tma.async_copy_global_to_shared(
                        k_desc, [found[j] * SIZE, 0], bar, k_boxes.index(stage * NUMBER + j)
                    )
                for j in gl.static_range(NUMBER):
                    tma.async_copy_global_to_shared(
                        v_desc, [found[j] * BLOCK, 0], bar, v_boxes.index(stage * NUMBER + j)
                    )
                n += 1
            if HAS_TAIL:
                for c in range(0, T, 128):
                    stage, phase = place_of(n, PART, STAGES)
                    bar = ready.index(stage)
                    mbarrier.wait(empty.index(stage), phase ^ 1)
                    mbarrier.expect(bar, 2 * 128 * BLOCK_D)
                    tma.async_copy_global_to_shared(k_tail, [bh * means + c, 0], bar, k_stages.index(stage))
                    row = (bh * means + c) // 128 * BLOCK_D
                    tma.async_copy_global_to_shared(v_tail, [row, 0], bar, v_stages.index(stage))
                    n += 1

    @gluon.jit
    def _hide_empty(x, entries, tokens, i, total, SIZE: gl.constexpr, s_layout: gl.constexpr):
        """Scores of slots without a token, and of entries past the last, become -inf."""
        column = gl.arange(0, 128, gl.SliceLayout(0, s_layout))
        # Only the low bits of a column differ between threads: registers for them, constants for the rest.
        held = column * 0
        for j in gl.static_range(128 // SIZE):
            number = gl.load(tokens + gl.load(entries + gl.minimum(i + j, total - 1)))
            held = gl.where(column // SIZE == j, gl.where(i + j < total, number, 0), held)
        inside = (column & (SIZE - 1) & 121) < held - (column & 6)
        return gl.where(inside[None, :], x, float("-inf"))

    @gluon.jit
    def _hide_listed(x, words, c, width, s_layout: gl.constexpr):
        """Scores of means whose granule is listed become -inf; `words` are their bits, from c on."""
        column = gl.arange(0, 128, gl.SliceLayout(0, s_layout))
        first = c // 32
        bits = column * 0
        for j in gl.static_range(4):
            word = gl.load(words + first + j, mask=first + j < width, other=-1)
            bits = gl.where(column // 32 == j, word, bits)
        listed = (bits >> (column & 6)) & (1 << (column & 25))
        return gl.where((listed == 0)[None, :], x, float("-inf"))

    @gluon.jit
    def _softmax(x, scale, m_i, l_i, BIAS: gl.constexpr, SUM: gl.constexpr):
        """P up to 448, what scales the sums so far, maximum and each thread's sum."""
        m_new = gl.maximum(m_i, (gl.max(x, 1) - INT_AS_FLOAT) * scale + BIAS)
        alpha = gl.exp2(m_i - m_new)
        # 448 in P and in l cancels; the largest P then takes FP8's whole range. The constant of the scores' bits goes with it.
        p = gl.exp2(x * scale[:, None] - (m_new + (scale * INT_AS_FLOAT - (LOG2_FP8_MAX + BIAS)))[:, None])
        if SUM:
            part = own_sum(p)
            l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, part.type.layout))[:, None] + part
        return p, alpha, m_new, l_i

    @gluon.jit
    def _step(
        q, acc, m_i, l_i, t_i, ones, scale, seen, i, n, k_stages, v_stages, barriers, PART: gl.constexpr, KIND: gl.constexpr,
        SIZE: gl.constexpr, BIAS: gl.constexpr, SUM: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
        s_layout: gl.constexpr, o_layout: gl.constexpr,
    ):  # fmt: skip
        """One stage, the n-th of this consumer: running output, maximum and sums."""
        entries, tokens, total, words, width = seen
        ready, empty = barriers
        stage, phase = place_of(n, PART, STAGES)
        mbarrier.wait(ready.index(stage), phase)
        s = integer_scores(q, k_stages.index(stage), s_layout)
        s = warpgroup_mma_wait(0, deps=[s])
        x = s.to(gl.float32, bitcast=True)
        if KIND == "partial":
            x = _hide_empty(x, entries, tokens, i, total, SIZE, s_layout)
        elif KIND == "tail":
            x = _hide_listed(x, words, i, width, s_layout)
        p, alpha, m_i, l_i = _softmax(x, scale, m_i, l_i, BIAS if KIND == "tail" else 0.0, SUM)
        p = by_sixteens(p).permute([0, 1, 3, 2, 4]).reshape([64, 128])
        p = to_bytes(p, gl.DotOperandLayout(0, o_layout, 4))
        part = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        part = warpgroup_mma(p, v_stages.index(stage), part, use_acc=False, is_async=True)
        total_p = gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32]))
        total_p = warpgroup_mma(p, ones.permute((1, 0)), total_p, use_acc=False, is_async=True)
        part, total_p = warpgroup_mma_wait(0, deps=[part, total_p])
        mbarrier.arrive(empty.index(stage), count=1)
        t_i = t_i * gl.convert_layout(alpha, gl.SliceLayout(1, t_i.type.layout))[:, None] + one_column(total_p)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None] + part
        return acc, m_i, l_i, t_i

    @gluon.jit
    def _consume(
        PART: gl.constexpr, tensors, stages, barriers, lists, sizes, shape, rows, strides, scale_log2, CONSUMERS: gl.constexpr,
        D: gl.constexpr, BLOCK_D: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr,
        HAS_ORDER: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FAILED: gl.constexpr, HAS_TAIL: gl.constexpr,
    ):  # fmt: skip
        q, k_scale, v_scale, v_mean, out, lse, failed, q_order, tokens = tensors
        q_stages, k_stages, v_stages, ones = stages
        count, C, T, _ = shape
        H, V, S, width = rows
        sqb, sqh, sqs, sob, soh, sos, spb, sph, sps = strides
        NUMBER: gl.constexpr = 128 // SIZE
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
        across: gl.constexpr = BLOCK_D // 8
        rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
        q_shared = q_stages.index(PART)
        n = 0
        for t in range(gl.program_id(0) * CONSUMERS + PART, count, gl.num_programs(0) * CONSUMERS):
            bh, first, group, entries, whole, total = _list_of(t, lists, sizes)
            b, h = (bh // H).to(gl.int64), (bh % H).to(gl.int64)
            channel = bh.to(gl.int64) * BLOCK_D
            order = q_order + b * spb + h * sph if HAS_ORDER else q_order
            token, inside = tokens_from(first, V, order, sps, HAS_ORDER, gl.SliceLayout(1, rows_layout))
            offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows_layout))
            q_ptr = q + b * sqb + h * sqh + token[:, None] * sqs + offs_d[None, :]
            found = gl.load(q_ptr, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0).to(gl.float32)
            scale = rows_to_int8(found, q_shared, scale_log2 * gl.load(k_scale + bh), s_layout)

            acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
            l_i = own_sum(gl.zeros([64, 128], gl.float32, s_layout))
            t_i = one_column(gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])))
            seen = (entries, tokens + b * C, total, lists[4] + group * width, width)
            full = whole // NUMBER * NUMBER
            for i in range(0, full, NUMBER):
                acc, m_i, l_i, t_i = _step(
                    q_shared, acc, m_i, l_i, t_i, ones, scale, seen, i, n, k_stages, v_stages, barriers, PART, "whole",
                    SIZE, BIAS, HAS_LSE, BLOCK_D, STAGES, s_layout, o_layout,
                )  # fmt: skip
                n += 1
            for i in range(full, total, NUMBER):
                acc, m_i, l_i, t_i = _step(
                    q_shared, acc, m_i, l_i, t_i, ones, scale, seen, i, n, k_stages, v_stages, barriers, PART, "partial",
                    SIZE, BIAS, HAS_LSE, BLOCK_D, STAGES, s_layout, o_layout,
                )  # fmt: skip
                n += 1
            if HAS_TAIL:
                for c in range(0, T, 128):
                    acc, m_i, l_i, t_i = _step(
                        q_shared, acc, m_i, l_i, t_i, ones, scale, seen, c, n, k_stages, v_stages, barriers, PART, "tail",
                        SIZE, BIAS, HAS_LSE, BLOCK_D, STAGES, s_layout, o_layout,
                    )  # fmt: skip
                    n += 1

            by_row: gl.constexpr = gl.SliceLayout(1, o_layout)
            column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_layout))
            summed = gl.convert_layout(gl.max(t_i, 1), by_row)
            some = summed != 0  # a row with nothing to attend to gives zeros; NaN is something
            acc = acc / gl.where(some, summed, 1.0)[:, None]
            acc = in_values_range(
                acc, v_scale + channel, failed + bh if HAS_FAILED else failed, BLOCK_D, HAS_FAILED, o_layout
            )
            acc += gl.where(some[:, None], gl.load(v_mean + channel + column)[None, :], 0.0)
            token, inside = tokens_from(first, V, order, sps, HAS_ORDER, by_row)
            out_ptr = out + b * sob + h * soh + token[:, None] * sos + column[None, :]
            gl.store(out_ptr, acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
            if HAS_LSE:
                l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout))
                natural = m_i + gl.log2(gl.where(l_row == 0, 1.0, l_row)) - LOG2_FP8_MAX
                natural = gl.where(l_row == 0, float("-inf"), natural * LN_2)
                gl.store(lse + bh.to(gl.int64) * S + token, gl.convert_layout(natural, by_row), mask=inside)

    @gluon.jit(do_not_specialize=["count", "V", "S", "C", "T", "means", "groups", "width", "shared"])
    def _hopper_granules_int8_kernel(
        k_desc, v_desc, k_tail, v_tail, q, k_scale, v_scale, v_mean, out, lse, failed, q_order, tokens,
        entries, starts, whole, counts, chosen, schedule, scale_log2, count, H, V, S, C, T, means, groups, width, shared,
        sqb: gl.int64, sqh: gl.int64, sqs: gl.int64, sob: gl.int64, soh: gl.int64, sos: gl.int64,
        spb: gl.int64, sph: gl.int64, sps: gl.int64,
        CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
        BIAS: gl.constexpr, HAS_ORDER: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FAILED: gl.constexpr, HAS_TAIL: gl.constexpr,
        num_warps: gl.constexpr,
    ):  # fmt: skip
        RINGS: gl.constexpr = CONSUMERS * STAGES
        NUMBER: gl.constexpr = 128 // SIZE
        BLOCK: gl.constexpr = SIZE * BLOCK_D // 128
        k_layout: gl.constexpr = gl.NVMMASharedLayout(BLOCK_D, 8)
        flat: gl.constexpr = gl.NVMMASharedLayout(0, 8)
        q_stages = gl.allocate_shared_memory(gl.int8, [CONSUMERS, 64, BLOCK_D], k_layout)
        k_stages = gl.allocate_shared_memory(gl.int8, [RINGS, 128, BLOCK_D], k_layout)
        v_flat = gl.allocate_shared_memory(gl.float8e4nv, [RINGS, BLOCK_D, 128], flat)
        k_boxes = k_stages._reinterpret(gl.int8, [RINGS * NUMBER, SIZE, BLOCK_D], k_layout)
        v_boxes = v_flat._reinterpret(gl.float8e4nv, [RINGS * NUMBER, BLOCK, 128], flat)
        v_stages = v_flat._reinterpret(gl.float8e4nv, [RINGS, 128, BLOCK_D], values_layout(BLOCK_D))
        barriers = new_ring(RINGS, 1)
        ones = gl.allocate_shared_memory(gl.float8e4nv, [8, 128], gl.NVMMASharedLayout(128, 8))
        store_ones(ones, 128)
        descriptors = (k_desc, v_desc, k_tail, v_tail)
        stages, boxes = (q_stages, k_stages, v_stages, ones), (k_boxes, v_boxes, k_stages, v_flat)
        tensors = (q, k_scale, v_scale, v_mean, out, lse, failed, q_order, tokens)
        lists, sizes = (entries, starts, whole, counts, chosen, schedule), (groups, shared)
        shape, rows = (count, C, T, means), (H, V, S, width)
        strides = (sqb, sqh, sqs, sob, soh, sos, spb, sph, sps)
        gl.warp_specialize(
            [
                (_consume, (0, tensors, stages, barriers, lists, sizes, shape, rows, strides, scale_log2, CONSUMERS, D, BLOCK_D,
                            SIZE, STAGES, BIAS, HAS_ORDER, HAS_LSE, HAS_FAILED, HAS_TAIL)),
                (_consume, (1, tensors, stages, barriers, lists, sizes, shape, rows, strides, scale_log2, CONSUMERS, D, BLOCK_D,
                            SIZE, STAGES, BIAS, HAS_ORDER, HAS_LSE, HAS_FAILED, HAS_TAIL)),
                (_consume, (2, tensors, stages, barriers, lists, sizes, shape, rows, strides, scale_log2, CONSUMERS, D, BLOCK_D,
                            SIZE, STAGES, BIAS, HAS_ORDER, HAS_LSE, HAS_FAILED, HAS_TAIL)),
                (_produce, (0, descriptors, boxes, barriers, lists, sizes, shape, CONSUMERS, BLOCK_D, SIZE, STAGES, HAS_TAIL)),
                (_produce, (1, descriptors, boxes, barriers, lists, sizes, shape, CONSUMERS, BLOCK_D, SIZE, STAGES, HAS_TAIL)),
                (_produce, (2, descriptors, boxes, barriers, lists, sizes, shape, CONSUMERS, BLOCK_D, SIZE, STAGES, HAS_TAIL)),
            ],
            [4, 4, 1, 1, 1],
            [160, 160, 24, 24, 24],
        )  # fmt: skip
