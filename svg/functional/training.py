"""`svg.training_attention`: 8-bit attention with gradients, in the place of PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from svg.kernels import training_attention as kernel
from svg.kernels import training_attention_backward
from svg.kernels.common import target
from svg.kernels.quantize.tokens import padded_head_dim
from svg.kernels.training.inputs import SavedForBackward, empty_gradients
from svg.kernels.training.op import PRODUCTS
from svg.kernels.training.sequences import packed_tokens

from ._arguments import check_choice, check_ends, check_flags, check_tensors, in_layout, sdpa_arguments


def training_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    gradients: str = "int8",
    tensor_layout: str = "HND",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """8-bit attention, forward and backward (SageBwd), with the arguments of PyTorch's scaled_dot_product_attention first.

    Of all products only dP = grad V^T runs in 16 bits; on Hopper only Q K^T runs in 8, because there the others take longer
    to round than to multiply. The same inputs give the same bits, gradients included. On a CPU the reference
    runs, in plain PyTorch, and warns that it does. `torch.compile` keeps whole graphs; under autocast inputs are
    converted as PyTorch's attention converts them. The backward of the backward is not there.

    Args:
        q: fp16, bf16 or fp32 [B, H, S, D] ([B, S, H, D] where tensor_layout is "NHD"), D at most 128.
        k, v: [B, Hkv, Sk, D] ([B, Sk, Hkv, D]), q's dtype.
        attn_mask: must be None: masks other than is_causal are not supported.
        dropout_p: must be 0.
        is_causal: query i sees keys 0 .. i, also where S != Sk, as in PyTorch.
        scale: softmax scale; default D ** -0.5.
        enable_gqa: allow fewer key heads than query heads; Hkv must divide H.
        gradients: "int8", or "bf16" for the products that sum up the gradients (dS K, dS^T Q, P^T grad): two thirds of the
            error, and on some GPUs faster, because P and dS need no scales. Hopper takes "bf16" for both.
        tensor_layout: "HND" or "NHD": whether heads or tokens come first.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], for B = 1: sequences of different lengths lie one after the other along
            the tokens, and sequence n is tokens cu_seqlens[n] ... cu_seqlens[n + 1] - 1. The first is 0, the last S (Sk).

    Returns:
        out, q's shape, dtype and layout; zeros where a sequence has no key.

    Raises:
        ValueError: shapes disagree, or a value is unknown.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: a mask, dropout, nested tensors or a head dim above 128 is asked for.

    Source: arXiv 2505.11594, section 4; arXiv 2603.02170.

    Example:
        svg.training_attention(q, k, v, is_causal=True).sum().backward()
    """
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask is not supported by 8-bit training attention: use is_causal or cu_seqlens_q and cu_seqlens_k, or "
            "call torch.nn.functional.scaled_dot_product_attention"
        )
    check_tensors({"q": q, "k": k, "v": v}, "pass their values with cu_seqlens_q, cu_seqlens_k")
    check_flags(is_causal=is_causal)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    q, k, v, scale = sdpa_arguments(
        q, k, v, tensor_layout=tensor_layout, dropout_p=dropout_p, enable_gqa=enable_gqa, scale=scale,
        no_dropout="8-bit training attention has no dropout",
        instead_of_nested="pass their values with cu_seqlens_q, cu_seqlens_k",
    )  # fmt: skip
    check_choice("gradients", gradients, tuple(PRODUCTS))
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends is not None:
            check_ends(name, ends, q.device)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together, got one of them: give both or none")
    out = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, scale, gradients)[0]
    return in_layout(out, tensor_layout)


@torch.library.custom_op("svg::training_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    is_causal: bool,
    scale: float,
    products: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not target.use_triton(q):
        warnings.warn(
            f"svg.training_attention computes its plain PyTorch reference on {q.device}: the same quantisation, but "
            "not faster",
            stacklevel=2,
        )
    out, kept = kernel(q, k, v, is_causal=is_causal, sm_scale=scale, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    return out, kept.queries, kept.q_scale, kept.keys, kept.k_scale, kept.values, kept.v_mean, kept.lse


@_forward.register_fake
def _(q, k, v, starts_q, starts_k, is_causal, scale, products):
    block_d = padded_head_dim(q.shape[3])
    sizes = [
        (x.shape[1], packed_tokens(x.shape[0], x.shape[2], None if starts is None else starts.shape[0] - 1))
        for x, starts in ((q, starts_q), (k, starts_k))
    ]
    (H, T), (Hkv, Tk) = sizes
    return (
        torch.empty_like(q),
        q.new_empty(H, T, block_d, dtype=torch.int8),
        q.new_empty(H, T, dtype=torch.float32),
        q.new_empty(Hkv, Tk, block_d, dtype=torch.int8),
        q.new_empty(Hkv, Tk, dtype=torch.float32),
        q.new_empty(Hkv, Tk, block_d, dtype=torch.bfloat16),
        q.new_empty(k.shape[0], Hkv, k.shape[3], dtype=torch.float32),
        q.new_empty(H, T, dtype=torch.float32),
    )


@torch.library.custom_op("svg::training_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    queries: Tensor,
    q_scale: Tensor,
    keys: Tensor,
    k_scale: Tensor,
    values: Tensor,
    v_mean: Tensor,
    lse: Tensor,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    key_tokens: int,
    is_causal: bool,
    scale: float,
    products: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = SavedForBackward(queries, q_scale, keys, k_scale, values, v_mean, lse)
    return training_attention_backward(
        grad, out, kept, key_tokens=key_tokens, is_causal=is_causal, sm_scale=scale, cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k, products=products,
    )  # fmt: skip


@_backward.register_fake
def _(grad, out, queries, q_scale, keys, k_scale, values, v_mean, lse, starts_q, starts_k, key_tokens, *options):
    return empty_gradients(out, keys.shape[0], key_tokens)


def _keep(ctx, inputs, output):
    _, k, _, starts_q, starts_k, *options = inputs
    ctx.save_for_backward(*output, starts_q, starts_k)
    ctx.options = k.shape[2], *options
    ctx.set_materialize_grads(False)  # only the first output has a gradient, the others are kept for the backward


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
