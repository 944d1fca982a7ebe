"""Dense attention with INT8 or INT4-range Q K^T, and P V in FP8 or 16 bits (SageAttention2).

    s_ij = sm_scale (q_scale_i k_scale_j (q8_i . k8_j) + q_mean . (k_j - k_mean))      the last term with smooth_q only
    out  = v_scale sum_j e4m3(448 p_ij) v8_j / (448 sum_j p_ij) + v_mean,   p_ij = exp(s_ij - m_i), its sum in fp32

| precision | Q K^T                                              | P V                                               |
|-----------|----------------------------------------------------|---------------------------------------------------|
| int8-fp8  | INT8                                               | FP8 e4m3, V per channel; compute capability 8.9   |
| int8-fp16 | INT8                                               | fp16 for an fp16 v, else bf16: the safe mode      |
| int4-...  | INT4 range in INT8, an exact emulation for accuracy work, not faster; smooth_q by default              |

The FP8 tensor core sums with 13 fraction bits: each tile's P V starts from zero and is added in fp32 (two levels).
The output is clamped to what V's quantised range allows: a weighted mean cannot leave it, though rounding of P could.
e4m3 has 3 mantissa bits: where attention averages V's of mean zero, P and V each cost 3e-4 of cosine similarity,
whatever the scales; where V's channels have means, as in trained models, errors average out and .9999 is passed.
sm80 and newer, head dims up to 128, padded to 64 or 128 with zeros (exact). fp16, bf16, fp32 inputs.
"""

from dataclasses import dataclass

import torch

from . import target
from .quantised_tile import Launch, attend_tile, finish_rows, key_source, value_source
from .quantize import (
    BLOCK,
    GROUPS,
    QuantizedTokens,
    dequantize_tokens,
    padded_head_dim,
    quantize_tokens,
    quantize_tokens_reference,
)
from .quantize_values import (
    QuantizedChannels,
    dequantize_channels,
    quantize_channels,
    quantize_channels_reference,
    statistics,
    statistics_reference,
)
from .target import tl, triton

PRECISIONS = ("int8-fp8", "int8-fp16", "int4-fp8", "int4-fp16")
LOG2_E = 1.4426950408889634
SCORE_CHUNK = 1 << 24


def quantised_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    precision: str = "int8-fp8",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_q: bool | None = None,
    smooth_k: bool = True,
    smooth_v: bool = False,
    q_groups: str = "token",
    k_groups: str = "block",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to every key, in 8 bits.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        k, v: [B, Hkv, Sk, D], q's dtype; Hkv divides H, and query head h sees key head h // (H / Hkv).
        precision: "int8-fp8", "int8-fp16", "int4-fp8" or "int4-fp16": bits of Q K^T, then of P V.
        is_causal: query i sees keys 0 .. i (as in PyTorch, also where S != Sk).
        sm_scale: softmax scale; default D ** -0.5.
        smooth_q: take the mean of every 128 queries off and add its scores back; None: with INT4 only. Costs 4 bytes
            for each (128 queries, key) and head.
        smooth_k: take K's mean over all tokens off.
        smooth_v: take V's channel means off and add them to the output (FP8 only).
        q_groups, k_groups: which tokens share a scale, see `quantize_tokens`. Single queries cost nothing extra, keys
            in groups other than "block" one multiplication a score.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, H, S, D], q's dtype and memory layout; with return_lse also lse fp32 [B, H, S], natural log, of the
        scores before smoothing.

    Raises:
        ValueError: shapes disagree, an unknown precision or groups, smooth_v without FP8, sm_scale is not positive.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: head dim above 128; on the Triton path, a GPU without FP8 or a gradient would be needed.

    Source: arXiv 2411.10958, section 3.
    """
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    smooth_q = precision.startswith("int4") if smooth_q is None else smooth_q
    _check(q, k, v, precision, sm_scale, smooth_v, q_groups, k_groups)
    op = _launch if target.use_triton(q) else quantised_attention_reference
    return op(
        q, k, v, precision=precision, is_causal=is_causal, sm_scale=sm_scale, smooth_q=smooth_q, smooth_k=smooth_k,
        smooth_v=smooth_v, q_groups=q_groups, k_groups=k_groups, return_lse=return_lse,
    )  # fmt: skip


def quantised_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    precision: str = "int8-fp8",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_q: bool | None = None,
    smooth_k: bool = True,
    smooth_v: bool = False,
    q_groups: str = "token",
    k_groups: str = "block",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Specification of `quantised_attention` in plain torch; same arguments and result.

    P is rounded relative to a row's largest score, where the kernel rounds relative to the largest so far.
    """
    bits, fp8 = parse_precision(precision)
    D = q.shape[-1]
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    smooth_q = bits == 4 if smooth_q is None else smooth_q
    stats = statistics_reference(k, v)
    mean = stats.k_mean if smooth_k else None
    rows = quantize_tokens_reference(q, side="q", groups=q_groups, bits=bits, own_mean=smooth_q)
    keys = quantize_tokens_reference(k, side="k", groups=k_groups, bits=bits, mean=mean)
    bias = _mean_scores(rows.mean, k, mean) if smooth_q else None
    if fp8:
        channels = quantize_channels_reference(v, stats, smooth=smooth_v)
        values = dequantize_channels(channels, v.shape[2], D)
    else:
        values = v.to(pv_dtype(v)).float()
    p_dtype = torch.float8_e4m3fn if fp8 else pv_dtype(v)
    heads = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(heads, 1) for x in (dequantize_tokens(keys, D), values))
    out, lse = rounded_attention(dequantize_tokens(rows, D), keys, values, sm_scale, p_dtype, is_causal, bias)
    if fp8 and smooth_v:
        out = out + channels.mean[:, :, None, :D].repeat_interleave(heads, 1)
    out = torch.empty_like(q).copy_(out)
    return (out, unsmoothed_lse(lse, q, mean, sm_scale)) if return_lse else out


def rounded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    p_dtype: torch.dtype,
    is_causal: bool = False,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention whose P is rounded as the quantised kernels round it, on numbers that are already quantised.

    Args:
        q: fp32 [B, H, S, D].
        k, v: fp32 [B, H, Sk, D].
        scale: softmax scale.
        p_dtype: what P is rounded to: float8_e4m3fn (448 P then), fp16 or bf16.
        is_causal: query i sees keys 0 .. i.
        bias: fp32 [B, H, ceil(S / 128), Sk], scores to add before scaling, or None.

    Returns:
        out fp32 [B, H, S, D], lse fp32 [B, H, S].
    """
    S, Sk = q.shape[2], k.shape[2]
    chunk = max(1, SCORE_CHUNK // (q.shape[0] * q.shape[1] * Sk))
    largest = 448 if p_dtype == torch.float8_e4m3fn else 1
    limit = v.abs().amax(2, keepdim=True)  # [B, H, 1, D]
    outs, lses = [], []
    for first in range(0, S, chunk):
        scores = q[:, :, first : first + chunk] @ k.transpose(2, 3)
        place = torch.arange(first, min(first + chunk, S), device=q.device)
        if bias is not None:
            scores += bias[:, :, place // BLOCK]
        scores *= scale
        if is_causal:
            scores.masked_fill_(torch.arange(Sk, device=q.device) > place[:, None], -torch.inf)
        lses.append(torch.logsumexp(scores, -1))
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        rounded = (largest * p).to(p_dtype).float() / largest
        outs.append((rounded @ v / p.sum(-1, keepdim=True)).clamp(-limit, limit))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def pv_dtype(v: torch.Tensor) -> torch.dtype:
    """Type of P and V in the 16-bit P V of a precision such as "int8-fp16".

    Args:
        v: the values.

    Returns:
        fp16 for fp16, bf16 for bf16 and fp32, whose range fp16 does not have.
    """
    return torch.float16 if v.dtype == torch.float16 else torch.bfloat16


def parse_precision(precision: str) -> tuple[int, bool]:
    """Bits of Q K^T, and whether P V is FP8.

    Args:
        precision: one of PRECISIONS.
    """
    qk, pv = precision.split("-")
    return int(qk.removeprefix("int")), pv == "fp8"


def _mean_scores(q_means, k, k_mean):
    """q_mean . (k - k_mean): fp32 [B, H, ceil(S / 128), Sk]."""
    keys = k.float() if k_mean is None else k.float() - k_mean[:, :, None]
    shared = q_means.unflatten(1, (k.shape[1], -1)) @ keys[:, :, None].transpose(3, 4)
    return shared.flatten(1, 2)


def unsmoothed_lse(lse: torch.Tensor, q: torch.Tensor, k_mean: torch.Tensor | None, sm_scale: float) -> torch.Tensor:
    """Log-sum-exp of the scores with K's mean, which adds q . k_mean to every score of a query.

    Args:
        lse: fp32 [B, H, S], without it.
        q: [B, H, S, D].
        k_mean: fp32 [B, Hkv, D], or None where it was not taken off.
        sm_scale: softmax scale.
    """
    if k_mean is None:
        return lse
    shift = q.unflatten(1, (k_mean.shape[1], -1)).float() @ k_mean[:, :, None, :, None]
    return lse + sm_scale * shift.squeeze(-1).flatten(1, 2)


def _check(q, k, v, precision, sm_scale, smooth_v, q_groups, k_groups):
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    for name, groups in (("q_groups", q_groups), ("k_groups", k_groups)):
        if groups not in GROUPS["q"]:
            raise ValueError(f"{name} must be one of {', '.join(GROUPS['q'])}, got {groups!r}")
    if smooth_v and not precision.endswith("fp8"):
        raise ValueError(f"smooth_v needs FP8 values, got precision {precision!r}: leave it off")
    check_inputs(q, k, v, sm_scale)


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float) -> None:
    """Raises where the tensors of a quantised attention do not fit together.

    Args:
        q: [B, H, S, D].
        k, v: [B, Hkv, Sk, D].
        sm_scale: softmax scale.

    Raises:
        ValueError: shapes disagree, a tensor has no tokens, or sm_scale is not positive.
        TypeError: dtypes are mixed.
        NotImplementedError: head dim above 128.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            "q must be [B, H, S, D] and k, v [B, Hkv, Sk, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: reshape them"
        )
    if 0 in q.shape or 0 in k.shape or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k's heads must divide q's and no dimension may be empty, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: convert them")
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be positive, got {sm_scale}: scale q instead")
    padded_head_dim(q.shape[-1])


# arch -> (P V in FP8, padded head dim) -> tile sizes. Not measured: chosen by ahead-of-time compile (no spills, shared
# memory).
LAUNCH = {
    80: {(False, 64): Launch(128, 64, 4, 3), (False, 128): Launch(128, 64, 8, 3)},
    89: {(False, 64): Launch(64, 64, 4, 3), (False, 128): Launch(64, 64, 4, 2),
         (True, 64): Launch(128, 64, 4, 3), (True, 128): Launch(128, 64, 8, 3)},
    90: {(False, 64): Launch(128, 64, 8, 3), (False, 128): Launch(128, 64, 8, 3),
         (True, 64): Launch(128, 128, 8, 3, tma=True), (True, 128): Launch(128, 128, 8, 3, tma=True)},
    100: {(False, 64): Launch(128, 64, 4, 3), (False, 128): Launch(128, 64, 8, 3),
          (True, 64): Launch(128, 128, 8, 3, tma=True), (True, 128): Launch(128, 64, 8, 3, tma=True)},
    120: {(False, 64): Launch(64, 64, 4, 3), (False, 128): Launch(64, 64, 4, 2),
          (True, 64): Launch(128, 64, 4, 3, tma=True), (True, 128): Launch(64, 64, 4, 3, tma=True)},
}  # fmt: skip


def _launch(q, k, v, *, is_causal, sm_scale, return_lse, **options):
    target.refuse_gradients("quantised_attention", q, k, v)
    inputs = quantize_inputs(q, k, v, sm_scale=sm_scale, **options)
    out, lse = attend_quantized(inputs, torch.empty_like(q), is_causal, sm_scale, return_lse)
    return (out, unsmoothed_lse(lse, q, inputs.k_mean, sm_scale)) if return_lse else out


@dataclass(frozen=True)
class QuantizedInputs:
    """What the kernel reads; `values` is quantised V, or V in 16 bits."""

    rows: QuantizedTokens
    keys: QuantizedTokens
    channels: QuantizedChannels | None
    values: torch.Tensor
    k_mean: torch.Tensor | None
    bias: torch.Tensor | None


def quantize_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    precision: str,
    sm_scale: float,
    smooth_q: bool,
    smooth_k: bool,
    smooth_v: bool,
    q_groups: str,
    k_groups: str,
) -> QuantizedInputs:
    """Everything that `quantised_attention` does before its attention; same arguments."""
    bits, fp8 = parse_precision(precision)
    if fp8:
        target.require_fp8(q.device)
    stats = statistics(k, v) if smooth_k or fp8 else None
    mean = stats.k_mean if smooth_k else None
    rows = quantize_tokens(q, side="q", groups=q_groups, bits=bits, own_mean=smooth_q)
    channels = quantize_channels(v, stats, smooth=smooth_v) if fp8 else None
    return QuantizedInputs(
        rows=rows,
        keys=quantize_tokens(k, side="k", groups=k_groups, bits=bits, mean=mean),
        channels=channels,
        values=channels.values if fp8 else v.to(pv_dtype(v)),
        k_mean=mean,
        bias=_mean_scores(rows.mean, k, mean) * (sm_scale * LOG2_E) if smooth_q else None,
    )


def attend_quantized(
    inputs: QuantizedInputs, out: torch.Tensor, is_causal: bool, sm_scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of `quantised_attention`, on inputs that are quantised; its lse is the smoothed scores'.

    Args:
        inputs: from `quantize_inputs`.
        out: [B, H, S, D], written.
        is_causal, sm_scale, return_lse: as in `quantised_attention`.

    Returns:
        out, and lse fp32 [B, H, S] or None.
    """
    B, H, S, D = out.shape
    rows, keys, channels, values = inputs.rows, inputs.keys, inputs.channels, inputs.values
    kv_heads, Sk, block_d = keys.values.shape[1:]
    row = target.launch_row(LAUNCH, out.device)[channels is not None, block_d]
    lse = torch.empty(B, H, S, dtype=torch.float32, device=out.device) if return_lse else None
    with target.on_device(out):
        _quantised_attention_kernel[(triton.cdiv(S, row.block_m), B * H)](
            rows.values, rows.scale, key_source(keys.values, row), keys.scale, value_source(values, row),
            channels.scale if channels else None, channels.mean if channels else None, inputs.bias, out, lse,
            sm_scale * LOG2_E, H, H // kv_heads, S, Sk, *values.stride()[:3], *out.stride()[:3],
            D=D, BLOCK_D=block_d, BLOCK_M=row.block_m, BLOCK_N=row.block_n, CAUSAL=is_causal,
            K_PER_TOKEN=keys.scale.shape[2] == Sk and Sk > 1, FP8=channels is not None,
            TWO_LEVEL=row.two_level, MAGIC=row.magic, TMA=row.tma,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["S", "Sk"])
def _quantised_attention_kernel(
    q, q_scale, k, k_scale, v, v_scale, v_mean, bias, out, lse, scale_log2, H, HEADS_PER_KEY, S, Sk,
    stride_vb, stride_vh, stride_v, stride_ob, stride_oh, stride_os,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    K_PER_TOKEN: tl.constexpr, FP8: tl.constexpr, TWO_LEVEL: tl.constexpr, MAGIC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    kv = bh // HEADS_PER_KEY
    # The longest rows first, so that the last programs are short.
    start = (tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    inside = row < S
    q_tile = tl.load(q + (bh * S + row)[:, None] * BLOCK_D + offs_d[None, :], mask=inside[:, None], other=0)
    row_scale = tl.load(q_scale + bh * S + row, mask=inside, other=1.0) * scale_log2  # [BM]
    k_scale += kv * (Sk if K_PER_TOKEN else tl.cdiv(Sk, 128))
    k_row, v_row = (kv * Sk).to(tl.int32), (kv * BLOCK_D).to(tl.int32)
    if not TMA:
        k += kv * Sk * BLOCK_D
    if not (TMA and FP8):
        v += b * stride_vb + (h // HEADS_PER_KEY) * stride_vh
    if bias is not None:
        bias += (bh * tl.cdiv(S, 128) + start // 128) * Sk
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    full = tl.minimum(start + 1, Sk) // BLOCK_N if CAUSAL else Sk // BLOCK_N
    stop = tl.minimum(start + BLOCK_M, Sk) if CAUSAL else Sk
    for i in range(full):
        acc, l_i, m_i = attend_tile(
            q_tile, row_scale, k, k_scale, v, bias, k_row, v_row, stride_v, i * BLOCK_N, BLOCK_N, row, acc, l_i, m_i,
            D, BLOCK_D, BLOCK_N, False, False, K_PER_TOKEN, FP8, TWO_LEVEL, MAGIC, TMA,
        )  # fmt: skip
    for i in range(full, tl.cdiv(stop, BLOCK_N)):
        acc, l_i, m_i = attend_tile(
            q_tile, row_scale, k, k_scale, v, bias, k_row, v_row, stride_v, i * BLOCK_N, Sk - i * BLOCK_N, row,
            acc, l_i, m_i,
            D, BLOCK_D, BLOCK_N, True, CAUSAL, K_PER_TOKEN, FP8, TWO_LEVEL, MAGIC, TMA,
        )  # fmt: skip
    acc = finish_rows(acc, l_i, v_scale, v_mean, kv * BLOCK_D, BLOCK_D, FP8)
    out_ptr = out + b * stride_ob + h * stride_oh + row.to(tl.int64)[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=inside[:, None] & (offs_d < D)[None, :])
    if lse is not None:
        total = m_i + tl.log2(l_i) - (8.807354922057604 if FP8 else 0.0)
        tl.store(lse + bh * S + row, total * 0.6931471805599453, mask=inside)  # ln 2
