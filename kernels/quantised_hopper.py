"""Dense INT8 and FP8 attention for Hopper: `quantised_attention._quantised_attention_kernel` with one producer and two consumers.

The schedule is block_sparse_hopper.py's. Two things differ. P V of a tile starts from zero and is added in fp32 (the FP8 product
keeps too few bits over many tiles). And P stays in the registers that Q K^T left it in: those of a thread are the ones an FP8
operand wants there, if V's tokens are interleaved within every 16 (`quantize_channels(..., interleave=True)`), so nothing is shuffled.

Source: SageAttention2 (arXiv 2411.10958); schedule and operand order: FlashAttention-3 (arXiv 2407.08608, section 3).
"""

import torch

from . import target

LOADABLE = target.HAS_TRITON and not target.INTERPRETED  # Gluon has no interpreter
MAX_REGISTERS = 168  # a thread, for 12 warps; the consumers take 240 each, the producer 24
STAGES = 3


def takes(device: torch.device, kind) -> bool:
    """Whether this kernel computes a precision on a device: Hopper, P V in FP8 with fp32 sums.

    Args:
        device: of the tensors.
        kind: one of `precision.PRECISIONS`.
    """
    return LOADABLE and target.arch(device) == 90 and kind.fp8 and not kind.acc16


def launch(rows, keys, channels, out, lse, failed, scale_log2) -> None:
    """Attention on quantised inputs.

    Args:
        rows, keys: `QuantizedTokens` of Q and K; K's scale is one a block of 128.
        channels: `QuantizedChannels` of V, interleaved.
        out: [B, H, S, D], written.
        lse: fp32 [B, H, S], written, or None.
        failed: int32 [B, H], set to 1 where sums left their range, or None.
        scale_log2: softmax scale times log2 e.
    """
    B, H, S, D = out.shape
    kv_heads, Sk, block_d = keys.values.shape[1:]
    byte_rows = {64: gl.NVMMASharedLayout(64, 8), 128: gl.NVMMASharedLayout(128, 8)}
    k_desc = TensorDescriptor.from_tensor(keys.values.view(-1, block_d), [128, block_d], byte_rows[block_d])
    v_desc = TensorDescriptor.from_tensor(channels.values.flatten(0, 2), [block_d, 128], byte_rows[128])
    programs = -(-S // 128) * B * H
    with target.on_device(out):
        _hopper_quantised_kernel[(min(programs, target.sm_count(out.device)),)](
            k_desc, v_desc, rows.values, rows.scale, keys.scale, channels.scale, channels.mean, out, lse, failed,
            scale_log2, programs, H, H // kv_heads, S, Sk, *out.stride()[:3],
            D=D, BLOCK_D=block_d, STAGES=STAGES, HAS_MEAN=channels.mean is not None, HAS_LSE=lse is not None,
            HAS_FAILED=failed is not None, num_warps=4, maxnreg=MAX_REGISTERS,
        )  # fmt: skip


if LOADABLE:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    @gluon.jit
    def _produce_bytes(descriptors, stages, barriers, sizes, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
        k_desc, v_desc = descriptors
        _, k_stages, v_stages = stages
        k_ready, k_empty, v_ready, v_empty = barriers
        programs, H, HEADS_PER_KEY, S, Sk = sizes
        n = 0
        for t in range(gl.program_id(0), programs, gl.num_programs(0)):
            kv = t // gl.cdiv(S, 128) // HEADS_PER_KEY
            for first in range(0, Sk, 128):
                stage = n % STAGES
                empty = (n // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), empty)
                mbarrier.expect(k_ready.index(stage), 128 * BLOCK_D)
                tma.async_copy_global_to_shared(k_desc, [kv * Sk + first, 0], k_ready.index(stage), k_stages.index(stage))
                mbarrier.wait(v_empty.index(stage), empty)
                mbarrier.expect(v_ready.index(stage), 128 * BLOCK_D)
                tma.async_copy_global_to_shared(
                    v_desc, [kv * BLOCK_D, first], v_ready.index(stage), v_stages.index(stage)
                )
                n += 1

    @gluon.jit
    def _integer_scores(q, k_stages, k_ready, n, STAGES: gl.constexpr, s_layout: gl.constexpr):
        """Starts Q K^T of stage n, from the bits of 1.5 * 2^23: see `_softmax_bytes`."""
        start = gl.full([64, 128], 0x4B400000, gl.int32, s_layout)
        mbarrier.wait(k_ready.index(n % STAGES), n // STAGES & 1)
        return warpgroup_mma(q, k_stages.index(n % STAGES).permute((1, 0)), start, is_async=True)

    @gluon.jit
    def _weighted(p, v_stages, v_ready, n, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, o_layout: gl.constexpr):
        """Starts P V of stage n from zero."""
        zero = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        mbarrier.wait(v_ready.index(n % STAGES), n // STAGES & 1)
        return warpgroup_mma(p, v_stages.index(n % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)

    @gluon.jit
    def _softmax_bytes(s, scale, left, m_i, l_i, MASKED: gl.constexpr, s_layout: gl.constexpr, p_layout: gl.constexpr):
        """P in FP8 as an operand, what scales the sums so far, maximum and sum."""
        # An integer below 2^22 that is added to these bits is added to the number: no conversion, of which a GPU does few.
        x = s.to(gl.float32, bitcast=True) - 12582912.0
        if MASKED:
            column = gl.arange(0, 128, gl.SliceLayout(0, s_layout))
            x = gl.where((column < left)[None, :], x, float("-inf"))
        m_new = gl.maximum(m_i, gl.max(x, 1) * scale)
        alpha = gl.exp2(m_i - m_new)
        # 448 in P and in l cancels; the largest P then takes FP8's whole range.
        p = gl.exp2(x * scale[:, None] - (m_new - 8.807354922057604)[:, None])
        l_i = l_i * alpha + gl.sum(p, 1)
        # A thread has columns (2t, 2t + 1) and (8 + 2t, 9 + 2t) of every 16; as an operand it holds 4t ... 4t + 3.
        p = p.reshape([64, 8, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, 128])
        return gl.convert_layout(p, p_layout).to(gl.float8e4nv), alpha, m_new, l_i

    @gluon.jit
    def _byte_step(
        q, p, acc, alpha, m_i, l_i, row_scale, k_scale, i, left, n, k_stages, v_stages, barriers, MASKED: gl.constexpr,
        BLOCK_D: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr, p_layout: gl.constexpr,
    ):  # fmt: skip
        """Q K^T and softmax of stage n under P V of stage n - 1."""
        k_ready, k_empty, v_ready, v_empty = barriers
        s = _integer_scores(q, k_stages, k_ready, n, STAGES, s_layout)
        part = _weighted(p, v_stages, v_ready, n - 1, BLOCK_D, STAGES, o_layout)
        scale = row_scale * gl.load(k_scale + i)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        p_new, alpha_new, m_i, l_i = _softmax_bytes(s, scale, left, m_i, l_i, MASKED, s_layout, p_layout)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(v_empty.index((n - 1) % STAGES), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None] + part
        return p_new, acc, alpha_new, m_i, l_i

    @gluon.jit
    def _consume_bytes(
        HALF: gl.constexpr, tensors, stages, barriers, sizes, strides, scale_log2, D: gl.constexpr, BLOCK_D: gl.constexpr,
        STAGES: gl.constexpr, HAS_MEAN: gl.constexpr, HAS_LSE: gl.constexpr, HAS_FAILED: gl.constexpr,
    ):  # fmt: skip
        q, q_scale, k_scales, v_scale, v_mean, out, lse, failed = tensors
        q_stages, k_stages, v_stages = stages
        k_ready, k_empty, v_ready, v_empty = barriers
        programs, H, HEADS_PER_KEY, S, Sk = sizes
        sob, soh, sos = strides
        s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 32])
        p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
        across: gl.constexpr = BLOCK_D // 16
        rows_layout: gl.constexpr = gl.BlockedLayout([1, 16], [32 // across, across], [4, 1], [1, 0])
        q_shared = q_stages.index(HALF)
        blocks = gl.cdiv(Sk, 128)
        n = 0
        for t in range(gl.program_id(0), programs, gl.num_programs(0)):
            bh = (t // gl.cdiv(S, 128)).to(gl.int64)
            start = t % gl.cdiv(S, 128) * 128 + HALF * 64
            k_scale = k_scales + bh // HEADS_PER_KEY * blocks
            row = start + gl.arange(0, 64, gl.SliceLayout(1, rows_layout))
            offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows_layout))
            q_ptr = q + (bh * S + row)[:, None] * BLOCK_D + offs_d[None, :]
            q_shared.store(gl.load(q_ptr, mask=(row < S)[:, None], other=0))
            fence_async_shared()
            s_row = start + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
            row_scale = gl.load(q_scale + bh * S + s_row, mask=s_row < S, other=1.0) * scale_log2

            acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            m_i = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_layout))
            l_i = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
            s = _integer_scores(q_shared, k_stages, k_ready, n, STAGES, s_layout)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(n % STAGES), count=1)
            p, alpha, m_i, l_i = _softmax_bytes(
                s, row_scale * gl.load(k_scale), Sk, m_i, l_i, True, s_layout, p_layout
            )
            n += 1
            for i in range(1, Sk // 128):
                p, acc, alpha, m_i, l_i = _byte_step(
                    q_shared, p, acc, alpha, m_i, l_i, row_scale, k_scale, i, 128, n, k_stages, v_stages, barriers,
                    False, BLOCK_D, STAGES, s_layout, o_layout, p_layout,
                )  # fmt: skip
                n += 1
            for i in range(gl.maximum(Sk // 128, 1), blocks):
                p, acc, alpha, m_i, l_i = _byte_step(
                    q_shared, p, acc, alpha, m_i, l_i, row_scale, k_scale, i, Sk - i * 128, n, k_stages, v_stages, barriers,
                    True, BLOCK_D, STAGES, s_layout, o_layout, p_layout,
                )  # fmt: skip
                n += 1
            part = _weighted(p, v_stages, v_ready, n - 1, BLOCK_D, STAGES, o_layout)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(v_empty.index((n - 1) % STAGES), count=1)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None] + part

            acc = acc / gl.convert_layout(l_i, gl.SliceLayout(1, o_layout))[:, None]
            if HAS_FAILED:
                if gl.max(gl.max(gl.where(gl.abs(acc) <= 1.07 * 448.0, 0, 1), 1), 0) > 0:  # e4m3 rounds P by 6.25 % at most
                    gl.store(failed + bh, 1)
            column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, o_layout))
            channel = bh // HEADS_PER_KEY * BLOCK_D + column
            acc = gl.where(acc > 448.0, 448.0, gl.where(acc < -448.0, -448.0, acc))  # NaN stays
            acc = acc * gl.load(v_scale + channel)[None, :]
            if HAS_MEAN:
                acc += gl.load(v_mean + channel)[None, :]
            o_row = start + gl.arange(0, 64, gl.SliceLayout(1, o_layout))
            out_ptr = out + (bh // H) * sob + (bh % H) * soh + o_row.to(gl.int64)[:, None] * sos + column[None, :]
            gl.store(out_ptr, acc.to(out.dtype.element_ty), mask=(o_row < S)[:, None] & (column < D)[None, :])
            if HAS_LSE:
                total = m_i + gl.log2(l_i) - 8.807354922057604
                gl.store(lse + bh * S + s_row, total * 0.6931471805599453, mask=s_row < S)  # ln 2

    @gluon.jit(do_not_specialize=["programs", "S", "Sk"])
    def _hopper_quantised_kernel(
        k_desc, v_desc, q, q_scale, k_scales, v_scale, v_mean, out, lse, failed,
        scale_log2, programs, H, HEADS_PER_KEY, S, Sk, sob, soh, sos,
        D: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HAS_MEAN: gl.constexpr, HAS_LSE: gl.constexpr,
        HAS_FAILED: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        q_stages = gl.allocate_shared_memory(gl.int8, [2, 64, BLOCK_D], gl.NVMMASharedLayout(BLOCK_D, 8))
        k_stages = gl.allocate_shared_memory(gl.int8, [STAGES, 128, BLOCK_D], gl.NVMMASharedLayout(BLOCK_D, 8))
        v_stages = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_D, 128], gl.NVMMASharedLayout(128, 8))
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
        tensors = (q, q_scale, k_scales, v_scale, v_mean, out, lse, failed)
        sizes = (programs, H, HEADS_PER_KEY, S, Sk)
        strides = (sob, soh, sos)
        gl.warp_specialize(
            [
                (_consume_bytes, (0, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, STAGES,
                                  HAS_MEAN, HAS_LSE, HAS_FAILED)),
                (_consume_bytes, (1, tensors, stages, barriers, sizes, strides, scale_log2, D, BLOCK_D, STAGES,
                                  HAS_MEAN, HAS_LSE, HAS_FAILED)),
                (_produce_bytes, ((k_desc, v_desc), stages, barriers, sizes, BLOCK_D, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
