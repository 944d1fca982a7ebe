"""`svg.attention`: 8-bit attention in the place of `torch.nn.functional.scaled_dot_product_attention`, for any model."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from svg.kernels import quantised_attention, target

LAYOUTS = ("HND", "NHD")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    precision: str = "auto",
    tensor_layout: str = "HND",
    smooth_q: bool | None = None,
    smooth_k: bool = True,
    smooth_v: bool = False,
    q_groups: str = "token",
    k_groups: str = "block",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in 8 bits (SageAttention2), with the arguments of PyTorch's scaled_dot_product_attention first.

    On a CPU the reference runs, in plain PyTorch, and warns that it does. `torch.compile` keeps whole graphs.

    Args:
        q: fp16, bf16 or fp32 [B, H, S, D] ([B, S, H, D] where tensor_layout is "NHD"), D at most 128.
        k, v: [B, Hkv, Sk, D] ([B, Sk, Hkv, D]), q's dtype.
        attn_mask: must be None: masks other than is_causal are not supported.
        dropout_p: must be 0.
        is_causal: query i sees keys 0 .. i, also where S != Sk, as in PyTorch.
        scale: softmax scale; default D ** -0.5.
        enable_gqa: allow fewer key heads than query heads; Hkv must divide H.
        precision: bits of Q K^T, then of P V: "int8-fp8", "int8-fp16", "int4-fp8", "int4-fp16" (INT4 is an emulation,
            for accuracy work), or "auto": int8-fp8 where the GPU has FP8, else int8-fp16.
        tensor_layout: "HND" or "NHD": whether heads or tokens come first.
        smooth_q, smooth_k, smooth_v, q_groups, k_groups: see `svg.kernels.quantised_attention`.
        return_lse: also return the log-sum-exp, fp32 [B, H, S], natural log.

    Returns:
        out, q's shape, dtype and layout; with return_lse also lse.

    Raises:
        ValueError: shapes disagree, or a value is unknown.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: a mask, dropout, nested (variable-length) tensors, a head dim above 128 or a gradient is
            asked for, or FP8 on a GPU without it.

    Source: arXiv 2411.10958.
    """
    if tensor_layout not in LAYOUTS:
        raise ValueError(f"tensor_layout must be one of {', '.join(LAYOUTS)}, got {tensor_layout!r}")
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask is not supported by quantised attention: use is_causal, drop padding tokens, or call "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    if dropout_p:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p}: quantised attention is for inference")
    if q.is_nested or k.is_nested or v.is_nested:
        raise NotImplementedError(
            "nested tensors are not supported: call svg.attention once a sequence, or pad nothing"
        )
    target.refuse_gradients("svg.attention", q, k, v)
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise ValueError(f"k must have q's {q.shape[1]} heads, got {k.shape[1]}: pass enable_gqa=True to share them")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    smooth_q = precision.startswith("int4") if smooth_q is None else smooth_q
    out, lse = _attention(
        q, k, v, precision, is_causal, scale, smooth_q, smooth_k, smooth_v, q_groups, k_groups, return_lse
    )
    out = out.transpose(1, 2) if tensor_layout == "NHD" else out
    return (out, lse) if return_lse else out


@torch.library.custom_op("svg::quantised_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: str,
    is_causal: bool,
    scale: float,
    smooth_q: bool,
    smooth_k: bool,
    smooth_v: bool,
    q_groups: str,
    k_groups: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    if not target.use_triton(q):
        warnings.warn(
            f"svg.attention computes its plain PyTorch reference on {q.device}: the same quantisation, but not faster",
            stacklevel=2,
        )
    if precision == "auto":
        precision = "int8-fp8" if target.has_fp8(q.device) else "int8-fp16"
    result = quantised_attention(
        q, k, v, precision=precision, is_causal=is_causal, sm_scale=scale, smooth_q=smooth_q, smooth_k=smooth_k,
        smooth_v=smooth_v, q_groups=q_groups, k_groups=k_groups, return_lse=return_lse,
    )  # fmt: skip
    return result if return_lse else (result, q.new_empty(0, dtype=torch.float32))


@_attention.register_fake
def _(q, k, v, precision, is_causal, scale, smooth_q, smooth_k, smooth_v, q_groups, k_groups, return_lse):
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse
