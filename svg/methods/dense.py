"""Dense attention on the best scaled-dot-product backend present."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg.kernels.common import target

from ..config.base import DENSE_BACKENDS
from ..engine.layout import TokenLayout

_NAMED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def dense_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Attention of every query to every key.

    Args:
        q, k, v: float [B, H, S, D].
        key_mask: bool [B, S], True where a key is seen, or None for all.
        backend: "auto" (the first that can serve of cuDNN, flash, efficient, math; flash before cuDNN ahead of
            Hopper; PyTorch's own choice on a CPU), or one of them by name.

    Returns:
        [B, H, S, D] in q's dtype.

    Raises:
        ValueError: backend is unknown, or named and unable to run these inputs here.

    Example:
        out = svg.dense_attention(q, k, v, backend="cudnn")
    """
    if backend not in DENSE_BACKENDS:
        raise ValueError(f"dense_backend must be one of {', '.join(DENSE_BACKENDS)}, got {backend!r}")
    mask = None if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, S]
    if backend == "auto" and not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    chosen = _priority(q.device) if backend == "auto" else [_NAMED[backend]]
    try:
        with sdpa_kernel(chosen, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    except RuntimeError as error:
        if not _is_refusal(error):
            raise
        raise ValueError(
            f"dense_backend {backend!r} cannot run q {tuple(q.shape)} {q.dtype} on {q.device}"
            f"{'' if mask is None else ' with a key mask'}; use 'auto' or another of {', '.join(DENSE_BACKENDS)}"
        ) from error


def key_mask(layout: TokenLayout, text_mask: Tensor | None) -> Tensor | None:
    """Keys that dense attention sees: all but padding text.

    Args:
        layout: where video and text are.
        text_mask: bool [B, text_tokens], True for prompt tokens, or None for all.

    Returns:
        bool [B, S], or None for all.
    """
    if text_mask is None:
        return None
    mask = text_mask.new_ones(text_mask.shape[0], layout.total_tokens)  # [B, S]
    mask[:, layout.text_slice] = text_mask
    return mask


def _priority(device: torch.device) -> list[SDPBackend]:
    first = ("cudnn", "flash") if target.arch(device) >= 90 else ("flash", "cudnn")
    return [_NAMED[name] for name in (*first, "efficient", "math")]


def _is_refusal(error: RuntimeError) -> bool:
    text = str(error)
    return "No available kernel" in text or "No viable backend" in text
