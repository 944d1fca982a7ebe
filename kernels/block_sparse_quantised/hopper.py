"""Block-sparse INT8 and FP8 attention for Hopper: `triton._sparse_quantised_kernel` on three warpgroups a program.

A loop of a warpgroup is dense_quantised/hopper.py's, the lists are block_sparse/triton.py's: two list entries of 64 keys make a stage of 128.
There the three share K and V, here each has 64 query rows, a list and a ring of stages of its own, and a warp that fills it:
query tiles stay small, and three loops at different places keep the tensor cores busy where two leave them idle a third of the
time. What they fetch more comes from L2.

Tiles of keys begin at multiples of 16 or 64, and as many share a scale: a thread's columns of a stage have eight scales or two,
each a factor of what it does to a row anyway, and none of a single score.

A tail's mean keys are stages after those of the list, quantised like other keys; their scores get a bias each.

Source: SpargeAttn and SageAttention2 (arXiv 2502.18137, 2411.10958); roles: FlashAttention-3 (arXiv 2407.08608, section 3).
"""

import torch

from ..common import target
from ..common.numbers import INT_AS_FLOAT, LN_2, LOG2_E, LOG2_FP8_MAX
from ..gluon import LOADABLE

QUERY_ROWS, TILE_KEYS = 64, 64  # of a query tile and of a list entry
CONSUMERS = 3
STAGES = 2  # of each consumer
ONES = {64: True, 128: True}  # padded head dim -> row sums as `dense_quantised.hopper.Launch.ones` has them
MAX_REGISTERS = 128  # a thread, for 16 warps; the consumers take 160 each, the producers 24


def supports(q: torch.Tensor, kind, row) -> bool:
    """Whether this kernel computes these inputs: Hopper, 16-bit q, P V in FP8 with fp32 sums.

    Args:
        q: [B, H, S, D].
        kind: one of `precision.PRECISIONS`.
        row: a `quantised_tile.Launch`.
    """
    return (
        LOADABLE and target.arch(q.device) == 90 and row.specialised and q.element_size() == 2
        and kind.fp8 and not kind.acc16
    )  # fmt: skip


def launch(
    q, keys, channels, out, lse, failed, permutation, pv_threshold, map_index, lists, Cq, scale_log2, group,
    tail=None,
) -> None:  # fmt: skip
    """Attention over tile lists.

    Args:
        q: [B, H, S, D] in 16 bits.
        keys: `QuantizedTokens` of K in sorted order.
        channels: `QuantizedChannels` of V in sorted order, interleaved.
        out: [B, H, S, D], written.
        lse: fp32 [B, H, S], written, or None.
        failed: int32 [B, H], set to 1 where sums left their range, or None.
        permutation: [B, H, S] sorted -> original index of queries, or None.
        pv_threshold: fp32 [H] or None; what it leaves out is P V of 64 queries and 128 keys at a time.
        map_index: [B, H].
        lists: `query_tiles` of QUERY_ROWS, their counts, `aligned_key_tiles` of 64 keys, their counts.
        Cq: query clusters of a map.
        scale_log2: softmax scale times log2 e.
        group: how many keys share a scale, 16 or 64; tiles of keys begin at multiples of it.
        tail: `QuantizedTokens` of mean keys, `QuantizedChannels` of mean values, in the scales of keys and channels, and
            fp32 [M, Cq, C] to add to their logits; or None.
    """
    B, H, S, D = q.shape
    Sk, block_d = keys.values.shape[2:]
    q_tiles, q_counts, key_tiles, key_counts = lists
    tiles = q_tiles.shape[1] * B * H
    k_desc, v_desc = _descriptors(keys, channels)
    k_tail, v_tail, k_tail_scale, bias, C = (None,) * 5
    if tail is not None:
        k_tail, v_tail = _descriptors(*tail[:2])
        k_tail_scale, bias, C = tail[0].scale, tail[2].contiguous(), tail[2].shape[2]
    strides = (0, 0, 0) if permutation is None else permutation.stride()
    with target.on_device(out):
        _hopper_sparse_quantised_kernel[(min(-(-tiles // CONSUMERS), target.sm_count(q.device)),)](
            k_desc, v_desc, k_tail, v_tail, q, keys.scale, k_tail_scale, bias, channels.scale, channels.mean, out, lse, failed,
            permutation, pv_threshold, map_index.contiguous(), q_tiles, q_counts, key_tiles, key_counts, scale_log2, tiles, H, S, Sk, Cq, C,
            q_tiles.shape[1], key_tiles.shape[2], *q.stride()[:3], *out.stride()[:3], *strides,
            CONSUMERS=CONSUMERS, D=D, BLOCK_D=block_d, GROUPS=128 // group, STAGES=STAGES,
            ONES=ONES[block_d] and pv_threshold is None,  # what P V leaves out still counts in the sums
            HAS_PERMUTATION=permutation is not None,
            HAS_MEAN=channels.mean is not None, HAS_LSE=lse is not None, HAS_FAILED=failed is not None,
            HAS_FLOOR=pv_threshold is not None, HAS_TAIL=tail is not None, num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip


def _descriptors(keys, channels):
    """Boxes of TILE_KEYS quantised keys, and of as many values."""
    block_d = keys.values.shape[3]
    return (
        TensorDescriptor.from_tensor(
            keys.values.view(-1, block_d), [TILE_KEYS, block_d], gl.NVMMASharedLayout(block_d, 8)
        ),
        TensorDescriptor.from_tensor(
            channels.values.flatten(0, 2), [block_d, TILE_KEYS], gl.NVMMASharedLayout(TILE_KEYS, 8)
        ),
    )


if LOADABLE:
    from ..gluon import TensorDescriptor, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
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
    from ..gluon.tile_walk import keys_of, tile_of, tokens_of

    @gluon.jit
    def _fetch(
        k_desc, v_desc, key, channel, first, second, boxes, barriers, n, PART: gl.constexpr, STAGES: gl.constexpr
    ):
        """Fills a consumer's n-th stage with the keys from first and from second on, of a head that begins at `key`."""
        k_boxes, v_boxes = boxes
        ready, empty = barriers
        stage, phase = place_of(n, PART, STAGES)
        bar = ready.index(stage)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(bar, 2 * 128 * v_boxes.shape[1])
        tma.async_copy_global_to_shared(k_desc, [key + first, 0], bar, k_boxes.index(2 * stage))
        tma.async_copy_global_to_shared(k_desc, [key + second, 0], bar, k_boxes.index(2 * stage + 1))
        tma.async_copy_global_to_shared(v_desc, [channel, first], bar, v_boxes.index(2 * stage))
        tma.async_copy_global_to_shared(v_desc, [channel, second], bar, v_boxes.index(2 * stage + 1))

    @gluon.jit
    def _produce(
        PART: gl.constexpr, descriptors, boxes, barriers, lists, sizes, CONSUMERS: gl.constexpr, BLOCK_D: gl.constexpr,
        STAGES: gl.constexpr, HAS_TAIL: gl.constexpr,
    ):  # fmt: skip
        """Fills the stages of one consumer."""
        k_desc, v_desc, k_tail, v_tail = descriptors
        q_tiles, q_counts, key_tiles, key_counts, map_index = lists
        count, Sk, Cq, query_width, key_width, C = sizes
        n = 0
        for t in range(gl.program_id(0) * CONSUMERS + PART, count, gl.num_programs(0) * CONSUMERS):
            bh, m, entry, exists = tile_of(t, q_tiles, q_counts, map_index, query_width)
            if exists:
                row, _, total = keys_of(m, entry, q_tiles, key_counts, Cq, query_width)
                tiles = key_tiles + row * key_width
                for i in range(0, total, 2):
                    first = gl.load(tiles + i) >> 10 << 4
                    second = gl.load(tiles + gl.minimum(i + 1, total - 1)) >> 10 << 4
                    _fetch(k_desc, v_desc, bh * Sk, bh * BLOCK_D, first, second, boxes, barriers, n, PART, STAGES)
                    n += 1
                if HAS_TAIL:
                    for c in range(0, C, 128):
                        _fetch(k_tail, v_tail, bh * C, bh * BLOCK_D, c, c + 64, boxes, barriers, n, PART, STAGES)
                        n += 1

    @gluon.jit
    def _starts(tiles, i, total, MASKED: gl.constexpr):
        """List entries i and i + 1: first key and keys of each; no keys where there is no second one."""
        first = gl.load(tiles + i)
        if MASKED:
            second = gl.load(tiles + gl.minimum(i + 1, total - 1))
            more = gl.where(i + 1 < total, (second & 63) + 1, 0)
        else:
            second = gl.load(tiles + i + 1)
            more = 64
        return first >> 6, (first & 63) + 1, second >> 6, more

    @gluon.jit
    def _scales_of(k_scale, starts, Sk, MASKED: gl.constexpr, GROUPS: gl.constexpr, layout: gl.constexpr):
        """Scales of the groups of keys of a stage; 1 for a group that is hidden, whose own may be NaN."""
        SIZE: gl.constexpr = 128 // GROUPS
        group = gl.arange(0, GROUPS, layout)
        first = gl.where(group < GROUPS // 2, starts[0], starts[2])
        place = group % (GROUPS // 2) * SIZE
        if MASKED:
            before = first & 15
            keys = gl.where(group < GROUPS // 2, starts[1], starts[3])
            key = first - before + place
            seen = (key < Sk) & (place + SIZE > before) & (place < before + keys)
            return gl.load(k_scale + key, mask=seen, other=1.0)
        else:  # full tiles begin at multiples of 16
            return gl.load(k_scale + first + place)

    @gluon.jit
    def _mask(x, starts, s_layout: gl.constexpr):
        """Scores outside the entries' keys become -inf."""
        first, keys, second, more = starts
        column = gl.arange(0, 128, gl.SliceLayout(0, s_layout))
        # Only the low bits of a column differ between threads: registers for them, constants for the rest.
        low = gl.where(column < 64, first & 15, second & 15) - (column & 6)
        high = low + gl.where(column < 64, keys, more)
        inside = ((column & 57) >= low) & ((column & 57) < high)
        return gl.where(inside[None, :], x, float("-inf"))

    @gluon.jit
    def _softmax(x, row_scale, k_scale, m_i, l_i, SUM: gl.constexpr, GROUPS: gl.constexpr, s_layout: gl.constexpr):
        """P up to 448, what scales the sums so far, this tile's and all maxima, each thread's sum."""
        x = x.reshape([64, GROUPS, 8 // GROUPS, 2, 4, 2])  # `by_sixteens`, and which group those are in
        peak = gl.max(gl.max(gl.max(x, 5), 3), 2)  # [64, GROUPS, 4]: of a thread's scores of a group
        by_group: gl.constexpr = gl.SliceLayout(2, peak.type.layout)
        scale = gl.convert_layout(row_scale, gl.SliceLayout(1, by_group))[:, None]
        scale = scale * gl.convert_layout(k_scale, gl.SliceLayout(0, by_group))[None, :]  # [64, GROUPS]
        zero = scale * INT_AS_FLOAT  # what a score of nothing is worth: see `integer_scores`
        peak = gl.max(gl.max(peak * gl.expand_dims(scale, 2) - gl.expand_dims(zero, 2), 1), 1)
        peak = gl.convert_layout(peak, gl.SliceLayout(1, s_layout))
        m_new = gl.maximum(m_i, peak)
        alpha = gl.exp2(m_i - m_new)
        top = zero + gl.convert_layout(m_new - LOG2_FP8_MAX, gl.SliceLayout(1, by_group))[:, None]
        p = gl.exp2(x * _spread(scale, x) - _spread(top, x)).reshape([64, 128])
        if SUM:
            part = own_sum(p)
            l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, part.type.layout))[:, None] + part
        return p, alpha, peak, m_new, l_i

    @gluon.jit
    def _spread(of_groups, x):
        """[64, GROUPS] to [64, GROUPS, 1, 1, 1, 1], as x is laid out."""
        flat: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, x.type.layout))))
        of_groups = gl.convert_layout(of_groups, flat)
        return gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(of_groups, 2), 3), 4), 5)

    @gluon.jit
    def _halves(p, layout: gl.constexpr):
        """P [64, 128] as two FP8 operands [64, 64]."""
        p = by_sixteens(p).permute([0, 1, 3, 2, 4]).reshape([64, 2, 64]).permute([0, 2, 1])
        first, second = gl.split(p)
        return to_bytes(first, layout), to_bytes(second, layout)

    @gluon.jit
    def _add_values(
        p, alpha, acc, t_i, ones, v_boxes, stage, ONES: gl.constexpr, BLOCK_D: gl.constexpr, o_layout: gl.constexpr
    ):
        """alpha acc + P V of a stage, and the same for a V of ones."""
        first, second = _halves(p, gl.DotOperandLayout(0, o_layout, 4))
        part = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        part = warpgroup_mma(first, v_boxes.index(2 * stage).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma(second, v_boxes.index(2 * stage + 1).permute((1, 0)), part, is_async=True)
        if ONES:
            total = gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32]))
            total = warpgroup_mma(first, ones.permute((1, 0)), total, use_acc=False, is_async=True)
            total = warpgroup_mma(second, ones.permute((1, 0)), total, is_async=True)
            part, total = warpgroup_mma_wait(0, deps=[part, total])
            t_i = t_i * gl.convert_layout(alpha, gl.SliceLayout(1, t_i.type.layout))[:, None] + one_column(total)
        else:
            part = warpgroup_mma_wait(0, deps=[part])
        return acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None] + part, t_i

    @gluon.jit
    def _step(
        q, acc, m_i, l_i, t_i, ones, row_scale, floor, k_scale, tiles, i, total, Sk, n, k_stages, v_boxes,
        barriers, PART: gl.constexpr, MASKED: gl.constexpr, HAS_FLOOR: gl.constexpr, ONES: gl.constexpr, SUM: gl.constexpr,
        GROUPS: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
    ):  # fmt: skip
        """One stage, the n-th of this consumer: running output, maximum and sums."""
        ready, empty = barriers
        stage, phase = place_of(n, PART, STAGES)
        mbarrier.wait(ready.index(stage), phase)
        s = integer_scores(q, k_stages.index(stage), s_layout)
        starts = _starts(tiles, i, total, MASKED)
        scales = _scales_of(k_scale, starts, Sk, MASKED, GROUPS, gl.SliceLayout(0, s_layout))
        s = warpgroup_mma_wait(0, deps=[s])
        x = s.to(gl.float32, bitcast=True)
        if MASKED:
            x = _mask(x, starts, s_layout)
        p, alpha, peak, m_new, l_i = _softmax(x, row_scale, scales, m_i, l_i, SUM, GROUPS, s_layout)
        if HAS_FLOOR:
            # Else no maximum rose, alpha is 1, and what V would add is below what the caller asked for.
            if gl.max((peak - m_i >= floor).to(gl.int32), 0) > 0:
                acc, t_i = _add_values(p, alpha, acc, t_i, ones, v_boxes, stage, ONES, BLOCK_D, o_layout)
        else:
            acc, t_i = _add_values(p, alpha, acc, t_i, ones, v_boxes, stage, ONES, BLOCK_D, o_layout)
        mbarrier.arrive(empty.index(stage), count=1)
        return acc, m_new, l_i, t_i

    @gluon.jit
    def _tail_scores(s, row_scale, k_scale, log_size, GROUPS: gl.constexpr, s_layout: gl.constexpr):
        """Scores of mean keys, base 2, with the logs of how many keys each one is."""
        x = s.to(gl.float32, bitcast=True).reshape([64, GROUPS, 8 // GROUPS, 2, 4, 2])  # as in `_softmax`
        by_group: gl.constexpr = gl.SliceLayout(
            2, gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, x.type.layout)))
        )
        scale = gl.convert_layout(row_scale, gl.SliceLayout(1, by_group))[:, None]
        scale = scale * gl.convert_layout(k_scale, gl.SliceLayout(0, by_group))[None, :]
        x = gl.convert_layout(((x - INT_AS_FLOAT) * _spread(scale, x)).reshape([64, 128]), s_layout)
        return x + gl.convert_layout(log_size, gl.SliceLayout(0, s_layout))[None, :]

    @gluon.jit
    def _tail_step(
        q, acc, m_i, l_i, t_i, ones, row_scale, k_scale, bias, c, C, n, k_stages, v_boxes, barriers, PART: gl.constexpr,
        ONES: gl.constexpr, SUM: gl.constexpr, GROUPS: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
        s_layout: gl.constexpr, o_layout: gl.constexpr,
    ):  # fmt: skip
        """`_step` of mean keys c ..."""
        column = c + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))  # one a thread: registers are short
        ready, empty = barriers
        stage, phase = place_of(n, PART, STAGES)
        mbarrier.wait(ready.index(stage), phase)
        s = integer_scores(q, k_stages.index(stage), s_layout)
        scales = _scales_of(k_scale, (c, 64, c + 64, 64), C, True, GROUPS, gl.SliceLayout(0, s_layout))
        log_size = gl.load(bias + column, mask=column < C, other=float("-inf")) * LOG2_E
        s = warpgroup_mma_wait(0, deps=[s])
        x = _tail_scores(s, row_scale, scales, log_size, GROUPS, s_layout)
        m_new = gl.maximum(m_i, gl.max(x, 1))
        alpha = gl.exp2(m_i - m_new)
        p = gl.exp2(x - (m_new - LOG2_FP8_MAX)[:, None])
        if SUM:
            part = own_sum(p)
            l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, part.type.layout))[:, None] + part
        acc, t_i = _add_values(p, alpha, acc, t_i, ones, v_boxes, stage, ONES, BLOCK_D, o_layout)
        mbarrier.arrive(empty.index(stage), count=1)
        return acc, m_new, l_i, t_i

    @gluon.jit
    def _consume(
        PART: gl.constexpr, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2,
        CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
        ONES: gl.constexpr, HAS_PERMUTATION: gl.constexpr, HAS_MEAN: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FAILED: gl.constexpr,
        HAS_FLOOR: gl.constexpr, HAS_TAIL: gl.constexpr,
    ):  # fmt: skip
        q, k_scales, k_tail_scales, bias, v_scale, v_mean, out, lse, failed, permutation, pv_threshold = tensors
        q_stages, k_stages, v_boxes, ones = stages
        SUM: gl.constexpr = HAS_LSE or not ONES
        q_tiles, q_counts, key_tiles, key_counts, map_index = lists
        count, Sk, Cq, query_width, key_width, C = sizes
        H, S = shape
        sqb, sqh, sqs, sob, soh, sos, spb, sph, sps = strides
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
        across: gl.constexpr = BLOCK_D // 8
        rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
        q_shared = q_stages.index(PART)
        n = 0
        for t in range(gl.program_id(0) * CONSUMERS + PART, count, gl.num_programs(0) * CONSUMERS):
            bh, m, entry, exists = tile_of(t, q_tiles, q_counts, map_index, query_width)
            if exists:
                map_row, full, total = keys_of(m, entry, q_tiles, key_counts, Cq, query_width)
                b, h = (bh // H).to(gl.int64), (bh % H).to(gl.int64)
                tile = q_tiles + (m * query_width + entry) * 3
                order = permutation + b * spb + h * sph if HAS_PERMUTATION else permutation
                token, inside = tokens_of(tile, 0, order, sps, HAS_PERMUTATION, gl.SliceLayout(1, rows_layout))
                offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows_layout))
                q_ptr = q + b * sqb + h * sqh + token[:, None] * sqs + offs_d[None, :]
                rows = gl.load(q_ptr, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)
                row_scale = rows_to_int8(rows, q_shared, scale_log2, s_layout)

                tiles = key_tiles + map_row * key_width
                k_scale = k_scales + bh.to(gl.int64) * Sk
                acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
                m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
                l_i = own_sum(gl.zeros([64, 128], gl.float32, s_layout))
                t_i = one_column(gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])))
                floor = m_i
                if HAS_FLOOR:
                    there = gl.arange(0, 64, gl.SliceLayout(1, s_layout)) < gl.load(tile + 2)
                    floor = gl.where(there, -gl.load(pv_threshold + h), float("inf"))  # the others ask for nothing
                whole = full // 2 * 2
                for i in range(0, whole, 2):
                    acc, m_i, l_i, t_i = _step(
                        q_shared, acc, m_i, l_i, t_i, ones, row_scale, floor, k_scale, tiles, i, total, Sk, n,
                        k_stages, v_boxes, barriers, PART, False, HAS_FLOOR, ONES, SUM, GROUPS, BLOCK_D, STAGES, s_layout, o_layout,
                    )  # fmt: skip
                    n += 1
                for i in range(whole, total, 2):
                    acc, m_i, l_i, t_i = _step(
                        q_shared, acc, m_i, l_i, t_i, ones, row_scale, floor, k_scale, tiles, i, total, Sk, n,
                        k_stages, v_boxes, barriers, PART, True, HAS_FLOOR, ONES, SUM, GROUPS, BLOCK_D, STAGES, s_layout, o_layout,
                    )  # fmt: skip
                    n += 1
                if HAS_TAIL:
                    for c in range(0, C, 128):
                        acc, m_i, l_i, t_i = _tail_step(
                            q_shared, acc, m_i, l_i, t_i, ones, row_scale, k_tail_scales + bh.to(gl.int64) * C, bias + map_row * C,
                            c, C, n, k_stages, v_boxes, barriers, PART, ONES, SUM, GROUPS, BLOCK_D, STAGES, s_layout, o_layout,
                        )  # fmt: skip
                        n += 1

                by_row: gl.constexpr = gl.SliceLayout(1, o_layout)
                column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_layout))
                l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout))
                seen = gl.convert_layout(gl.max(t_i, 1), gl.SliceLayout(1, s_layout)) if ONES else l_i
                # a row with nothing selected gives zeros
                acc = acc / gl.convert_layout(gl.where(seen == 0, 1.0, seen), by_row)[:, None]
                channel = bh.to(gl.int64) * BLOCK_D
                acc = in_values_range(
                    acc, v_scale + channel, failed + bh if HAS_FAILED else failed, BLOCK_D, HAS_FAILED, o_layout
                )
                if HAS_MEAN:
                    some = gl.convert_layout(seen, by_row) != 0
                    acc += gl.where(some[:, None], gl.load(v_mean + channel + column)[None, :], 0.0)
                token, inside = tokens_of(tile, 0, order, sps, HAS_PERMUTATION, by_row)
                out_ptr = out + b * sob + h * soh + token[:, None] * sos + column[None, :]
                gl.store(out_ptr, acc.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
                if HAS_LSE:
                    natural = (m_i + gl.log2(gl.where(l_i == 0, 1.0, l_i)) - LOG2_FP8_MAX) * LN_2
                    natural = gl.convert_layout(gl.where(l_i == 0, float("-inf"), natural), by_row)
                    gl.store(lse + bh.to(gl.int64) * S + token, natural, mask=inside)

    @gluon.jit(do_not_specialize=["count", "S", "Sk", "Cq", "C", "query_width", "key_width"])
    def _hopper_sparse_quantised_kernel(
        k_desc, v_desc, k_tail, v_tail, q, k_scale, k_tail_scale, bias, v_scale, v_mean, out, lse, failed, permutation, pv_threshold,
        map_index, q_tiles, q_counts, key_tiles, key_counts, scale_log2, count, H, S, Sk, Cq, C, query_width, key_width,
        sqb: gl.int64, sqh: gl.int64, sqs: gl.int64, sob: gl.int64, soh: gl.int64, sos: gl.int64,
        spb: gl.int64, sph: gl.int64, sps: gl.int64,
        CONSUMERS: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
        ONES: gl.constexpr, HAS_PERMUTATION: gl.constexpr, HAS_MEAN: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FAILED: gl.constexpr,
        HAS_FLOOR: gl.constexpr, HAS_TAIL: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        RINGS: gl.constexpr = CONSUMERS * STAGES
        k_layout: gl.constexpr = gl.NVMMASharedLayout(BLOCK_D, 8)
        q_stages = gl.allocate_shared_memory(gl.int8, [CONSUMERS, 64, BLOCK_D], k_layout)
        k_stages = gl.allocate_shared_memory(gl.int8, [RINGS, 128, BLOCK_D], k_layout)
        k_boxes = k_stages._reinterpret(gl.int8, [RINGS * 2, 64, BLOCK_D], k_layout)
        v_boxes = gl.allocate_shared_memory(gl.float8e4nv, [RINGS * 2, BLOCK_D, 64], gl.NVMMASharedLayout(64, 8))
        barriers = new_ring(RINGS, 1)
        ones = gl.allocate_shared_memory(gl.float8e4nv, [8, 64], gl.NVMMASharedLayout(64, 8))
        if ONES:
            store_ones(ones, 64)
        stages, boxes, descriptors = (
            (q_stages, k_stages, v_boxes, ones),
            (k_boxes, v_boxes),
            (k_desc, v_desc, k_tail, v_tail),
        )
        tensors = (q, k_scale, k_tail_scale, bias, v_scale, v_mean, out, lse, failed, permutation, pv_threshold)
        lists = (q_tiles, q_counts, key_tiles, key_counts, map_index)
        sizes = (count, Sk, Cq, query_width, key_width, C)
        shape = (H, S)
        strides = (sqb, sqh, sqs, sob, soh, sos, spb, sph, sps)
        gl.warp_specialize(
            [
                (_consume, (0, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2, CONSUMERS, D, BLOCK_D,
                            GROUPS, STAGES, ONES, HAS_PERMUTATION, HAS_MEAN, HAS_LSE, HAS_FAILED, HAS_FLOOR, HAS_TAIL)),
                (_consume, (1, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2, CONSUMERS, D, BLOCK_D,
                            GROUPS, STAGES, ONES, HAS_PERMUTATION, HAS_MEAN, HAS_LSE, HAS_FAILED, HAS_FLOOR, HAS_TAIL)),
                (_consume, (2, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2, CONSUMERS, D, BLOCK_D,
                            GROUPS, STAGES, ONES, HAS_PERMUTATION, HAS_MEAN, HAS_LSE, HAS_FAILED, HAS_FLOOR, HAS_TAIL)),
                (_produce, (0, descriptors, boxes, barriers, lists, sizes, CONSUMERS, BLOCK_D, STAGES, HAS_TAIL)),
                (_produce, (1, descriptors, boxes, barriers, lists, sizes, CONSUMERS, BLOCK_D, STAGES, HAS_TAIL)),
                (_produce, (2, descriptors, boxes, barriers, lists, sizes, CONSUMERS, BLOCK_D, STAGES, HAS_TAIL)),
            ],
            [4, 4, 1, 1, 1],
            [160, 160, 24, 24, 24],
        )  # fmt: skip
