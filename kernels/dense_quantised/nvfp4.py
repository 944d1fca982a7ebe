"""Dense attention in NVFP4 (SageAttention3): Q K^T and P V from e2m1 numbers in groups of 16 with e4m3 scales.

    s_ij = sm_scale (q4_i . k4_j + q_mean . (k_j - k_mean))
    P    in two levels: p_ij = 2688 exp(s_ij - m_i), 2688 = 6 * 448, then e2m1 with e4m3 scales of 16 keys each
    out  = P4 V4 / sum_j p_ij                                  the sum in fp32, of the unrounded p

The first level (a row's 2688, folded into the base-2 exponent) makes the groups' scales use e4m3's whole range; scales of
exp(s - m) itself, at most 1/6, would mostly be subnormal. K loses its mean over all tokens, Q that of every 128 rows.

sm100 and sm120 multiply FP4 natively (`tl.dot_scaled`: UTCOMMA and OMMA with e4m3 scales of 16). Elsewhere every factor
(6 significant bits) is held exactly in fp16, and fp16 products with fp32 sums give the same numbers: an exact emulation,
for accuracy work, slower than 8 bits. sm80 and newer; head dims up to 128, padded to 64 or 128; fp16, bf16, fp32 inputs.
"""

import torch

from ..common import target
from ..common.checks import check_inputs
from ..common.launch import Launch, LaunchTable
from ..common.numbers import LN_2, LOG2_FP4_RANGE, base2, softmax_scale
from ..common.quantised_tile import hide, note_failure
from ..common.rounded import SCORE_CHUNK, note_failure_reference
from ..common.rounded import hide as hide_reference
from ..common.smoothing import mean_scores, unsmoothed_lse, unsmoothed_lse_reference
from ..common.target import tl, triton
from ..quantize.channels import statistics, statistics_reference
from ..quantize.nvfp4 import (
    Nvfp4,
    dequantize_nvfp4,
    pack_e2m1,
    quantize_nvfp4,
    quantize_nvfp4_reference,
    round_nvfp4,
    round_to_e2m1,
    round_to_e4m3,
)

P_RANGE = 6.0 * 448.0
BLOCK = 128


def fp4_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
    smooth_q: bool = True,
    smooth_k: bool = True,
    failed: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to every key, in NVFP4.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        k, v: [B, Hkv, Sk, D], q's dtype; Hkv divides H, and query head h sees key head h // (H / Hkv).
        is_causal: query i sees keys 0 .. i (as in PyTorch, also where S != Sk).
        mask: bool [B or 1, H or 1, S or 1, Sk], True where a query sees a key; hidden keys must be finite, and count in
            the means and scales.
        sm_scale: softmax scale; default D ** -0.5.
        smooth_q: take the mean of every 128 queries off and add its scores back. Costs 4 bytes for each (128 queries,
            key) and head.
        smooth_k: take K's mean over all tokens off.
        failed: int32 [B, H], set to 1 for a head whose sums are not finite or left the range of the quantised values.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, H, S, D], q's dtype and memory layout; with return_lse also lse fp32 [B, H, S], natural log, of the
        scores before smoothing. A query that sees no key gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, or sm_scale is not positive.
        TypeError: dtypes are mixed or not supported, or the mask is not bool.
        NotImplementedError: head dim above 128; on the Triton path, a gradient would be needed.

    Source: arXiv 2505.11594, section 3 and algorithm 1.
    """
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    check_inputs(q, k, v, sm_scale, mask)
    target.refuse_gradients("fp4_attention", q, k, v)
    op = _launch if target.use_triton(q) else fp4_attention_reference
    return op(
        q, k, v, is_causal=is_causal, mask=mask, sm_scale=sm_scale, smooth_q=smooth_q, smooth_k=smooth_k,
        failed=failed, return_lse=return_lse,
    )  # fmt: skip


def fp4_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
    smooth_q: bool = True,
    smooth_k: bool = True,
    failed: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Specification of `fp4_attention` in plain torch; same arguments and result.

    P is rounded relative to a row's largest score, where the kernel rounds relative to the largest so far.
    """
    S, D = q.shape[2:]
    Sk = k.shape[2]
    sm_scale = softmax_scale(sm_scale, D)
    mean = statistics_reference(k, v).k_mean if smooth_k else None
    rows = quantize_nvfp4_reference(q, packed=False, own_mean=smooth_q)
    bias = mean_scores(rows.mean, k, mean) if smooth_q else None
    heads = q.shape[1] // k.shape[1]
    queries, keys = dequantize_nvfp4(rows), dequantize_nvfp4(quantize_nvfp4_reference(k, packed=False, mean=mean))
    values = dequantize_nvfp4(quantize_nvfp4_reference(v, transposed=True, packed=False))  # [B, Hkv, Dp, Sp]
    keys, values = (x.repeat_interleave(heads, 1) for x in (keys, values))
    chunk = max(1, SCORE_CHUNK // (q.shape[0] * q.shape[1] * Sk))
    outs, lses = [], []
    for place in torch.arange(S, device=q.device).split(chunk):
        scores = queries[:, :, place] @ keys.mT
        if bias is not None:
            scores += bias[:, :, place // BLOCK]
        scores *= sm_scale
        hide_reference(scores, place, is_causal, mask)
        lses.append(scores.logsumexp(-1))
        p = P_RANGE * torch.exp(scores - scores.amax(-1, keepdim=True))
        outs.append(_rounded(p, values.shape[3]) @ values.mT / p.sum(-1, keepdim=True))
    out, lse = torch.cat(outs, 2)[..., :D], torch.cat(lses, 2)
    if mask is not None:
        out = torch.where(lse[..., None] == -torch.inf, 0.0, out)
    note_failure_reference(failed, out)
    out = torch.empty_like(q).copy_(out)
    return (out, unsmoothed_lse_reference(lse, q, mean, sm_scale)) if return_lse else out


def _rounded(p: torch.Tensor, width: int) -> torch.Tensor:
    p = torch.nn.functional.pad(p, (0, width - p.shape[-1]))
    values, scale = round_nvfp4(p)
    return (values.unflatten(-1, (-1, 16)) * scale[..., None]).flatten(-2)


# arch -> padded head dim -> tile sizes.
LAUNCH = LaunchTable(
    {
        80: {64: Launch(64, 64, 4, 2), 128: Launch(64, 32, 4, 2)},
        89: {64: Launch(64, 32, 4, 2), 128: Launch(64, 32, 4, 2)},
        90: {64: Launch(128, 64, 8, 2), 128: Launch(128, 64, 8, 2)},
        100: {64: Launch(128, 64, 8, 2), 128: Launch(128, 64, 8, 2)},
        120: {64: Launch(128, 64, 8, 2), 128: Launch(64, 64, 8, 2)},
    }
)


def _launch(q, k, v, *, is_causal, mask, sm_scale, smooth_q, smooth_k, failed, return_lse):
    native = target.has_fp4(q.device)
    mean = statistics(k, v).k_mean if smooth_k else None
    rows = quantize_nvfp4(q, packed=native, own_mean=smooth_q)
    keys = quantize_nvfp4(k, packed=native, mean=mean)
    values = quantize_nvfp4(v, transposed=True, packed=native)
    per_key_head = rows.head_scale.unflatten(1, (k.shape[1], -1))  # [B, Hkv, H / Hkv]
    score_scale = (per_key_head * keys.head_scale[..., None]).flatten(1)  # [B, H], what a product of codes stands for
    bias = mean_scores(rows.mean, k, mean) / score_scale[..., None, None] if smooth_q else None
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    _attend(rows, keys, values, score_scale * base2(sm_scale), bias, mask, out, lse, failed, is_causal, native)
    return (out, unsmoothed_lse(lse, q, mean, sm_scale)) if return_lse else out


def _attend(
    rows: Nvfp4, keys: Nvfp4, values: Nvfp4, score_scale, bias, mask, out, lse, failed, is_causal, native
):  # fmt: skip
    B, H, S, D = out.shape
    kv_heads, Sk = keys.values.shape[1:3]
    block_d = values.values.shape[2]
    if mask is not None:
        mask = mask.expand(B, H, S, Sk).view(torch.uint8)
    row = LAUNCH.row(out.device, block_d)
    with target.on_device(out):
        _fp4_attention_kernel[(triton.cdiv(S, row.block_m), B * H)](
            rows.values, rows.scale, keys.values, keys.scale, values.values, values.scale, values.head_scale,
            score_scale, bias, mask, out, lse, failed, H, H // kv_heads, S, Sk,
            *out.stride()[:3], *((0,) * 4 if mask is None else mask.stride()),
            D=D, BLOCK_D=block_d, BLOCK_M=row.block_m, BLOCK_N=row.block_n, CAUSAL=is_causal, NATIVE=native,
            ASM=not target.INTERPRETED, num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip


@triton.jit
def _pack(low, high, ASM: tl.constexpr):
    """Bytes of two e2m1 codes each, from any numbers."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b8 b0, b1, b2, b3;
            cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1;
            cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2;
            cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3;
            cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4;
            mov.b32 $0, {b0, b1, b2, b3};
            }
            """,
            "=r,r,r,r,r,r,r,r,r", [low, high], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return pack_e2m1(round_to_e2m1(low), round_to_e2m1(high))


@triton.jit
def _tile(
    q, q_scale, k, k_scale, v, v_scale, scale, bias, mask, stride_mk, width, first, keys, row, acc, l_i, m_i,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, CAUSAL: tl.constexpr,
    NATIVE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of keys [first, first + BLOCK_N), of which `keys` exist: running output, sum and maximum of each row."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_n < keys
    token = first + offs_n.to(tl.int64)
    # Never a constant zero: the compiler cannot give scaled products on sm100 one to start from.
    start = tl.zeros([BLOCK_N], dtype=tl.float32) + scale * 0.0
    if bias is not None:
        start = tl.load(bias + token, mask=inside, other=0.0)
    start = tl.broadcast_to(start[None, :], [BLOCK_M, BLOCK_N])
    if NATIVE:
        half, sixteenth = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D // 16)
        k_tile = tl.load(k + token[:, None] * (BLOCK_D // 2) + half[None, :], mask=inside[:, None], other=0)
        ks_ptr = k_scale + token[:, None] * (BLOCK_D // 16) + sixteenth[None, :]
        ks_tile = tl.load(ks_ptr, mask=inside[:, None], other=0.0)  # [BN, BD / 16]
        x = tl.dot_scaled(q, q_scale, "e2m1", tl.trans(k_tile), ks_tile, "e2m1", acc=start)
    else:
        k_tile = tl.load(k + token[:, None] * BLOCK_D + offs_d[None, :], mask=inside[:, None], other=0.0)
        x = tl.dot(q, tl.trans(k_tile)) + start  # [BM, BN]
    x = hide(x, mask, stride_mk, token, inside, row, PARTIAL, CAUSAL)
    m_new = tl.maximum(m_i, tl.max(x, 1) * scale)  # [BM], base 2
    top = m_new if mask is None else tl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen no key yet
    p = tl.exp2(x * scale - (top - LOG2_FP4_RANGE)[:, None])
    alpha = tl.exp2(m_i - top)
    l_i = l_i * alpha + tl.sum(p, 1)
    groups = tl.reshape(p, [BLOCK_M, BLOCK_N // 16, 16])
    size = round_to_e4m3(tl.max(groups, 2) / 6.0)  # [BM, BN / 16]
    groups = groups * tl.where(size > 0, 1.0 / size, 0.0)[:, :, None]
    acc = acc * alpha[:, None]
    if NATIVE:
        low, high = tl.split(tl.reshape(groups, [BLOCK_M, BLOCK_N // 2, 2]))
        half, sixteenth = first // 2 + tl.arange(0, BLOCK_N // 2), first // 16 + tl.arange(0, BLOCK_N // 16)
        v_tile = tl.load(v + offs_d[:, None] * (width // 2) + half[None, :])  # [BD, BN / 2]
        vs_tile = tl.load(v_scale + offs_d[:, None] * (width // 16) + sixteenth[None, :])
        size = size.to(tl.float8e4nv)
        acc = tl.dot_scaled(_pack(low, high, ASM), size, "e2m1", tl.trans(v_tile), vs_tile, "e2m1", acc=acc)
    else:
        near = (round_to_e2m1(groups) * size[:, :, None]).to(tl.float16)
        v_tile = tl.load(v + offs_d[:, None] * width + (first + offs_n)[None, :])  # [BD, BN]
        acc = tl.dot(tl.reshape(near, [BLOCK_M, BLOCK_N]), tl.trans(v_tile), acc)
    return acc, l_i, m_new


@triton.jit(do_not_specialize=["S", "Sk"])
def _fp4_attention_kernel(
    q, q_scale, k, k_scale, v, v_scale, v_head_scale, score_scale, bias, mask, out, lse, failed,
    H, HEADS_PER_KEY, S, Sk, stride_ob, stride_oh, stride_os, stride_mb, stride_mh, stride_mq, stride_mk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    NATIVE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    kv = bh // HEADS_PER_KEY
    # The longest rows first, so that the last programs are short.
    start = (tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    inside = row < S
    place = (bh * S + row)[:, None]
    width = tl.cdiv(Sk, 128) * 128  # of a line of transposed values
    if NATIVE:
        half, sixteenth = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D // 16)
        q_tile = tl.load(q + place * (BLOCK_D // 2) + half[None, :], mask=inside[:, None], other=0)
        qs_tile = tl.load(q_scale + place * (BLOCK_D // 16) + sixteenth[None, :], mask=inside[:, None], other=0.0)
        k += kv * Sk * (BLOCK_D // 2)
        k_scale += kv * Sk * (BLOCK_D // 16)
        v += kv * BLOCK_D * (width // 2)
        v_scale += kv * BLOCK_D * (width // 16)
    else:
        q_tile = tl.load(q + place * BLOCK_D + offs_d[None, :], mask=inside[:, None], other=0.0)
        qs_tile = None
        k += kv * Sk * BLOCK_D
        v += kv * BLOCK_D * width
    scale = tl.load(score_scale + bh)
    if bias is not None:
        bias += (bh * tl.cdiv(S, 128) + start // 128) * Sk
    if mask is not None:
        mask += b * stride_mb + h * stride_mh + tl.where(inside, row, 0).to(tl.int64) * stride_mq  # [BM]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    full = tl.minimum(start + 1, Sk) // BLOCK_N if CAUSAL else Sk // BLOCK_N
    stop = tl.minimum(start + BLOCK_M, Sk) if CAUSAL else Sk
    for i in range(full):
        acc, l_i, m_i = _tile(
            q_tile, qs_tile, k, k_scale, v, v_scale, scale, bias, mask, stride_mk, width, i * BLOCK_N, BLOCK_N, row,
            acc, l_i, m_i,
            BLOCK_M, BLOCK_D, BLOCK_N, False, False, NATIVE, ASM,
        )  # fmt: skip
    for i in range(full, tl.cdiv(stop, BLOCK_N)):
        acc, l_i, m_i = _tile(
            q_tile, qs_tile, k, k_scale, v, v_scale, scale, bias, mask, stride_mk, width, i * BLOCK_N,
            Sk - i * BLOCK_N, row, acc, l_i, m_i,
            BLOCK_M, BLOCK_D, BLOCK_N, True, CAUSAL, NATIVE, ASM,
        )  # fmt: skip
    acc = acc / tl.where(l_i == 0, 1.0, l_i)[:, None]
    if failed is not None:
        note_failure(failed, bh, acc, 1.3 * 2688.0)  # e2m1 rounds P by 25 % at most
    acc = acc * tl.load(v_head_scale + kv)
    out_ptr = out + b * stride_ob + h * stride_oh + row.to(tl.int64)[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=inside[:, None] & (offs_d < D)[None, :])
    if lse is not None:
        total = m_i + tl.log2(tl.where(l_i == 0, 1.0, l_i)) - LOG2_FP4_RANGE
        tl.store(lse + bh * S + row, total * LN_2, mask=inside)
