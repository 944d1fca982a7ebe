"""forward.py's forward for Hopper: one producer warp and warpgroups that compute (Gluon). P V is in bf16.

A warpgroup owns 64 queries. While one computes the softmax of a tile of 128 keys, the tensor cores work for the others. In
INT8, P V would cost more instructions (scales of P, a sum in fp32) than it would save products, so V stays in 16 bits, which
is more accurate too.

Source: FlashAttention-3 (arXiv 2407.08608, section 3).
"""

from dataclasses import dataclass

import torch

from ..common import target
from ..common.numbers import INT_AS_FLOAT, INT_AS_FLOAT_BITS
from ..gluon import LOADABLE


@dataclass(frozen=True)
class Launch:
    """How a kernel is split.

    Args:
        consumers: warpgroups of 64 rows, 2 or 3.
        stages: tiles that the producer may be ahead.
        overlap: whether a warpgroup starts Q K^T of a tile under P V of the one before (forward only).
        at_first: registers a thread before the roles differ.
        of_a_consumer: registers a thread of those that compute.
    """

    consumers: int
    stages: int
    overlap: bool
    at_first: int
    of_a_consumer: int

    @property
    def rows(self) -> int:
        """Rows of a program."""
        return 64 * self.consumers


# Registers: 65536 for all warps, in the end of the consumers and of a producer of one warp.
TWO, THREE = Launch(2, 3, True, 168, 240), Launch(3, 4, False, 128, 160)
LAUNCH = TWO


def supports(device: torch.device) -> bool:
    """Whether this kernel is the forward on a device: Hopper."""
    return LOADABLE and target.arch(device) == 90


def programs(layout, rows: int) -> torch.Tensor:
    """What each program owns, so many rows of one sequence: int32 [P, 2], the sequence (-1: none) and its first row there.

    Args:
        layout: `sequences.Sequences`.
        rows: of a program.
    """
    padded = (layout.table[:, 2] + 127) // 128 * 128
    count = (padded + (rows - 1)) // rows
    ends = count.cumsum(0)
    program = torch.arange(layout.tokens // rows + len(count), device=count.device)
    n = torch.searchsorted(ends, program, right=True)
    first = (program - (ends - count)[n.clamp(max=len(count) - 1)]) * rows
    return torch.stack([torch.where(n < len(count), n, -1), first], 1).int()


def attend(
    queries, q_scale, packed, rows, columns, q, is_causal, launch: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; arguments as in `forward.attend_packed`."""
    launch = launch or LAUNCH
    H, T, block_d = queries.shape
    out, lse = torch.empty_like(q), torch.empty_like(q_scale)
    kv_heads, owner = packed.keys.shape[0], programs(rows, launch.rows)
    with target.on_device(q):
        _hopper_training_kernel[(len(owner), H)](
            _tiles(queries, 64), _tiles(packed.keys, 128), _tiles(packed.wide, 128),
            TensorDescriptor.from_tensor(packed.scale.flatten(), [128], gl.NVMMASharedLayout(0, 32, 1)),
            q_scale, packed.offset, owner, rows.table, columns.table, out, lse,
            H // kv_heads, kv_heads, T, columns.tokens, *out.stride()[:3],
            D=q.shape[3], BLOCK_D=block_d, CAUSAL=is_causal, CONSUMERS=launch.consumers, STAGES=launch.stages,
            OVERLAP=launch.overlap, REGISTERS=launch.of_a_consumer, num_warps=4, maxnreg=launch.at_first,
        )  # fmt: skip
    return out, lse


def _tiles(x: torch.Tensor, tokens: int):
    """Descriptor of so many packed tokens, [H, T, Dp]."""
    layout = gl.NVMMASharedLayout(min(128, x.shape[2] * x.element_size()), 8 * x.element_size())
    return TensorDescriptor.from_tensor(x.flatten(0, 1), [tokens, x.shape[2]], layout)


if LOADABLE:
    from ..gluon import TensorDescriptor, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from ..gluon.ring import acquire, await_stage, new_ring, release

    @gluon.jit
    def query_place(programs, rows, columns, ROWS: gl.constexpr, CAUSAL: gl.constexpr):
        """This program's sequence, where its rows begin, packed and in the sequence, and where the keys begin and end."""
        # The longest rows first, so that the last programs are short.
        program = gl.num_programs(0) - 1 - gl.program_id(0) if CAUSAL else gl.program_id(0)
        n, place = gl.load(programs + program * 2), gl.load(programs + program * 2 + 1)
        known = gl.maximum(n, 0)
        keys, start = gl.load(columns + known * 4 + 2), gl.load(columns + known * 4 + 3)
        stop = gl.minimum(place + ROWS, keys) if CAUSAL else keys
        return n, gl.load(rows + known * 4 + 3) + place, place, start, stop

    @gluon.jit
    def _fetch(
        descriptors, boxes, barriers, tables, sizes, BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr,
        STAGES: gl.constexpr,
    ):  # fmt: skip
        """The producer: this program's queries, then tiles of K and V."""
        q_desc, k_desc, v_desc, scale_desc = descriptors
        q_boxes, k_boxes, v_boxes, scale_boxes, _ = boxes
        q_ready, k_ready, k_empty, v_ready, v_empty = barriers
        T, Tk, HEADS_PER_KEY = sizes
        n, first, _, start, stop = query_place(tables[0], tables[1], tables[2], 64 * CONSUMERS, CAUSAL)
        h = gl.program_id(1)
        if (n >= 0) & (stop > 0):  # nobody waits for queries that see no key
            mbarrier.expect(q_ready, 64 * CONSUMERS * BLOCK_D)
            for part in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(q_desc, [h * T + first + part * 64, 0], q_ready, q_boxes.index(part))
            row = h // HEADS_PER_KEY * Tk + start
            for i in range(gl.cdiv(stop, 128)):
                stage = i % STAGES
                acquire(k_empty, i, STAGES)
                bar = k_ready.index(stage)
                mbarrier.expect(bar, 128 * BLOCK_D + 128 * 4)
                tma.async_copy_global_to_shared(k_desc, [row + i * 128, 0], bar, k_boxes.index(stage))
                tma.async_copy_global_to_shared(scale_desc, [row + i * 128], bar, scale_boxes.index(stage))
                acquire(v_empty, i, STAGES)
                bar = v_ready.index(stage)
                mbarrier.expect(bar, 128 * BLOCK_D * 2)
                tma.async_copy_global_to_shared(v_desc, [row + i * 128, 0], bar, v_boxes.index(stage))

    @gluon.jit
    def _scores(q, k_boxes, k_ready, i, STAGES: gl.constexpr, s_layout: gl.constexpr):
        """Starts Q K^T of tile i from the bits of 1.5 * 2^23: an integer below 2^22 added to these bits is added to the number."""
        start = gl.full([64, 128], INT_AS_FLOAT_BITS, gl.int32, s_layout)
        await_stage(k_ready, i, STAGES)
        return warpgroup_mma(q, k_boxes.index(i % STAGES).permute((1, 0)), start, is_async=True)

    @gluon.jit
    def own_sums(p):
        """Sums of what one thread has of each row, columns 2t and 2t + 1 of every 8: [64, 4]."""
        return gl.sum(gl.sum(p.reshape([64, p.shape[1] // 8, 4, 2]), 3), 1)

    @gluon.jit
    def seen_keys(first, KEYS: gl.constexpr, keys, position, CAUSAL: gl.constexpr, s_layout: gl.constexpr):
        """Whether a query, one a row, sees a key, of those from `first` on."""
        column = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
        last = keys - 1 - first + gl.zeros_like(position)
        if CAUSAL:
            last = gl.minimum(last, position - first)
        # column <= last; only the low bits differ between threads: registers for them, constants for the rest.
        return (column & -7)[None, :] <= last[:, None] - (column & 6)[None, :]

    @gluon.jit
    def _softmax(
        s, scale, row_scale, i, keys, position, m_i, l_i, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
        s_layout: gl.constexpr,
    ):  # fmt: skip
        """P, what scales the sums so far, maximum and sum."""
        x = s.to(gl.float32, bitcast=True) * scale[None, :] - (scale * INT_AS_FLOAT)[None, :]
        if MASKED:
            x = gl.where(seen_keys(i * 128, 128, keys, position, CAUSAL, s_layout), x, float("-inf"))
        m_new = gl.maximum(m_i, gl.max(x, 1) * row_scale)  # m_i is finite from the start: no difference of infinities
        alpha = gl.exp2(m_i - m_new)
        p = gl.exp2(x * row_scale[:, None] - m_new[:, None])
        part = own_sums(p)
        return p, alpha, m_new, l_i * gl.convert_layout(alpha, gl.SliceLayout(1, part.type.layout))[:, None] + part

    @gluon.jit
    def _step(
        q, p, acc, m_i, l_i, row_scale, i, keys, position, boxes, scratch, barriers, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
        STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
    ):  # fmt: skip
        """Q K^T and softmax of tile i under P V of tile i - 1. P stays fp32: packed pairs would be taken apart between tiles."""
        _, k_boxes, v_boxes, scale_boxes, _ = boxes
        _, k_ready, k_empty, v_ready, v_empty = barriers
        before = (i - 1) % STAGES
        p16 = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
        s = _scores(q, k_boxes, k_ready, i, STAGES, s_layout)
        await_stage(v_ready, i - 1, STAGES)
        acc = warpgroup_mma(p16, v_boxes.index(before), acc, is_async=True)
        scale = scale_boxes.index(i % STAGES).load(gl.SliceLayout(0, s_layout))
        s = warpgroup_mma_wait(1, deps=[s])
        p, alpha, m_i, l_i = _softmax(s, scale, row_scale, i, keys, position, m_i, l_i, MASKED, CAUSAL, s_layout)
        # Nobody reads this: a store that needs all of P keeps the wait, which ptxas would move up, behind the softmax.
        scratch.store(l_i)
        # Not earlier: an arrival does not wait for loads, here of the scale.
        release(k_empty, i, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(v_empty, i - 1, STAGES)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        return p, acc, m_i, l_i

    @gluon.jit
    def _whole_step(
        q, acc, m_i, l_i, row_scale, i, keys, position, boxes, barriers, MASKED: gl.constexpr, CAUSAL: gl.constexpr,
        STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
    ):  # fmt: skip
        """Q K^T, softmax and P V of tile i, one after the other: other warpgroups have the tensor cores meanwhile."""
        _, k_boxes, v_boxes, scale_boxes, _ = boxes
        _, k_ready, k_empty, v_ready, v_empty = barriers
        stage = i % STAGES
        s = _scores(q, k_boxes, k_ready, i, STAGES, s_layout)
        s = warpgroup_mma_wait(0, deps=[s])
        scale = scale_boxes.index(stage).load(gl.SliceLayout(0, s_layout))
        p, alpha, m_i, l_i = _softmax(s, scale, row_scale, i, keys, position, m_i, l_i, MASKED, CAUSAL, s_layout)
        p16 = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        await_stage(v_ready, i, STAGES)
        acc = warpgroup_mma(p16, v_boxes.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        # Not earlier: an arrival does not wait for loads, here of the scale.
        release(k_empty, i, STAGES)
        release(v_empty, i, STAGES)
        return acc, m_i, l_i

    @gluon.jit
    def _sums(
        q, row_scale, keys, stop, place, position, boxes, scratch, barriers, BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr,
        STAGES: gl.constexpr, OVERLAP: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
    ):  # fmt: skip
        """All tiles of 64 queries that see a key: sums, maxima and sums of P."""
        _, k_boxes, v_boxes, scale_boxes, _ = boxes
        _, k_ready, k_empty, v_ready, _ = barriers
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
        l_i = own_sums(gl.zeros([64, 128], gl.float32, s_layout))
        full = gl.minimum(place + 1, keys) // 128 if CAUSAL else keys // 128
        if OVERLAP:
            s = _scores(q, k_boxes, k_ready, 0, STAGES, s_layout)
            scale = scale_boxes.index(0).load(gl.SliceLayout(0, s_layout))
            s = warpgroup_mma_wait(0, deps=[s])
            p, _, m_i, l_i = _softmax(s, scale, row_scale, 0, keys, position, m_i, l_i, True, CAUSAL, s_layout)
            scratch.store(l_i)  # as in `_step`: the scale is loaded before its buffer is released
            mbarrier.arrive(k_empty.index(0), count=1)
            for i in range(1, full):
                p, acc, m_i, l_i = _step(
                    q, p, acc, m_i, l_i, row_scale, i, keys, position, boxes, scratch, barriers, False, CAUSAL, STAGES,
                    s_layout, o_layout,
                )  # fmt: skip
            for i in range(gl.maximum(full, 1), gl.cdiv(stop, 128)):
                p, acc, m_i, l_i = _step(
                    q, p, acc, m_i, l_i, row_scale, i, keys, position, boxes, scratch, barriers, True, CAUSAL, STAGES,
                    s_layout, o_layout,
                )  # fmt: skip
            last = gl.cdiv(stop, 128) - 1
            p16 = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, o_layout, 2))
            await_stage(v_ready, last, STAGES)
            acc = warpgroup_mma(p16, v_boxes.index(last % STAGES), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
        else:
            for i in range(full):
                acc, m_i, l_i = _whole_step(
                    q, acc, m_i, l_i, row_scale, i, keys, position, boxes, barriers, False, CAUSAL, STAGES, s_layout, o_layout,
                )  # fmt: skip
            for i in range(full, gl.cdiv(stop, 128)):
                acc, m_i, l_i = _whole_step(
                    q, acc, m_i, l_i, row_scale, i, keys, position, boxes, barriers, True, CAUSAL, STAGES, s_layout, o_layout,
                )  # fmt: skip
        return acc, m_i, gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout))

    @gluon.jit
    def _attend(
        PART: gl.constexpr, tensors, boxes, barriers, tables, sizes, strides, KV_HEADS, D: gl.constexpr,
        BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    ):  # fmt: skip
        """64 queries."""
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
        q_scale, v_mean, out, lse = tensors
        programs, rows, columns = tables
        T, _, HEADS_PER_KEY = sizes
        n, first, place, _, stop = query_place(programs, rows, columns, 64 * CONSUMERS, CAUSAL)
        h = gl.program_id(1).to(gl.int64)
        if n >= 0:
            place += PART * 64
            local = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
            count = gl.load(rows + n * 4 + 2)
            row_scale = gl.load(q_scale + (h * T + first + PART * 64) + local, mask=place + local < count, other=1.0)
            acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
            l_i = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
            if stop > 0:
                mbarrier.wait(barriers[0], 0)
                keys = gl.load(columns + n * 4 + 2)
                acc, m_i, l_i = _sums(
                    boxes[0].index(PART), row_scale, keys, stop, place, place + local, boxes, boxes[4].index(PART), barriers,
                    BLOCK_D, CAUSAL, STAGES, OVERLAP, s_layout, o_layout,
                )  # fmt: skip
            # Once more: none of it keeps a register over the loop.
            n, first, place, _, _ = query_place(programs, rows, columns, 64 * CONSUMERS, CAUSAL)
            place, count = place + PART * 64, gl.load(rows + n * 4 + 2)
            total = gl.where((place + local < count) & (l_i != 0), m_i + gl.log2(l_i), float("inf"))
            gl.store(lse + (h * T + first + PART * 64) + local, total, mask=place + local < gl.cdiv(count, 128) * 128)
            l_i = gl.convert_layout(l_i, gl.SliceLayout(1, o_layout))
            batch, token = gl.load(rows + n * 4).to(gl.int64), gl.load(rows + n * 4 + 1).to(gl.int64)
            column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_layout))
            real = column < D
            mean = gl.load(v_mean + (batch * KV_HEADS + h // HEADS_PER_KEY) * D + column, mask=real, other=0.0)
            acc = acc / gl.where(l_i == 0, 1.0, l_i)[:, None] + mean[None, :]
            acc = gl.where((l_i == 0)[:, None], 0.0, acc)
            position = place + gl.arange(0, 64, gl.SliceLayout(1, o_layout))
            goal = (
                out + batch * strides[0] + h * strides[1] + (token + position)[:, None] * strides[2] + column[None, :]
            )
            gl.store(goal, acc.to(out.dtype.element_ty), mask=(position < count)[:, None] & real[None, :])

    @gluon.jit(do_not_specialize=["T", "Tk"])
    def _hopper_training_kernel(
        q_desc, k_desc, v_desc, scale_desc, q_scale, v_mean, programs, rows, columns, out, lse,
        HEADS_PER_KEY, KV_HEADS, T, Tk, stride_b, stride_h, stride_s,
        D: gl.constexpr, BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
        OVERLAP: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        q_boxes = gl.allocate_shared_memory(gl.int8, [CONSUMERS, 64, BLOCK_D], q_desc.layout)
        k_boxes = gl.allocate_shared_memory(gl.int8, [STAGES, 128, BLOCK_D], k_desc.layout)
        v_boxes = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 128, BLOCK_D], v_desc.layout)
        scale_boxes = gl.allocate_shared_memory(gl.float32, [STAGES, 128], scale_desc.layout)
        q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(q_ready, count=1)
        k_ready, k_empty = new_ring(STAGES, CONSUMERS)
        v_ready, v_empty = new_ring(STAGES, CONSUMERS)
        barriers = (q_ready, k_ready, k_empty, v_ready, v_empty)
        scratches = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 64, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        boxes, descriptors = (q_boxes, k_boxes, v_boxes, scale_boxes, scratches), (q_desc, k_desc, v_desc, scale_desc)
        tables, tensors, sizes = (programs, rows, columns), (q_scale, v_mean, out, lse), (T, Tk, HEADS_PER_KEY)
        strides = (stride_b, stride_h, stride_s)
        if CONSUMERS == 2:
            gl.warp_specialize(
                [
                    (_attend, (0, tensors, boxes, barriers, tables, sizes, strides, KV_HEADS, D, BLOCK_D, CAUSAL, CONSUMERS, STAGES, OVERLAP)),
                    (_attend, (1, tensors, boxes, barriers, tables, sizes, strides, KV_HEADS, D, BLOCK_D, CAUSAL, CONSUMERS, STAGES, OVERLAP)),
                    (_fetch, (descriptors, boxes, barriers, tables, sizes, BLOCK_D, CAUSAL, CONSUMERS, STAGES)),
                ],
                [4, 1],
                [REGISTERS, 24],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_attend, (0, tensors, boxes, barriers, tables, sizes, strides, KV_HEADS, D, BLOCK_D, CAUSAL, CONSUMERS, STAGES, OVERLAP)),
                    (_attend, (1, tensors, boxes, barriers, tables, sizes, strides, KV_HEADS, D, BLOCK_D, CAUSAL, CONSUMERS, STAGES, OVERLAP)),
                    (_attend, (2, tensors, boxes, barriers, tables, sizes, strides, KV_HEADS, D, BLOCK_D, CAUSAL, CONSUMERS, STAGES, OVERLAP)),
                    (_fetch, (descriptors, boxes, barriers, tables, sizes, BLOCK_D, CAUSAL, CONSUMERS, STAGES)),
                ],
                [4, 4, 1],
                [REGISTERS, REGISTERS, 24],
            )  # fmt: skip
