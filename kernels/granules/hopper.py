"""Attention over lists of granules for Hopper: triton.py's loops with two producers and two consumers (Gluon).

A program computes one group of 128 query rows; `schedule` says which, long lists first. One warp fetches keys and one
values through the tensor memory accelerator into stages of 128 keys, as fast as stages come free. A stage is filled
granule by granule: the 128-byte swizzle repeats every 8 rows, so a box of 8 rows or more lands where it would in a box of
the whole stage, and no tile is padded whatever the list holds. Two warpgroups of 64 rows each compute: while the softmax
of one stage runs, the tensor cores do the next Q K^T and the previous P V.

A tail is further stages of the same loop over the granules' means. Their logits share one bias, the logarithm of the
granule's size, which goes into the maximum; a bit a granule tells which are listed.

Source: the schedule is FlashAttention-3's (arXiv 2407.08608, section 3), here over lists of granules.
"""

import math

import torch

from ..common import target
from ..common.numbers import LN_2
from ..gluon import LOADABLE

ROWS = 128  # of a query group: two warpgroups of 64
MAX_REGISTERS = 168  # a thread, for 12 warps; the consumers take 240 each, the producers 24


def supports(q: torch.Tensor, granules, lists) -> bool:
    """Whether this kernel computes these inputs: Hopper, 16 bits, head dim up to 128, lists for 128 rows.

    Args:
        q: [B, H, S, D].
        granules: `Granules`.
        lists: `GranuleLists`.
    """
    B, H, slots, D = granules.k.shape
    return (
        LOADABLE and target.arch(q.device) == 90 and q.element_size() == 2 and lists.rows == ROWS and D <= 128
        and B * H * slots < 1 << 31  # a coordinate of the accelerator has 32 bits
        and all(target.fits_descriptor(x) for x in (granules.k, granules.v, granules.k_mean, granules.v_mean))
    )  # fmt: skip


def launch(q, granules, lists, out, lse, q_order, scale_log2, tail, only, keys, stages) -> None:
    """Attention over lists of granules; arguments as `op.granule_attention` has checked them.

    Args:
        scale_log2: softmax scale times log2 e.
        tail: whether means stand for granules that are not listed.
        only: int32 [B, H], heads that are 0 are left out; or None.
        keys: keys of a stage, 64 or 128.
        stages: buffers of K and of V. Three of 128 keys leave 2 KB of shared memory at a head dim above 64.
    """
    H, S, D = q.shape[1:]
    programs, C, T = lists.counts.numel(), granules.tokens.shape[1], granules.k_mean.shape[2]
    V = S if q_order is None else q_order.shape[2]
    layout = gl.NVMMASharedLayout(128, 16)
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(x.view(-1, D), [granules.size, 64], layout) for x in (granules.k, granules.v)
    )
    k_means, v_means = (
        TensorDescriptor.from_tensor(x.view(-1, D), [keys, 64], layout)
        for x in ((granules.k_mean, granules.v_mean) if tail else (granules.k, granules.v))
    )
    strides = (0, 0, 0) if q_order is None else q_order.stride()
    # A program a row group: the hardware hands out the next one wherever one ends, which evens out lists of any lengths.
    # Where heads are left out, few programs a head: most have nothing to do, and starting one takes its time.
    heads = lists.counts.shape[0] * H
    grid = programs if only is None else heads * min(lists.counts.shape[2], max(1, target.sm_count(q.device) // heads))
    _hopper_granules_kernel[(grid,)](
        k_desc, v_desc, k_means, v_means, q, out, lse, q_order, granules.tokens, lists.entries, lists.starts, lists.whole,
        lists.counts, lists.chosen, lists.schedule, only, scale_log2, math.log2(granules.size), programs, H, S, V, lists.counts.shape[2], C, T, lists.chosen.shape[3],
        *q.stride()[:3], *out.stride()[:3], *strides,
        D=D, BLOCK_D=64 if D <= 64 else 128, SIZE=granules.size, KEYS=keys, STAGES=stages, HAS_ORDER=q_order is not None,
        HAS_LSE=lse is not None, HAS_TAIL=tail, HAS_ONLY=only is not None, num_warps=4, maxnreg=MAX_REGISTERS,
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
    from ..gluon.ring import place_of
    from ..gluon.tile_walk import tokens_from

    @gluon.jit
    def _produce(
        granules, means, stages, barriers, lists, sizes,
        SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, PANELS: gl.constexpr, HAS_TAIL: gl.constexpr,
    ):  # fmt: skip
        """Fills all stages of keys, or of values: those of a list, then those of its tail.

        A stage is PANELS panels of 64 columns; a granule fills SIZE rows of each.
        """
        ready, empty = barriers
        entries, starts, _, counts, _, schedule = lists
        walk, groups, C, T, _ = sizes
        EACH: gl.constexpr = KEYS // SIZE
        dtype: gl.constexpr = stages.dtype
        boxes = stages._reinterpret(dtype, [STAGES * PANELS * EACH, SIZE, 64], stages.layout)
        panels = stages._reinterpret(dtype, [STAGES * PANELS, KEYS, 64], stages.layout)
        n = 0
        for place in range(walk[0], walk[1], walk[2]):
            t = gl.load(schedule + place)
            bh = t // groups
            count = gl.load(counts + t)
            listed = entries + gl.load(starts + t)
            for i in range(0, count, EACH):
                # The loads come before the wait: a stage that is free is filled at once.
                rows = ()
                for j in gl.static_range(EACH):
                    # Past the end the last granule once more: its scores are masked, its values finite.
                    rows = rows + ((bh * C + gl.load(listed + gl.minimum(i + j, count - 1))) * SIZE,)
                stage, phase = place_of(n, 0, STAGES)
                bar = ready.index(stage)
                mbarrier.wait(empty.index(stage), phase ^ 1)
                mbarrier.expect(bar, KEYS * PANELS * 128)
                for j in gl.static_range(EACH):
                    for panel in gl.static_range(PANELS):
                        box = boxes.index((stage * PANELS + panel) * EACH + j)
                        tma.async_copy_global_to_shared(granules, [rows[j], panel * 64], bar, box)
                n += 1
            if HAS_TAIL:
                for c in range(0, gl.where(count < C, T, 0), KEYS):
                    stage, phase = place_of(n, 0, STAGES)
                    bar = ready.index(stage)
                    mbarrier.wait(empty.index(stage), phase ^ 1)
                    mbarrier.expect(bar, KEYS * PANELS * 128)
                    for panel in gl.static_range(PANELS):
                        box = panels.index(stage * PANELS + panel)
                        tma.async_copy_global_to_shared(means, [bh * T + c, panel * 64], bar, box)
                    n += 1

    @gluon.jit
    def _scores(q, k_stages, barriers, n, KEYS: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr):
        """Starts Q K^T of stage n."""
        stage, phase = place_of(n, 0, STAGES)
        zero = gl.zeros([64, KEYS], gl.float32, s_layout)
        mbarrier.wait(barriers[0].index(stage), phase)
        return warpgroup_mma(q, k_stages.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)

    @gluon.jit
    def _mask(s, first, whole, ends, SIZE: gl.constexpr, KEYS: gl.constexpr, s_layout: gl.constexpr):
        """Scores outside the granules from list entry `first` on become -inf: tokens follow each other but for one gap.

        Whole granules come first and at most two partial ones after them, so a list's tokens are the slots up to ends[0],
        and those of the second partial granule up to ends[1].
        """
        column = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
        # Only the low bits of a column differ between threads: registers for them, constants for the rest.
        slot = first * SIZE + (column & 6)
        inside = (column & 121) < ends[0] - slot
        second = ((column & 121) >= (whole + 1) * SIZE - slot) & ((column & 121) < ends[1] - slot)
        return gl.where((inside | second)[None, :], s, float("-inf"))

    @gluon.jit
    def _bits(lists, c, KIND: gl.constexpr):
        """Which of the 128 granules from c on are listed, in four words; asked for long before `_leave_out` needs them."""
        if KIND == "tail":
            _, _, chosen, words = lists
            word, last = c // 32, words - 1
            bits = (_word(chosen, word, last), _word(chosen, word + 1, last))
            bits = bits + (_word(chosen, word + 2, last), _word(chosen, word + 3, last))
        else:
            bits = (0, 0, 0, 0)
        return bits

    @gluon.jit
    def _leave_out(s, found, KEYS: gl.constexpr, s_layout: gl.constexpr):
        """Scores of means become -inf where the granule is listed, or where there is none."""
        column = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
        bits = gl.where((column & 32) == 0, found[0], found[1])
        if KEYS == 128:
            bits = gl.where((column & 64) == 0, bits, gl.where((column & 32) == 0, found[2], found[3]))
        listed = (bits >> (column & 6)) & (1 << (column & 25))
        return gl.where((listed != 0)[None, :], float("-inf"), s)

    @gluon.jit
    def _word(chosen, word, last):
        return gl.where(word <= last, gl.load(chosen + gl.minimum(word, last)), -1)

    @gluon.jit
    def _softmax(s, m_i, l_i, scale_log2, bias):
        """Of s * scale_log2 + bias."""
        m_new = gl.maximum(
            m_i, gl.max(s, 1) * scale_log2 + bias
        )  # m_i is finite from the start: no difference of infinities
        alpha = gl.exp2(m_i - m_new)
        p = gl.exp2(s * scale_log2 - (m_new - bias)[:, None])
        return p, alpha, m_new, l_i * alpha + gl.sum(p, 1)

    @gluon.jit
    def _hide(s, i, lists, bits, KIND: gl.constexpr, SIZE: gl.constexpr, KEYS: gl.constexpr, s_layout: gl.constexpr):
        """Scores that do not count become -inf: i is the first list entry of the stage, or the first mean."""
        whole, ends, _, _ = lists
        if KIND == "partial":
            s = _mask(s, i, whole, ends, SIZE, KEYS, s_layout)
        elif KIND == "tail":
            s = _leave_out(s, bits, KEYS, s_layout)
        return s

    @gluon.jit
    def _step(
        q, p, acc, m_i, l_i, i, lists, n, k_stages, v_stages, barriers, scale_log2, log_size,
        KIND: gl.constexpr, SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr,
        p_layout: gl.constexpr,
    ):  # fmt: skip
        """Q K^T and softmax of stage n under P V of stage n - 1"""
        _, k_empty, v_ready, v_empty = barriers
        before, phase = place_of(n - 1, 0, STAGES)
        bits = _bits(lists, i, KIND)
        s = _scores(q, k_stages, barriers, n, KEYS, STAGES, s_layout)
        mbarrier.wait(v_ready.index(before), phase)
        acc = warpgroup_mma(unpacked(p, v_stages.dtype, p_layout), v_stages.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(place_of(n, 0, STAGES)[0]), count=1)
        s = _hide(s, i, lists, bits, KIND, SIZE, KEYS, s_layout)
        p_new, alpha, m_i, l_i = _softmax(s, m_i, l_i, scale_log2, log_size if KIND == "tail" else 0.0)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
        return packed(p_new, v_stages.dtype), acc, m_i, l_i

    @gluon.jit
    def _attend(
        q, count, means, lists, n, k_stages, v_stages, barriers, scale_log2, log_size,
        BLOCK_D: gl.constexpr, SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HAS_TAIL: gl.constexpr,
        s_layout: gl.constexpr, o_layout: gl.constexpr, p_layout: gl.constexpr,
    ):  # fmt: skip
        """All stages of one row group: the sums, the maxima, and how many stages have been used so far."""
        k_empty, v_ready, v_empty = barriers[1], barriers[2], barriers[3]
        EACH: gl.constexpr = KEYS // SIZE
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
        l_i = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
        if count + means > 0:
            # Before the first stage there is no P V.
            s = _scores(q, k_stages, barriers, n, KEYS, STAGES, s_layout)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(place_of(n, 0, STAGES)[0]), count=1)
            if HAS_TAIL:
                if count > 0:
                    s = _hide(s, 0, lists, (0, 0, 0, 0), "partial", SIZE, KEYS, s_layout)
                else:
                    s = _hide(s, 0, lists, _bits(lists, 0, "tail"), "tail", SIZE, KEYS, s_layout)
                bias = gl.where(count > 0, 0.0, log_size)
            else:
                s = _hide(s, 0, lists, (0, 0, 0, 0), "partial", SIZE, KEYS, s_layout)
                bias = 0.0
            p_new, _, m_i, l_i = _softmax(s, m_i, l_i, scale_log2, bias)
            p = packed(p_new, v_stages.dtype)
            n += 1
            whole = lists[0] // EACH * EACH
            for i in range(EACH, whole, EACH):
                p, acc, m_i, l_i = _step(
                    q, p, acc, m_i, l_i, i, lists, n, k_stages, v_stages, barriers, scale_log2, log_size,
                    "whole", SIZE, KEYS, STAGES, s_layout, p_layout,
                )  # fmt: skip
                n += 1
            for i in range(gl.maximum(whole, EACH), count, EACH):
                p, acc, m_i, l_i = _step(
                    q, p, acc, m_i, l_i, i, lists, n, k_stages, v_stages, barriers, scale_log2, log_size,
                    "partial", SIZE, KEYS, STAGES, s_layout, p_layout,
                )  # fmt: skip
                n += 1
            if HAS_TAIL:
                # Where nothing is listed, the first stage was the tail's.
                for c in range(gl.where(count > 0, 0, KEYS), means, KEYS):
                    p, acc, m_i, l_i = _step(
                        q, p, acc, m_i, l_i, c, lists, n, k_stages, v_stages, barriers, scale_log2, log_size,
                        "tail", SIZE, KEYS, STAGES, s_layout, p_layout,
                    )  # fmt: skip
                    n += 1
            last, phase = place_of(n - 1, 0, STAGES)
            mbarrier.wait(v_ready.index(last), phase)
            acc = warpgroup_mma(unpacked(p, v_stages.dtype, p_layout), v_stages.index(last), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(last), count=1)
        return acc, m_i, l_i, n

    @gluon.jit
    def _list_of(t, bh, lists, tokens, sizes, H, SIZE: gl.constexpr):
        """How many granules row group t lists, and what `_hide` needs to know of them."""
        entries, starts, whole, counts, chosen, _ = lists
        _, _, C, _, words = sizes
        count, full = gl.load(counts + t), gl.load(whole + t)
        listed = entries + gl.load(starts + t)
        tokens += bh // H * C
        first, second = 0, 0  # tokens of the partial granules
        if count > full:
            first = gl.load(tokens + gl.load(listed + full))
        if count > full + 1:
            second = gl.load(tokens + gl.load(listed + full + 1))
        ends = (full * SIZE + first, (full + 1) * SIZE + second)
        return count, (full, ends, chosen + t.to(gl.int64) * words, words)

    @gluon.jit
    def _consume(
        HALF: gl.constexpr, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2, log_size,
        D: gl.constexpr, BLOCK_D: gl.constexpr, SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
        HAS_ORDER: gl.constexpr, HAS_LSE: gl.constexpr, HAS_TAIL: gl.constexpr,
    ):  # fmt: skip
        q, q_order, out, lse, tokens = tensors
        q_stages, k_stages, v_stages = stages
        walk, groups, C, T, _ = sizes
        H, S, V = shape
        sqb, sqh, sqs, sob, soh, sos, spb, sph, sps = strides
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
        p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
        across: gl.constexpr = BLOCK_D // 8
        rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])
        q_shared = q_stages.index(HALF)
        offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows_layout))
        n = 0
        for place in range(walk[0], walk[1], walk[2]):
            t = gl.load(lists[5] + place)
            bh, first = t // groups, t % groups * 128
            b, h = (bh // H).to(gl.int64), (bh % H).to(gl.int64)
            order = q_order + b * spb + h * sph if HAS_ORDER else q_order
            token, inside = tokens_from(first + HALF * 64, V, order, sps, HAS_ORDER, gl.SliceLayout(1, rows_layout))
            mask = inside[:, None] & (offs_d < D)[None, :]
            q_ptr = q + b * sqb + h * sqh + token[:, None] * sqs + offs_d[None, :]
            q_shared.store(gl.load(q_ptr, mask=mask, other=0.0))
            fence_async_shared()
            count, listed = _list_of(t, bh, lists, tokens, sizes, H, SIZE)
            acc, m_i, l_i, n = _attend(
                q_shared, count, gl.where(count < C, T, 0) if HAS_TAIL else 0, listed, n, k_stages, v_stages, barriers,
                scale_log2, log_size, BLOCK_D, SIZE, KEYS, STAGES, HAS_TAIL, s_layout, o_layout, p_layout,
            )  # fmt: skip
            divisor = gl.where(l_i == 0, 1.0, l_i)  # a row with nothing to attend to gives zeros
            acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, o_layout))[:, None]
            q_shared.store(acc.to(out.dtype.element_ty))  # through shared memory: whole rows to global memory
            # Once more: no registers for it over the loops.
            inside = tokens_from(first + HALF * 64, V, order, sps, False, gl.SliceLayout(1, rows_layout))[1]
            mask = inside[:, None] & (offs_d < D)[None, :]
            out_ptr = out + b * sob + h * soh + token[:, None] * sos + offs_d[None, :]
            gl.store(out_ptr, q_shared.load(rows_layout), mask=mask)
            if HAS_LSE:
                natural = (m_i + gl.log2(divisor)) * LN_2
                natural = gl.where(l_i == 0, float("-inf"), natural)
                natural = gl.convert_layout(natural, gl.SliceLayout(1, rows_layout))
                gl.store(lse + (b * H + h) * S + token, natural, mask=inside)

    @gluon.jit(do_not_specialize=["programs", "S", "V", "groups", "C", "T", "words"])
    def _hopper_granules_kernel(
        k_desc, v_desc, k_means, v_means, q, out, lse, q_order, tokens, entries, starts, whole, counts, chosen, schedule, only,
        scale_log2, log_size, programs, H, S: gl.int64, V, groups, C, T, words,
        sqb: gl.int64, sqh: gl.int64, sqs: gl.int64, sob: gl.int64, soh: gl.int64, sos: gl.int64,
        spb: gl.int64, sph: gl.int64, sps: gl.int64,
        D: gl.constexpr, BLOCK_D: gl.constexpr, SIZE: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
        HAS_ORDER: gl.constexpr, HAS_LSE: gl.constexpr, HAS_TAIL: gl.constexpr, HAS_ONLY: gl.constexpr,
        num_warps: gl.constexpr,
    ):  # fmt: skip
        if HAS_ONLY:  # each head has as many programs, which find nothing to do where it is left out
            heads = programs // groups
            each = gl.num_programs(0) // heads
            head = gl.program_id(0) // each
            end = gl.where(gl.load(only + head) == 0, 0, (head + 1) * groups)
            walk = (head * groups + gl.program_id(0) % each, end, each)
        else:
            walk = (gl.program_id(0), programs, gl.num_programs(0))
        dtype: gl.constexpr = q.dtype.element_ty
        PANELS: gl.constexpr = BLOCK_D // 64
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
        q_stages = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], layout)
        k_stages = gl.allocate_shared_memory(dtype, [STAGES, KEYS, BLOCK_D], layout)
        v_stages = gl.allocate_shared_memory(dtype, [STAGES, KEYS, BLOCK_D], layout)
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(i), count=1)
            mbarrier.init(v_ready.index(i), count=1)
            mbarrier.init(k_empty.index(i), count=2)
            mbarrier.init(v_empty.index(i), count=2)
        barriers = (k_ready, k_empty, v_ready, v_empty)
        stages = (q_stages, k_stages, v_stages)
        tensors = (q, q_order, out, lse, tokens)
        lists = (entries, starts, whole, counts, chosen, schedule)
        sizes = (walk, groups, C, T, words)
        shape = (H, S, V)
        strides = (sqb, sqh, sqs, sob, soh, sos, spb, sph, sps)
        gl.warp_specialize(
            [
                (_consume, (0, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2, log_size,
                            D, BLOCK_D, SIZE, KEYS, STAGES, HAS_ORDER, HAS_LSE, HAS_TAIL)),
                (_consume, (1, tensors, stages, barriers, lists, sizes, shape, strides, scale_log2, log_size,
                            D, BLOCK_D, SIZE, KEYS, STAGES, HAS_ORDER, HAS_LSE, HAS_TAIL)),
                (_produce, (k_desc, k_means, k_stages, (k_ready, k_empty), lists, sizes,
                            SIZE, KEYS, STAGES, PANELS, HAS_TAIL)),
                (_produce, (v_desc, v_means, v_stages, (v_ready, v_empty), lists, sizes,
                            SIZE, KEYS, STAGES, PANELS, HAS_TAIL)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip
