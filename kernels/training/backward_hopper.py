"""backward.py's two kernels for Hopper, products="bf16": one producer warp and warpgroups that compute (Gluon).

The producer fetches tiles of 64 tokens through the tensor memory accelerator as fast as stages come free. A warpgroup owns 64
queries (of dQ) or 64 keys (of dK and dV) and computes scores so that these are its rows: P and dS enter their products from
the registers that held the scores. While one warpgroup computes exponentials, the tensor cores work for the other.

Source: the tiles are FlashAttention-3's (arXiv 2407.08608, section 3), but for dQ, which has a kernel of its own: no atomics.
"""

import torch

from ..common import target
from ..common.numbers import INT_AS_FLOAT, INT_AS_FLOAT_BITS, LN_2
from ..gluon import LOADABLE
from . import forward_hopper as training_hopper
from .forward_hopper import Launch

STEP = 64  # queries, or keys, of a stage
# Of dQ, and of dK and dV, whose sums leave no registers for a third warpgroup.
TWO, THREE, KEYS = Launch(2, 4, False, 168, 240), Launch(3, 2, False, 128, 160), Launch(2, 4, False, 168, 240)
QUERIES = THREE


def query_gradient(dq, kept, packed, rows, columns, is_causal, sm_scale, launch: Launch | None = None) -> None:
    """Writes dq; arguments as in `backward.query_gradient`."""
    launch = launch or QUERIES
    H, T, block_d = kept.queries.shape
    owner = training_hopper.programs(rows, launch.rows)
    with target.on_device(dq):
        _hopper_query_gradient_kernel[(len(owner), H)](
            _tiles(kept.queries), _tiles(packed.values), _tiles(kept.keys), _tiles(kept.values), _tiles(kept.keys.bfloat16()),
            _numbers(kept.k_scale), kept.q_scale, packed.scale, kept.lse, packed.delta, owner, rows.table, columns.table,
            dq, sm_scale, H // kept.keys.shape[0], T, columns.tokens, *dq.stride()[:3],
            D=dq.shape[3], BLOCK_D=block_d, CAUSAL=is_causal, CONSUMERS=launch.consumers, STAGES=launch.stages,
            REGISTERS=launch.of_a_consumer, num_warps=4, maxnreg=launch.at_first,
        )  # fmt: skip


def key_gradients(dk, dv, kept, packed, rows, columns, is_causal) -> None:
    """Writes dk and dv; arguments as in `backward.key_gradients`."""
    H, T, block_d = kept.queries.shape
    kv_heads = kept.keys.shape[0]
    with target.on_device(dk):
        _hopper_key_gradient_kernel[(columns.tokens // 128, kv_heads)](
            _tiles(kept.keys), _tiles(kept.values), _tiles(kept.queries), _tiles(packed.values), _tiles(packed.queries),
            _numbers(kept.q_scale), _numbers(packed.lse), _numbers(packed.delta), kept.k_scale, columns.owner, columns.table,
            rows.table, dk, dv, H // kv_heads, T, columns.tokens, *dk.stride()[:3],
            D=dk.shape[3], BLOCK_D=block_d, CAUSAL=is_causal, STAGES=KEYS.stages, REGISTERS=KEYS.of_a_consumer,
            num_warps=4, maxnreg=KEYS.at_first,
        )  # fmt: skip


def _tiles(x: torch.Tensor):
    """Descriptor of 64 packed tokens, [H, T, Dp]."""
    layout = gl.NVMMASharedLayout(min(128, x.shape[2] * x.element_size()), 8 * x.element_size())
    return TensorDescriptor.from_tensor(x.flatten(0, 1), [STEP, x.shape[2]], layout)


def _numbers(x: torch.Tensor):
    """Descriptor of one number a token of 64 tokens, fp32 [H, T]."""
    return TensorDescriptor.from_tensor(x.flatten(), [STEP], gl.NVMMASharedLayout(0, 32, 1))


if LOADABLE:
    own_sums, query_place, seen_keys = training_hopper.own_sums, training_hopper.query_place, training_hopper.seen_keys
    from ..gluon import TensorDescriptor, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from ..gluon.ring import acquire, await_stage, new_ring, release

    @gluon.jit
    def _barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
        """That the first tiles are there, and of each stage that it is full, or empty."""
        first_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(first_ready, count=1)
        ready, empty = new_ring(STAGES, CONSUMERS)
        return first_ready, ready, empty

    @gluon.jit
    def _fetch_first(descriptors, row, first_ready, boxes, CONSUMERS: gl.constexpr, BLOCK_D: gl.constexpr):
        """This program's own tokens, 64 a consumer, in INT8 and in bf16."""
        mbarrier.expect(first_ready, 64 * CONSUMERS * BLOCK_D * 3)
        for part in gl.static_range(CONSUMERS):
            for j in gl.static_range(2):
                tma.async_copy_global_to_shared(descriptors[j], [row + part * 64, 0], first_ready, boxes[j].index(part))

    @gluon.jit
    def _fetch(descriptors, row, i, barriers, boxes, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
        """Stage i: 64 tokens in INT8 and twice in bf16, then their numbers."""
        _, ready, empty = barriers
        stage = i % STAGES
        acquire(empty, i, STAGES)
        bar = ready.index(stage)
        mbarrier.expect(bar, 64 * BLOCK_D * 5 + (len(boxes) - 3) * 64 * 4)
        for j in gl.static_range(3):
            tma.async_copy_global_to_shared(descriptors[j], [row, 0], bar, boxes[j].index(stage))
        for j in gl.static_range(3, len(boxes)):
            tma.async_copy_global_to_shared(descriptors[j], [row], bar, boxes[j].index(stage))

    @gluon.jit
    def _whole_scores(a, b, s_layout: gl.constexpr):
        """Starts an INT8 product from the bits of 1.5 * 2^23: an integer below 2^22 added to these bits is added to the number."""
        start = gl.full([64, 64], INT_AS_FLOAT_BITS, gl.int32, s_layout)
        return warpgroup_mma(a, b.permute((1, 0)), start, is_async=True)

    @gluon.jit
    def _wide(a, b, dp_layout: gl.constexpr):
        """Starts dP or its transpose."""
        zero = gl.zeros([64, 64], gl.float32, dp_layout)
        return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)

    @gluon.jit
    def _times(s, row_scale):
        """Scores of `_whole_scores`, times a number a row: no conversion, of which a GPU does few."""
        return gl.fma(s.to(gl.float32, bitcast=True), row_scale[:, None], (row_scale * -INT_AS_FLOAT)[:, None])

    @gluon.jit
    def _store(
        goal, acc, table, n, position, h, strides, D: gl.constexpr, BLOCK_D: gl.constexpr, o_layout: gl.constexpr
    ):
        """Rows of a sum to [B, H, S, D], those that are tokens."""
        batch, first = gl.load(table + n * 4).to(gl.int64), gl.load(table + n * 4 + 1).to(gl.int64)
        column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_layout))
        goal += batch * strides[0] + h.to(gl.int64) * strides[1]
        goal += (first + position)[:, None] * strides[2] + column[None, :]
        mask = (position < gl.load(table + n * 4 + 2))[:, None] & (column < D)[None, :]
        gl.store(goal, acc.to(goal.dtype.element_ty), mask=mask)

    @gluon.jit
    def _fetch_keys(
        descriptors, first_boxes, boxes, barriers, tables, HEADS_PER_KEY, T, Tk, BLOCK_D: gl.constexpr,
        CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """Producer of dQ: this program's queries, then the tiles of keys."""
        programs, rows, columns = tables
        n, first, _, start, stop = query_place(programs, rows, columns, 64 * CONSUMERS, CAUSAL)
        h = gl.program_id(1)
        if n >= 0:
            _fetch_first(descriptors[:2], h * T + first, barriers[0], first_boxes, CONSUMERS, BLOCK_D)
            row = h // HEADS_PER_KEY * Tk + start
            for i in range(gl.cdiv(stop, 64)):
                _fetch(descriptors[2:], row + i * 64, i, barriers, boxes, BLOCK_D, STAGES)

    @gluon.jit
    def _query_step(
        q, grad, vectors, boxes, scratch, barriers, i, keys, position, acc, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
        STAGES: gl.constexpr, s_layout: gl.constexpr, dp_layout: gl.constexpr, ds_layout: gl.constexpr,
    ):  # fmt: skip
        """dQ after stage i, the sequence's keys from 64 i on."""
        k_boxes, v_boxes, k16_boxes, scale_boxes = boxes
        _, ready, empty = barriers
        row_scale, lse, delta = vectors
        stage = i % STAGES
        await_stage(ready, i, STAGES)
        s = _whole_scores(q, k_boxes.index(stage), s_layout)
        dp = _wide(grad, v_boxes.index(stage), dp_layout)
        scale = scale_boxes.index(stage).load(gl.SliceLayout(0, s_layout))[None, :]
        s = warpgroup_mma_wait(1, deps=[s])
        x = _times(s, row_scale) * scale - lse[:, None]
        p = gl.exp2(x)
        if MASKED:  # not x: what is to be hidden would be known, and kept, long before
            p = gl.where(seen_keys(i * 64, 64, keys, position, CAUSAL, s_layout), p, 0.0)
        # Nobody reads this: a store that needs all of P keeps the wait, which ptxas would move up, behind the exponentials.
        scratch.store(own_sums(p))
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = p * (gl.convert_layout(dp, s_layout) - delta[:, None] * scale)
        ds = gl.convert_layout(ds.to(gl.bfloat16), ds_layout)
        acc = warpgroup_mma(ds, k16_boxes.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(empty, i, STAGES)
        return acc

    @gluon.jit
    def _sum_over_keys(
        PART: gl.constexpr, vectors, dq, first_boxes, boxes, scratches, barriers, tables, strides, sm_scale, T, D: gl.constexpr,
        BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """dQ of 64 queries."""
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
        dp_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
        ds_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
        q_scale, g_scale, lse, delta = vectors
        programs, rows, columns = tables
        n, first, place, _, stop = query_place(programs, rows, columns, 64 * CONSUMERS, CAUSAL)
        h = gl.program_id(1)
        if n >= 0:
            place += PART * 64
            count = gl.load(rows + n * 4 + 2)
            local = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
            offs, inside = h.to(gl.int64) * T + first + PART * 64 + local, place + local < count
            # No query beyond the sequence has a scale, or a P.
            own = (
                gl.load(q_scale + offs, mask=inside, other=0.0), gl.load(lse + offs, mask=inside, other=float("inf")),
                gl.load(delta + offs, mask=inside, other=0.0),
            )  # fmt: skip
            keys = gl.load(columns + n * 4 + 2)
            mbarrier.wait(barriers[0], 0)
            q, grad = first_boxes[0].index(PART), first_boxes[1].index(PART)
            if CONSUMERS == 2:  # registers are there: fewer reads of shared memory
                q = q.load(gl.DotOperandLayout(0, s_layout, 4))
                grad = grad.load(gl.DotOperandLayout(0, dp_layout, 2))
            acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            full = gl.minimum(place + 1, keys) // 64 if CAUSAL else keys // 64
            for i in range(full):
                acc = _query_step(
                    q, grad, own, boxes, scratches.index(PART), barriers, i, keys, place + local, acc, False, CAUSAL, STAGES,
                    s_layout, dp_layout, ds_layout,
                )  # fmt: skip
            for i in range(full, gl.cdiv(stop, 64)):
                acc = _query_step(
                    q, grad, own, boxes, scratches.index(PART), barriers, i, keys, place + local, acc, True, CAUSAL, STAGES,
                    s_layout, dp_layout, ds_layout,
                )  # fmt: skip
            # Once more: none of it keeps a register over the loop.
            n, first, place, _, _ = query_place(programs, rows, columns, 64 * CONSUMERS, CAUSAL)
            place, count = place + PART * 64, gl.load(rows + n * 4 + 2)
            local = gl.arange(0, 64, gl.SliceLayout(1, o_layout))
            offs = h.to(gl.int64) * T + first + PART * 64 + local
            acc = acc * (sm_scale * gl.load(g_scale + offs, mask=place + local < count, other=0.0))[:, None]
            _store(dq, acc, rows, n, place + local, h, strides, D, BLOCK_D, o_layout)

    @gluon.jit(do_not_specialize=["T", "Tk"])
    def _hopper_query_gradient_kernel(
        q_desc, g_desc, k_desc, v_desc, k16_desc, scale_desc, q_scale, g_scale, lse, delta, programs, rows, columns, dq,
        sm_scale, HEADS_PER_KEY, T, Tk, stride_b, stride_h, stride_s,
        D: gl.constexpr, BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
        REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        q_boxes = gl.allocate_shared_memory(gl.int8, [CONSUMERS, 64, BLOCK_D], q_desc.layout)
        g_boxes = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, BLOCK_D], g_desc.layout)
        k_boxes = gl.allocate_shared_memory(gl.int8, [STAGES, 64, BLOCK_D], k_desc.layout)
        v_boxes = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BLOCK_D], v_desc.layout)
        k16_boxes = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BLOCK_D], k16_desc.layout)
        scale_boxes = gl.allocate_shared_memory(gl.float32, [STAGES, 64], scale_desc.layout)
        scratches = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 64, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        barriers = _barriers(STAGES, CONSUMERS)
        first_boxes, boxes = (q_boxes, g_boxes), (k_boxes, v_boxes, k16_boxes, scale_boxes)
        tables, vectors = (programs, rows, columns), (q_scale, g_scale, lse, delta)
        strides, descriptors = (stride_b, stride_h, stride_s), (q_desc, g_desc, k_desc, v_desc, k16_desc, scale_desc)
        if CONSUMERS == 2:
            gl.warp_specialize(
                [
                    (_sum_over_keys, (0, vectors, dq, first_boxes, boxes, scratches, barriers, tables, strides, sm_scale, T, D,
                                      BLOCK_D, CAUSAL, CONSUMERS, STAGES)),
                    (_sum_over_keys, (1, vectors, dq, first_boxes, boxes, scratches, barriers, tables, strides, sm_scale, T, D,
                                      BLOCK_D, CAUSAL, CONSUMERS, STAGES)),
                    (_fetch_keys, (descriptors, first_boxes, boxes, barriers, tables, HEADS_PER_KEY, T, Tk, BLOCK_D, CAUSAL,
                                   CONSUMERS, STAGES)),
                ],
                [4, 1],
                [REGISTERS, 24],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_sum_over_keys, (0, vectors, dq, first_boxes, boxes, scratches, barriers, tables, strides, sm_scale, T, D,
                                      BLOCK_D, CAUSAL, CONSUMERS, STAGES)),
                    (_sum_over_keys, (1, vectors, dq, first_boxes, boxes, scratches, barriers, tables, strides, sm_scale, T, D,
                                      BLOCK_D, CAUSAL, CONSUMERS, STAGES)),
                    (_sum_over_keys, (2, vectors, dq, first_boxes, boxes, scratches, barriers, tables, strides, sm_scale, T, D,
                                      BLOCK_D, CAUSAL, CONSUMERS, STAGES)),
                    (_fetch_keys, (descriptors, first_boxes, boxes, barriers, tables, HEADS_PER_KEY, T, Tk, BLOCK_D, CAUSAL,
                                   CONSUMERS, STAGES)),
                ],
                [4, 4, 1],
                [REGISTERS, REGISTERS, 24],
            )  # fmt: skip

    @gluon.jit
    def _fetch_queries(
        descriptors, first_boxes, boxes, barriers, tables, HEADS_PER_KEY, T, Tk, BLOCK_D: gl.constexpr,
        CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """Producer of dK and dV: this program's keys, then the tiles of queries of every head that shares them."""
        owner, columns, rows = tables
        kv, column = gl.program_id(1), gl.program_id(0) * 128
        n = gl.load(owner + gl.program_id(0))
        if n >= 0:
            _fetch_first(descriptors[:2], kv * Tk + column, barriers[0], first_boxes, 2, BLOCK_D)
            queries, start = gl.load(rows + n * 4 + 2), gl.load(rows + n * 4 + 3)
            begin = (column - gl.load(columns + n * 4 + 3)) // 64 if CAUSAL else 0
            i = 0
            for g in range(HEADS_PER_KEY):
                row = (kv * HEADS_PER_KEY + g) * T + start
                for t in range(begin, gl.cdiv(queries, 64)):
                    _fetch(descriptors[2:], row + t * 64, i, barriers, boxes, BLOCK_D, STAGES)
                    i += 1

    @gluon.jit
    def _key_step(
        k, v, scale, boxes, barriers, i, first, position, acc_k, acc_v, MASKED: gl.constexpr, STAGES: gl.constexpr,
        s_layout: gl.constexpr, dp_layout: gl.constexpr, p_layout: gl.constexpr,
    ):  # fmt: skip
        """dK and dV after stage i, the sequence's queries from `first` on."""
        q_boxes, g_boxes, q16_boxes, scale_boxes, lse_boxes, delta_boxes = boxes
        _, ready, empty = barriers
        stage = i % STAGES
        across: gl.constexpr = gl.SliceLayout(0, s_layout)
        await_stage(ready, i, STAGES)
        s = _whole_scores(k, q_boxes.index(stage), s_layout)
        dp = _wide(v, g_boxes.index(stage), dp_layout)
        s = warpgroup_mma_wait(1, deps=[s])
        x = (
            _times(s, scale) * scale_boxes.index(stage).load(across)[None, :]
            - lse_boxes.index(stage).load(across)[None, :]
        )
        if MASKED:
            query = gl.arange(0, 64, across)  # low bits and the rest as in `seen_keys`
            seen = (query & -7)[None, :] >= (position - first)[:, None] - (query & 6)[None, :]
            x = gl.where(seen, x, float("-inf"))
        p = gl.exp2(x)  # zero in padding, whose lse is infinity
        p16 = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        acc_v = warpgroup_mma(p16, g_boxes.index(stage), acc_v, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        delta = delta_boxes.index(stage).load(across)[None, :]
        ds = p * (gl.convert_layout(dp, s_layout) - scale[:, None] * delta)
        ds = gl.convert_layout(ds.to(gl.bfloat16), p_layout)
        acc_k = warpgroup_mma(ds, q16_boxes.index(stage), acc_k, is_async=True)
        acc_v, acc_k = warpgroup_mma_wait(0, deps=[acc_v, acc_k])
        release(empty, i, STAGES)
        return acc_k, acc_v

    @gluon.jit
    def _sum_over_queries(
        PART: gl.constexpr, k_scale, dk, dv, first_boxes, boxes, barriers, tables, strides, HEADS_PER_KEY, Tk,
        D: gl.constexpr, BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """dK and dV of 64 keys."""
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
        dp_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
        p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
        owner, columns, rows = tables
        kv, column = gl.program_id(1), gl.program_id(0) * 128
        n = gl.load(owner + gl.program_id(0))
        if n >= 0:
            place = column - gl.load(columns + n * 4 + 3)
            local = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
            scale = gl.load(k_scale + kv.to(gl.int64) * Tk + column + local)
            mbarrier.wait(barriers[0], 0)
            k, v = first_boxes[0].index(PART), first_boxes[1].index(PART)
            acc_k = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            acc_v = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            # Causal: earlier queries see none of these keys, later ones all.
            begin = place // 64 if CAUSAL else 0
            tiles = gl.cdiv(gl.load(rows + n * 4 + 2), 64)
            full = gl.minimum(begin + 2, gl.maximum(tiles, begin)) if CAUSAL else 0
            i = 0
            for g in range(HEADS_PER_KEY):
                if CAUSAL:
                    for t in range(begin, full):
                        acc_k, acc_v = _key_step(
                            k, v, scale, boxes, barriers, i, t * 64, place + local, acc_k, acc_v, True, STAGES,
                            s_layout, dp_layout, p_layout,
                        )  # fmt: skip
                        i += 1
                for t in range(full, tiles):
                    acc_k, acc_v = _key_step(
                        k, v, scale, boxes, barriers, i, t * 64, place + local, acc_k, acc_v, False, STAGES,
                        s_layout, dp_layout, p_layout,
                    )  # fmt: skip
                    i += 1
            n = gl.load(owner + gl.program_id(0))  # once more: it keeps no register over the loop
            place = column - gl.load(columns + n * 4 + 3)
            local = PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, o_layout))
            scale = gl.load(k_scale + kv.to(gl.int64) * Tk + column + local)
            acc_k = acc_k * (LN_2 / scale)[:, None]
            _store(dk, acc_k, columns, n, place + local, kv, strides, D, BLOCK_D, o_layout)
            _store(dv, acc_v, columns, n, place + local, kv, strides, D, BLOCK_D, o_layout)

    @gluon.jit(do_not_specialize=["T", "Tk"])
    def _hopper_key_gradient_kernel(
        k_desc, v_desc, q_desc, g_desc, q16_desc, scale_desc, lse_desc, delta_desc, k_scale, owner, columns, rows, dk, dv,
        HEADS_PER_KEY, T, Tk, stride_b, stride_h, stride_s,
        D: gl.constexpr, BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
        REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        k_boxes = gl.allocate_shared_memory(gl.int8, [2, 64, BLOCK_D], k_desc.layout)
        v_boxes = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BLOCK_D], v_desc.layout)
        q_boxes = gl.allocate_shared_memory(gl.int8, [STAGES, 64, BLOCK_D], q_desc.layout)
        g_boxes = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BLOCK_D], g_desc.layout)
        q16_boxes = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, BLOCK_D], q16_desc.layout)
        scale_boxes = gl.allocate_shared_memory(gl.float32, [STAGES, 64], scale_desc.layout)
        lse_boxes = gl.allocate_shared_memory(gl.float32, [STAGES, 64], lse_desc.layout)
        delta_boxes = gl.allocate_shared_memory(gl.float32, [STAGES, 64], delta_desc.layout)
        barriers = _barriers(STAGES, 2)
        first_boxes = (k_boxes, v_boxes)
        boxes = (q_boxes, g_boxes, q16_boxes, scale_boxes, lse_boxes, delta_boxes)
        tables, strides = (owner, columns, rows), (stride_b, stride_h, stride_s)
        descriptors = (k_desc, v_desc, q_desc, g_desc, q16_desc, scale_desc, lse_desc, delta_desc)
        gl.warp_specialize(
            [
                (_sum_over_queries, (0, k_scale, dk, dv, first_boxes, boxes, barriers, tables, strides, HEADS_PER_KEY, Tk, D,
                                     BLOCK_D, CAUSAL, STAGES)),
                (_sum_over_queries, (1, k_scale, dk, dv, first_boxes, boxes, barriers, tables, strides, HEADS_PER_KEY, Tk, D,
                                     BLOCK_D, CAUSAL, STAGES)),
                (_fetch_queries, (descriptors, first_boxes, boxes, barriers, tables, HEADS_PER_KEY, T, Tk, BLOCK_D, CAUSAL,
                                  STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
