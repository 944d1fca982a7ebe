"""Dense quantised attention in plain torch: the specification of both kernels."""

from typing import Any

import torch

from ..common.numbers import softmax_scale
from ..common.rounded import note_failure_reference, rounded_attention
from ..common.smoothing import mean_scores, unsmoothed_lse_reference
from ..quantize.channels import fp8_values, quantize_channels_reference, statistics_reference
from ..quantize.precision import Quantisation, as_quantisation, pv_dtype, refuse_keywords
from ..quantize.tokens import dequantize_tokens, quantize_tokens_reference


def quantised_attention_reference(
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
    """Specification of `quantised_attention` in plain torch; same arguments and result.

    P is rounded relative to a row's largest score, where the kernel rounds relative to the largest so far.
    """
    how = as_quantisation(how, fields)
    refuse_keywords("quantised_attention_reference", fields)
    kind = how.kind
    D = q.shape[-1]
    sm_scale = softmax_scale(sm_scale, D)
    stats = statistics_reference(k, v)
    mean = stats.k_mean if how.smooth_k else None
    rows = quantize_tokens_reference(q, side="q", groups=how.q_groups, bits=kind.bits, own_mean=how.smooths_q)
    keys = quantize_tokens_reference(k, side="k", groups=how.k_groups, bits=kind.bits, mean=mean)
    bias = None if rows.mean is None else mean_scores(rows.mean, k, mean)
    if kind.fp8:
        channels = quantize_channels_reference(v, stats, smooth=how.smooth_v, limit=kind.v_range)
        values = fp8_values(channels, v.shape[2], D)
    else:
        values = v.to(pv_dtype(v)).float()
    heads = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(heads, 1) for x in (dequantize_tokens(keys, D), values))
    out, lse = rounded_attention(
        dequantize_tokens(rows, D), keys, values, sm_scale, kind.p_dtype(v), is_causal, bias, mask, kind.acc16
    )
    if kind.fp8:
        out = out * channels.scale[:, :, None, :D].repeat_interleave(heads, 1)
    if how.smooth_v:
        assert channels.mean is not None
        mean_out = channels.mean[:, :, None, :D].repeat_interleave(heads, 1)
        out = torch.where(lse[..., None] == -torch.inf, 0.0, out + mean_out)
    note_failure_reference(failed, out)
    out = torch.empty_like(q).copy_(out)
    return (out, unsmoothed_lse_reference(lse, q, mean, sm_scale)) if return_lse else out
