"""Dense quantised attention in plain torch: the specification of both kernels."""

import torch

from ..common.rounded import note_failure_reference, rounded_attention
from ..common.smoothing import mean_scores, unsmoothed_lse_reference
from ..quantize.channels import fp8_values, quantize_channels_reference, statistics_reference
from ..quantize.precision import PRECISIONS, pv_dtype
from ..quantize.tokens import dequantize_tokens, quantize_tokens_reference


def quantised_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    precision: str = "int8-fp8",
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
    sm_scale: float | None = None,
    smooth_q: bool | None = None,
    smooth_k: bool = True,
    smooth_v: bool = False,
    q_groups: str = "token",
    k_groups: str = "block",
    failed: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Specification of `quantised_attention` in plain torch; same arguments and result.

    P is rounded relative to a row's largest score, where the kernel rounds relative to the largest so far.
    """
    kind = PRECISIONS[precision]
    D = q.shape[-1]
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    smooth_q = kind.bits == 4 if smooth_q is None else smooth_q
    stats = statistics_reference(k, v)
    mean = stats.k_mean if smooth_k else None
    rows = quantize_tokens_reference(q, side="q", groups=q_groups, bits=kind.bits, own_mean=smooth_q)
    keys = quantize_tokens_reference(k, side="k", groups=k_groups, bits=kind.bits, mean=mean)
    bias = mean_scores(rows.mean, k, mean) if smooth_q else None
    if kind.fp8:
        channels = quantize_channels_reference(v, stats, smooth=smooth_v, limit=kind.v_range)
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
    if smooth_v:
        mean_out = channels.mean[:, :, None, :D].repeat_interleave(heads, 1)
        out = torch.where(lse[..., None] == -torch.inf, 0.0, out + mean_out)
    note_failure_reference(failed, out)
    out = torch.empty_like(q).copy_(out)
    return (out, unsmoothed_lse_reference(lse, q, mean, sm_scale)) if return_lse else out
