"""Quantised attention in the place of `torch.nn.functional.scaled_dot_product_attention`, for any model."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from svg.kernels import fp4_attention, quantised_attention, varlen_attention
from svg.kernels.common import target
from svg.kernels.quantize.precision import PRECISIONS, default_precision
from svg.kernels.quantize.tokens import GROUPS

from ._arguments import (
    check_choice,
    check_ends,
    check_family,
    check_flags,
    check_heads,
    check_scale,
    check_tensors,
    in_layout,
    sdpa_arguments,
)

NVFP4 = "nvfp4"


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
    """Attention in 8 or 4 bits (SageAttention), with the arguments of PyTorch's scaled_dot_product_attention first.

    On a CPU the reference runs, in plain PyTorch, and warns that it does. `torch.compile` keeps whole graphs.

    Args:
        q: fp16, bf16 or fp32 [B, H, S, D] ([B, S, H, D] where tensor_layout is "NHD"), D at most 128.
        k, v: [B, Hkv, Sk, D] ([B, Sk, Hkv, D]), q's dtype.
        attn_mask: bool, broadcastable to [B, H, S, Sk] in either layout, True where a query sees a key; padding keys are
            [B, 1, 1, Sk]. Hidden keys must be finite. A query that sees no key gives zeros.
        dropout_p: must be 0.
        is_causal: query i sees keys 0 .. i, also where S != Sk, as in PyTorch; together with a mask, both hide.
        scale: softmax scale; default D ** -0.5.
        enable_gqa: allow fewer key heads than query heads; Hkv must divide H.
        precision: bits of Q K^T, then of P V: "int8-fp8", "int8-fp8-acc16" (SageAttention2++), "int8-fp16", the same with
            "int4" (an exact emulation, for accuracy work), "nvfp4" (SageAttention3; an emulation before Blackwell), or
            "auto": int8-fp8 where the GPU has FP8, else int8-fp16.
        tensor_layout: "HND" or "NHD": whether heads or tokens come first.
        smooth_q, smooth_k, smooth_v, q_groups, k_groups: see `svg.kernels.quantised_attention`; with "nvfp4" smooth_q is
            on where it is None, and the other three must be left as they are.
        return_lse: also return the log-sum-exp, fp32 [B, H, S], natural log.

    Returns:
        out, q's shape, dtype and layout; with return_lse also lse.

    Raises:
        ValueError: shapes disagree, or a value is unknown.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: a mask of numbers, dropout, nested tensors, a head dim above 128 or a gradient is asked for,
            or FP8 on a GPU without it.

    Source: arXiv 2411.10958, 2505.21136, 2505.11594.

    Example:
        out = svg.attention(q, k, v)                        # where scaled_dot_product_attention(q, k, v) was
    """
    check_tensors({"q": q, "k": k, "v": v}, "pack the sequences for svg.attention_varlen")
    target.refuse_gradients("svg.attention", q, k, v)
    q, k, v, scale = sdpa_arguments(
        q, k, v, tensor_layout=tensor_layout, dropout_p=dropout_p, enable_gqa=enable_gqa, scale=scale,
        no_dropout="quantised attention is for inference",
        instead_of_nested="pack the sequences for svg.attention_varlen",
    )  # fmt: skip
    check_choice("precision", precision, (*PRECISIONS, NVFP4, "auto"))
    check_choice("q_groups", q_groups, tuple(GROUPS["q"]))
    check_choice("k_groups", k_groups, tuple(GROUPS["k"]))
    flags = {"is_causal": is_causal, "smooth_k": smooth_k, "smooth_v": smooth_v, "return_lse": return_lse}
    check_flags(**flags, smooth_q=smooth_q is not None and smooth_q)
    if precision == NVFP4:
        if smooth_v or (q_groups, k_groups) != ("token", "block"):
            raise ValueError("smooth_v, q_groups and k_groups have no meaning in nvfp4: leave them out")
        smooth_q = smooth_q is not False
    else:
        smooth_q = precision.startswith("int4") if smooth_q is None else smooth_q
    out, lse = _attention(
        q, k, v, _broadcastable(attn_mask, q, k), precision, is_causal, scale, smooth_q, smooth_k, smooth_v,
        q_groups, k_groups, return_lse,
    )  # fmt: skip
    out = in_layout(out, tensor_layout)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    precision: str = "auto",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in 8 bits within each of n sequences that are packed one after the other.

    No longest length is asked for and nothing waits for the device. `torch.compile` keeps whole graphs.

    Args:
        q: fp16, bf16 or fp32 [T, H, D], D at most 128.
        k, v: [Tk, Hkv, D], q's dtype.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [n + 1], 0 and where each sequence ends; the last are T and Tk.
        is_causal: query i of a sequence sees its keys 0 .. i.
        scale: softmax scale; default D ** -0.5.
        enable_gqa: allow fewer key heads than query heads; Hkv must divide H.
        precision: "int8-fp8", "int8-fp8-acc16", "int8-fp16" or "auto", as in `attention`.
        smooth_k: take each sequence's mean off K.
        smooth_v: take V's channel means off (FP8 only).
        return_lse: also return the log-sum-exp, fp32 [H, T], natural log.

    Returns:
        out [T, H, D] in q's dtype; with return_lse also lse.

    Raises:
        ValueError: shapes disagree, a value is unknown, or (on a CPU) the ends do not rise from 0 to the tokens.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: a head dim above 128 or a gradient is asked for, or FP8 on a GPU without it.

    Source: arXiv 2411.10958.

    Example:
        ends = torch.tensor([0, 700, 1200], device="cuda", dtype=torch.int32)  # two sequences, of 700 and 500 tokens
        out = svg.attention_varlen(q, k, v, ends, ends)     # q, k, v [1200, H, D]
    """
    check_tensors({"q": q, "k": k, "v": v}, "pack their values")
    target.refuse_gradients("svg.attention_varlen", q, k, v)
    check_family(q, k, v, "[T, H, D]")
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_ends(name, ends, q.device)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k must be of as many sequences as cu_seqlens_q, {len(cu_seqlens_q) - 1}, got {len(cu_seqlens_k) - 1}"
        )
    check_choice("precision", precision, (*PRECISIONS, "auto"))
    check_flags(is_causal=is_causal, enable_gqa=enable_gqa, smooth_k=smooth_k, smooth_v=smooth_v, return_lse=return_lse)
    check_scale(scale)
    check_heads(q.shape[1], k.shape[1], enable_gqa)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, precision, is_causal, scale, smooth_k, smooth_v, return_lse
    )
    return (out, lse) if return_lse else out


def _broadcastable(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask as [B or 1, H or 1, S or 1, Sk]."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise NotImplementedError(
            f"attn_mask must be bool, True where a query sees a key, got {mask.dtype}: numbers added to scores are not "
            "supported, call torch.nn.functional.scaled_dot_product_attention"
        )
    check_tensors({"attn_mask": mask}, dtypes=(torch.bool,))
    if mask.device != q.device:
        raise ValueError(f"attn_mask must be on q's device {q.device}, got {mask.device}: move it with .to()")
    full = (*q.shape[:3], k.shape[2])
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full)):
        raise ValueError(
            f"attn_mask must be broadcastable to [B, H, S, Sk] = {full}, got {tuple(mask.shape)}: reshape it"
        )
    return mask.reshape(shape).expand(*shape[:3], full[3])


def _chosen(precision: str, x: Tensor) -> str:
    if precision not in (*PRECISIONS, NVFP4, "auto"):
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS)}, {NVFP4}, got {precision!r}")
    if not target.use_triton(x):
        warnings.warn(
            f"svg.attention computes its plain PyTorch reference on {x.device}: the same quantisation, but not faster",
            stacklevel=3,
        )
    return default_precision(x.device) if precision == "auto" else precision


@torch.library.custom_op("svg::quantised_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
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
    precision = _chosen(precision, q)
    options = {"is_causal": is_causal, "mask": mask, "sm_scale": scale, "smooth_q": smooth_q, "smooth_k": smooth_k}
    if precision == NVFP4:
        result = fp4_attention(q, k, v, **options, return_lse=return_lse)
    else:
        result = quantised_attention(
            q, k, v, **options, precision=precision, smooth_v=smooth_v, q_groups=q_groups, k_groups=k_groups,
            return_lse=return_lse,
        )  # fmt: skip
    return result if isinstance(result, tuple) else (result, q.new_empty(0, dtype=torch.float32))


@_attention.register_fake
def _(q, k, v, mask, precision, is_causal, scale, smooth_q, smooth_k, smooth_v, q_groups, k_groups, return_lse):
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse


@torch.library.custom_op("svg::quantised_attention_varlen", mutates_args=())
def _attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    precision: str,
    is_causal: bool,
    scale: float,
    smooth_k: bool,
    smooth_v: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    precision = _chosen(precision, q)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    result = varlen_attention(
        q, k, v, q_ends, k_ends, precision=precision, is_causal=is_causal, sm_scale=scale, smooth_k=smooth_k,
        smooth_v=smooth_v, return_lse=return_lse,
    )  # fmt: skip
    out, lse = result if isinstance(result, tuple) else (result, q.new_empty(0, dtype=torch.float32))
    return out.transpose(0, 1), lse


@_attention_varlen.register_fake
def _(q, k, v, q_ends, k_ends, precision, is_causal, scale, smooth_k, smooth_v, return_lse):
    lse = q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse
