"""Dense attention with INT8 or INT4-range Q K^T, and P V in FP8 or 16 bits (SageAttention2 and 2++).

    s_ij = sm_scale (q_scale_i k_scale_j (q8_i . k8_j) + q_mean . (k_j - k_mean))      the last term with smooth_q only
    out  = v_scale sum_j e4m3(448 p_ij) v8_j / (448 sum_j p_ij) + v_mean,   p_ij = exp(s_ij - m_i), its sum in fp32

| precision      | Q K^T | P V                                                                                        |
|----------------|-------|--------------------------------------------------------------------------------------------|
| int8-fp8       | INT8  | FP8 e4m3, V per channel; compute capability 8.9                                            |
| int8-fp8-acc16 | INT8  | the same, V up to 2.25, products summed in fp16 over 64 keys, then in fp32 (2++)           |
| int8-fp16      | INT8  | fp16 for an fp16 v, else bf16: the safe mode                                               |
| int4-...       | INT4 range in INT8, an exact emulation for accuracy work, not faster; smooth_q by default          |

The FP8 tensor core sums with 13 fraction bits: each tile's P V starts from zero and is added in fp32 (two levels).
Sums in fp16 run at twice the rate on sm89 and sm120; sm90 and sm100 have the instruction too (QGMMA and UTCQMMA with
16-bit sums), at the rate of the other: there it saves registers at best. On a CPU fp16 sums are emulated exactly.
The output is clamped to what V's quantised range allows: a weighted mean cannot leave it, though rounding of P could.
e4m3 has 3 mantissa bits: where attention averages V's of mean zero, P and V each cost 3e-4 of cosine similarity,
whatever the scales; where V's channels have means, as in trained models, errors average out and 0.9999 is passed.
sm80 and newer, head dims up to 128, padded to 64 or 128 with zeros (exact). fp16, bf16, fp32 inputs.
"""

from typing import Any

import torch

from ..common import target
from ..common.checks import check_inputs
from ..common.numbers import softmax_scale
from ..quantize.precision import Quantisation, as_quantisation, find_precision, refuse_keywords
from ..quantize.tokens import GROUPS
from .reference import quantised_attention_reference
from .triton import launch


def quantised_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    how: Quantisation | None = None,
    *,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
    failed: torch.Tensor | None = None,
    return_lse: bool = False,
    **fields: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to every key, in 8 bits.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        k, v: [B, Hkv, Sk, D], q's dtype; Hkv divides H, and query head h sees key head h // (H / Hkv).
        how: how it is quantised; or its fields as keywords: precision, smooth_q, smooth_k, smooth_v, q_groups, k_groups.
        is_causal: query i sees keys 0 .. i (as in PyTorch, also where S != Sk).
        mask: bool [B or 1, H or 1, S or 1, Sk], True where a query sees a key; hidden keys must be finite, and count in
            the means and scales.
        sm_scale: softmax scale; default D ** -0.5.
        failed: int32 [B, H], set to 1 for a head whose sums are not finite or left the range of the quantised values.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, H, S, D], q's dtype and memory layout; with return_lse also lse fp32 [B, H, S], natural log, of the
        scores before smoothing. A query that sees no key gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, an unknown precision or groups, smooth_v without FP8, sm_scale is not positive.
        TypeError: dtypes are mixed or not supported, or the mask is not bool.
        NotImplementedError: head dim above 128; on the Triton path, a GPU without FP8 or a gradient would be needed.

    Source: arXiv 2411.10958, section 3; arXiv 2505.21136, section 3 (sums in fp16).
    """
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    how = as_quantisation(how, fields)
    refuse_keywords("quantised_attention", fields)
    find_precision(how.precision, smooth_v=how.smooth_v)
    how.refuse("quantised_attention", "pv_threshold")
    for name, side, groups in (("q_groups", "q", how.q_groups), ("k_groups", "k", how.k_groups)):
        if groups not in GROUPS[side]:
            raise ValueError(f"{name} must be one of {', '.join(GROUPS[side])}, got {groups!r}")
    check_inputs(q, k, v, sm_scale, mask)
    target.refuse_gradients("quantised_attention", q, k, v)
    op = launch if target.use_triton(q) else quantised_attention_reference
    return op(q, k, v, how, is_causal=is_causal, mask=mask, sm_scale=sm_scale, failed=failed, return_lse=return_lse)
