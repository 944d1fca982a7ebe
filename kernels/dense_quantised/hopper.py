"""Dense INT8 and FP8 attention for Hopper: `triton._quantised_attention_kernel` with one producer, several consumers.

One warp fetches K and V; each warpgroup of 64 rows computes Q K^T, softmax and P V of a tile, one after the other, and while
it is at its softmax another one has the tensor cores. What the instructions of a warpgroup's loop cost decides: nothing narrower
than 32 bits lives from one tile to the next (packing and unpacking it was a quarter of them), integer scores are used as the
floats their bits spell, and row sums stay apart in the four threads of a row until the end.

P V of a tile starts from zero and is added in fp32 (the FP8 product keeps too few bits over many tiles). P stays in the
registers that Q K^T left it in: those of a thread are the ones an FP8 operand wants there, if V's tokens are interleaved
within every 16 (`quantize_channels(..., interleave=True)`), so nothing is shuffled.

Source: SageAttention2 (arXiv 2411.10958); roles and operand order: FlashAttention-3 (arXiv 2407.08608, section 3).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..common import target
from ..common.numbers import INT_AS_FLOAT, LN_2, LOG2_FP8_MAX
from ..gluon import LOADABLE


@dataclass(frozen=True)
class Launch:
    """Warpgroups of 64 query rows, K and V buffers of 128 keys, registers a thread at first and of a consumer later."""

    consumers: int
    stages: int
    at_first: int
    of_a_consumer: int
    ones: bool = False  # row sums of rounded P as products with ones

    def name(self) -> str:
        """Such as 3_consumers_s6_ones."""
        return f"{self.consumers}_consumers_s{self.stages}{'_ones' if self.ones else ''}"


# Padded head dim -> how the work is split. 65536 registers are for all warps, at first and when the producer has given its own up.
LAUNCH = {64: Launch(4, 6, 96, 112, True), 128: Launch(3, 6, 128, 160, True)}


def candidates() -> Iterator[Launch]:
    """Rows worth timing."""
    for ones in (False, True):
        yield Launch(3, 6, 128, 160, ones)
        yield Launch(3, 3, 128, 160, ones)
        yield Launch(4, 6, 96, 112, ones)  # at head dim 128 it spills


def supports(device: torch.device, kind) -> bool:
    """Whether this kernel computes a precision on a device: Hopper, P V in FP8 with fp32 sums.

    Args:
        device: of the tensors.
        kind: one of `precision.PRECISIONS`.
    """
    return LOADABLE and target.arch(device) == 90 and kind.fp8 and not kind.acc16


def launch(rows, keys, channels, out, lse, failed, scale_log2, row: Launch | None = None) -> None:
    """Attention on quantised inputs.

    Args:
        rows, keys: `QuantizedTokens` of Q and K; K's scale is one a block of 128.
        channels: `QuantizedChannels` of V, interleaved.
        out: [B, H, S, D], written.
        lse: fp32 [B, H, S], written, or None.
        failed: int32 [B, H], set to 1 where sums left their range, or None.
        scale_log2: softmax scale times log2 e.
        row: how the work is split; None: by `LAUNCH`.
    """
    B, H, S, D = out.shape
    kv_heads, Sk, block_d = keys.values.shape[1:]
    row = row or LAUNCH[block_d]
    byte_rows = {64: gl.NVMMASharedLayout(64, 8), 128: gl.NVMMASharedLayout(128, 8)}
    k_desc = TensorDescriptor.from_tensor(keys.values.view(-1, block_d), [128, block_d], byte_rows[block_d])
    v_desc = TensorDescriptor.from_tensor(channels.values.flatten(0, 2), [block_d, 128], byte_rows[128])
    programs = -(-S // (64 * row.consumers)) * B * H
    with target.on_device(out):
        _hopper_quantised_kernel[(min(programs, target.sm_count(out.device)),)](
            k_desc, v_desc, rows.values, rows.scale, keys.scale, channels.scale, channels.mean, out, lse, failed,
            scale_log2, programs, H, H // kv_heads, S, Sk, *out.stride()[:3],
            D=D, BLOCK_D=block_d, CONSUMERS=row.consumers, STAGES=row.stages, REGISTERS=row.of_a_consumer, ONES=row.ones,
            HAS_MEAN=channels.mean is not None, HAS_LSE=lse is not None, HAS_FAILED=failed is not None,
            num_warps=4, maxnreg=row.at_first,
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
    from ..gluon.mma import by_sixteens, in_values_range, integer_scores, one_column, own_sum, store_ones, to_bytes
    from ..gluon.ring import acquire, await_stage, new_ring, release

    @gluon.jit
    def _produce_bytes(
        descriptors, stages, barriers, sizes, BLOCK_D: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr
    ):
        k_desc, v_desc = descriptors
        _, k_stages, v_stages, _ = stages
        ready, empty = barriers
        programs, _, HEADS_PER_KEY, S, Sk = sizes
        n = 0
        for t in range(gl.program_id(0), programs, gl.num_programs(0)):
            kv = t // gl.cdiv(S, ROWS) // HEADS_PER_KEY
            for first in range(0, Sk, 128):
                stage = n % STAGES
                bar = ready.index(stage)
                acquire(empty, n, STAGES)
                mbarrier.expect(bar, 2 * 128 * BLOCK_D)
                tma.async_copy_global_to_shared(k_desc, [kv * Sk + first, 0], bar, k_stages.index(stage))
                tma.async_copy_global_to_shared(v_desc, [kv * BLOCK_D, first], bar, v_stages.index(stage))
                n += 1

    @gluon.jit
    def _softmax(s, scale, left, m_i, l_i, MASKED: gl.constexpr, SUM: gl.constexpr, s_layout: gl.constexpr):
        """P up to 448, what scales the sums so far, maximum and each thread's sum."""
        x = s.to(gl.float32, bitcast=True)
        if MASKED:
            column = gl.arange(0, 128, gl.SliceLayout(0, s_layout))
            # column < left; only the low bits differ between threads: two registers and constants, not 32 columns.
            x = gl.where(((column & 120) < left - (column & 7))[None, :], x, float("-inf"))
        m_new = gl.maximum(m_i, (gl.max(x, 1) - INT_AS_FLOAT) * scale)
        alpha = gl.exp2(m_i - m_new)
        # 448 in P and in l cancels; the largest P then takes FP8's whole range. The constant of the scores' bits goes with it.
        p = gl.exp2(x * scale[:, None] - (m_new + (scale * INT_AS_FLOAT - LOG2_FP8_MAX))[:, None])
        if SUM:
            part = own_sum(p)
            l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, part.type.layout))[:, None] + part
        return p, alpha, m_new, l_i

    @gluon.jit
    def _step(
        q, acc, m_i, l_i, t_i, ones, row_scale, k_scale, i, left, n, k_stages, v_stages, barriers, MASKED: gl.constexpr,
        ONES: gl.constexpr, SUM: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
    ):  # fmt: skip
        """One tile of keys, the n-th of this program: running output, maximum and sums."""
        ready, empty = barriers
        stage = n % STAGES
        p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
        await_stage(ready, n, STAGES)
        s = integer_scores(q, k_stages.index(stage), s_layout)
        scale = row_scale * gl.load(k_scale + i)
        s = warpgroup_mma_wait(0, deps=[s])
        p, alpha, m_i, l_i = _softmax(s, scale, left, m_i, l_i, MASKED, SUM, s_layout)
        p = to_bytes(by_sixteens(p).permute([0, 1, 3, 2, 4]).reshape([64, 128]), p_layout)
        zero = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        part = warpgroup_mma(p, v_stages.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        if ONES:
            total = gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32]))
            total = warpgroup_mma(p, ones.permute((1, 0)), total, use_acc=False, is_async=True)
            part, total = warpgroup_mma_wait(0, deps=[part, total])
            t_i = t_i * gl.convert_layout(alpha, gl.SliceLayout(1, t_i.type.layout))[:, None] + one_column(total)
        else:
            part = warpgroup_mma_wait(0, deps=[part])
        release(empty, n, STAGES)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None] + part
        return acc, m_i, l_i, t_i

    @gluon.jit
    def _consume_bytes(
        PART: gl.constexpr, tensors, stages, barriers, sizes, strides, scale_log2, D: gl.constexpr, BLOCK_D: gl.constexpr,
        ROWS: gl.constexpr, STAGES: gl.constexpr, ONES: gl.constexpr, HAS_MEAN: gl.constexpr, HAS_LSE: gl.constexpr,
        HAS_FAILED: gl.constexpr,
    ):  # fmt: skip
        q, q_scale, k_scales, v_scale, v_mean, out, lse, failed = tensors
        q_stages, k_stages, v_stages, ones = stages
        SUM: gl.constexpr = HAS_LSE or not ONES
        programs, H, HEADS_PER_KEY, S, Sk = sizes
        sob, soh, sos = strides
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
        across: gl.constexpr = BLOCK_D // 16
        rows_layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 // across, across], [4, 1], [1, 0])
        q_shared = q_stages.index(PART)
        whole, blocks = Sk >> 7, (Sk + 127) >> 7
        n = 0
        for t in range(gl.program_id(0), programs, gl.num_programs(0)):
            of_head = t // gl.cdiv(S, ROWS)
            bh, kv = of_head.to(gl.int64), (of_head // HEADS_PER_KEY).to(gl.int64)
            start = t % gl.cdiv(S, ROWS) * ROWS + PART * 64
            k_scale = k_scales + kv * blocks
            first = bh * S + start
            row = gl.arange(0, 64, gl.SliceLayout(1, rows_layout))[:, None]
            q_ptr = q + first * BLOCK_D + row * BLOCK_D + gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows_layout))[None, :]
            q_shared.store(gl.load(q_ptr, mask=row < S - start, other=0))
            fence_async_shared()
            s_row = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
            row_scale = gl.load(q_scale + first + s_row, mask=s_row < S - start, other=1.0) * scale_log2

            acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
            l_i = own_sum(gl.zeros([64, 128], gl.float32, s_layout))
            t_i = one_column(gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])))
            for i in range(whole):
                acc, m_i, l_i, t_i = _step(
                    q_shared, acc, m_i, l_i, t_i, ones, row_scale, k_scale, i, 128, n, k_stages, v_stages, barriers,
                    False, ONES, SUM, BLOCK_D, STAGES, s_layout, o_layout,
                )  # fmt: skip
                n += 1
            if Sk % 128 > 0:
                acc, m_i, l_i, t_i = _step(
                    q_shared, acc, m_i, l_i, t_i, ones, row_scale, k_scale, whole, Sk % 128, n, k_stages, v_stages, barriers,
                    True, ONES, SUM, BLOCK_D, STAGES, s_layout, o_layout,
                )  # fmt: skip
                n += 1

            l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout))
            divisor = l_i
            if ONES:
                divisor = gl.convert_layout(gl.max(t_i, 1), gl.SliceLayout(1, s_layout))
            acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, o_layout))[:, None]
            channel = kv * BLOCK_D
            acc = in_values_range(
                acc, v_scale + channel, failed + bh if HAS_FAILED else failed, BLOCK_D, HAS_FAILED, o_layout
            )
            column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_layout))
            if HAS_MEAN:
                acc += gl.load(v_mean + channel + column)[None, :]
            row = gl.arange(0, 64, gl.SliceLayout(1, o_layout))[:, None]
            b, h = (of_head // H).to(gl.int64), (of_head % H).to(gl.int64)
            out_ptr = out + b * sob + h * soh + (start + row).to(gl.int64) * sos + column[None, :]
            gl.store(out_ptr, acc.to(out.dtype.element_ty), mask=(row < S - start) & (column < D)[None, :])
            if HAS_LSE:
                total = m_i + gl.log2(l_i) - LOG2_FP8_MAX
                gl.store(lse + bh * S + (start + s_row), total * LN_2, mask=start + s_row < S)

    @gluon.jit(do_not_specialize=["programs", "S", "Sk"])
    def _hopper_quantised_kernel(
        k_desc, v_desc, q, q_scale, k_scales, v_scale, v_mean, out, lse, failed,
        scale_log2, programs, H, HEADS_PER_KEY, S, Sk, sob: gl.int64, soh: gl.int64, sos: gl.int64,
        D: gl.constexpr, BLOCK_D: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
        ONES: gl.constexpr, HAS_MEAN: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FAILED: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        q_stages = gl.allocate_shared_memory(gl.int8, [CONSUMERS, 64, BLOCK_D], gl.NVMMASharedLayout(BLOCK_D, 8))
        k_stages = gl.allocate_shared_memory(gl.int8, [STAGES, 128, BLOCK_D], gl.NVMMASharedLayout(BLOCK_D, 8))
        v_stages = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_D, 128], gl.NVMMASharedLayout(128, 8))
        barriers = new_ring(STAGES, CONSUMERS)
        ones = gl.allocate_shared_memory(gl.float8e4nv, [8, 128], gl.NVMMASharedLayout(128, 8))
        if ONES:
            store_ones(ones, 128)
        stages = (q_stages, k_stages, v_stages, ones)
        tensors = (q, q_scale, k_scales, v_scale, v_mean, out, lse, failed)
        sizes = (programs, H, HEADS_PER_KEY, S, Sk)
        strides = (sob, soh, sos)
        ROWS: gl.constexpr = 64 * CONSUMERS
        gl.static_assert(CONSUMERS == 3 or CONSUMERS == 4)
        if CONSUMERS == 3:
            gl.warp_specialize(
                [
                    (_consume_bytes, (0, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, ROWS, STAGES,
                                      ONES, HAS_MEAN, HAS_LSE, HAS_FAILED)),
                    (_consume_bytes, (1, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, ROWS, STAGES,
                                      ONES, HAS_MEAN, HAS_LSE, HAS_FAILED)),
                    (_consume_bytes, (2, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, ROWS, STAGES,
                                      ONES, HAS_MEAN, HAS_LSE, HAS_FAILED)),
                    (_produce_bytes, ((k_desc, v_desc), stages, barriers, sizes, BLOCK_D, ROWS, STAGES)),
                ],
                [4, 4, 1],
                [REGISTERS, REGISTERS, 24],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_consume_bytes, (0, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, ROWS, STAGES,
                                      ONES, HAS_MEAN, HAS_LSE, HAS_FAILED)),
                    (_consume_bytes, (1, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, ROWS, STAGES,
                                      ONES, HAS_MEAN, HAS_LSE, HAS_FAILED)),
                    (_consume_bytes, (2, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, ROWS, STAGES,
                                      ONES, HAS_MEAN, HAS_LSE, HAS_FAILED)),
                    (_consume_bytes, (3, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, ROWS, STAGES,
                                      ONES, HAS_MEAN, HAS_LSE, HAS_FAILED)),
                    (_produce_bytes, ((k_desc, v_desc), stages, barriers, sizes, BLOCK_D, ROWS, STAGES)),
                ],
                [4, 4, 4, 1],
                [REGISTERS, REGISTERS, REGISTERS, 24],
            )  # fmt: skip
