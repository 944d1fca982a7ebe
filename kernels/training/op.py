"""Attention for training in INT8 (SageBwd): the forward. The backward is in backward.py.

    s_ij  = q_scale_i k_scale_j (q8_i . k8_j)                          base 2: q_scale holds sm_scale log2 e
    out_i = v_scale sum_J 2^(m_iJ - m_i) / 127 sum_(j in J) round(127 2^(s_ij - m_iJ)) v8_j / sum_j 2^(s_ij - m_i) + v_mean

A tile J of keys has its own maximum m_iJ in each row, so that P uses all of INT8 in every tile ("per token"), and each
tile's product is added in fp32. K and V are quantised without their means: K's drops out of the softmax, V's is added
to the output; the backward may drop both, because rows of dS sum to zero. Q and K have a scale a token, V a channel.
Any head dim up to 128; GQA; causal; packed sequences of different lengths. Deterministic. sm80 and newer; Hopper has a
kernel of its own, with P V in bf16 (forward_hopper.py).
"""

import torch

from ..common import target
from ..common.checks import check_inputs as check_shapes
from ..common.numbers import softmax_scale
from ..quantize.tokens import DTYPES
from . import backward, forward
from .inputs import SavedForBackward
from .reference import training_attention_backward_reference, training_attention_reference

PRODUCTS = ("int8", "bf16")


def training_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    sm_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SavedForBackward]:
    """INT8 attention of every query to every key, and what `training_attention_backward` needs.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        k, v: [B, Hkv, Sk, D], q's dtype; Hkv divides H, and query head h sees key head h // (H / Hkv).
        is_causal: query i sees keys 0 .. i (as in PyTorch, also where S != Sk).
        sm_scale: softmax scale; default D ** -0.5.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], for B = 1: sequence n is tokens cu_seqlens[n] ... cu_seqlens[n + 1] - 1,
            from 0 to S (Sk), and sees itself only. None: each row of the batch is a sequence.

    Returns:
        out [B, H, S, D], q's dtype and memory layout, zeros where a sequence has no key; and what is to be kept.

    Raises:
        ValueError: shapes disagree, sm_scale is not positive, or cu_seqlens do not fit.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: head dim above 128, or autograd expects a gradient (`svg.training_attention` gives one).

    Source: arXiv 2505.11594, section 4 (8-bit attention for training), algorithm 2; arXiv 2603.02170.
    """
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    check_inputs(q, k, v, sm_scale, cu_seqlens_q, cu_seqlens_k)
    target.refuse_gradients("svg.kernels.training_attention", q, k, v)
    op = forward.launch if target.use_triton(q) else training_attention_reference
    return op(q, k, v, is_causal=is_causal, sm_scale=sm_scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> None:
    """Raises where arguments of `training_attention` do not fit together; same arguments."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}: convert it")
        if x.dim() == 4 and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last dim, got strides {x.stride()}: call .contiguous()")
    check_shapes(q, k, v, sm_scale)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together, got one: pass it twice for both")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return
    for name, starts, tokens in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[2]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[2]),
    ):
        if starts.dtype != torch.int32 or starts.dim() != 1 or starts.shape != cu_seqlens_q.shape or len(starts) < 2:
            raise ValueError(
                f"{name} must be int32 [N + 1], the same N for both, got {starts.dtype} {tuple(starts.shape)}: convert it"
            )
        if starts.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {starts.device}: move it")
        if q.shape[0] != 1:
            raise ValueError(f"{name} needs a batch of 1, got {q.shape[0]}: pack the sequences along the tokens")
        # On CUDA the look would cost a wait for the device.
        if not starts.is_cuda and (starts[0] != 0 or starts[-1] != tokens or bool((starts.diff() < 0).any())):
            raise ValueError(f"{name} must rise from 0 to {tokens}, got {starts.tolist()}: count every token once")


def training_attention_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    kept: SavedForBackward,
    *,
    key_tokens: int,
    is_causal: bool = False,
    sm_scale: float,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    products: str = "int8",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `training_attention` by q, k and v.

    Args:
        grad: [B, H, S, D], of the output.
        out: [B, H, S, D], the output.
        kept: what the forward kept.
        key_tokens: Sk.
        is_causal, sm_scale, cu_seqlens_q, cu_seqlens_k: the forward's.
        products: "int8", or "bf16" for dS K, dS^T Q and P^T grad, which is more accurate; the same on Hopper.

    Returns:
        dq [B, H, S, D], dk and dv [B, Hkv, Sk, D], out's dtype; heads and tokens lie in memory as those of out do.

    Source: arXiv 2505.11594, algorithm 3; arXiv 2603.02170.
    """
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    op = backward.launch if target.use_triton(out) else training_attention_backward_reference
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return op(
        grad, out, kept, key_tokens=key_tokens, is_causal=is_causal, sm_scale=sm_scale, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, products=products,
    )  # fmt: skip
