"""Dense attention on the best scaled-dot-product backend present."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg.kernels.common import target

from ..config.base import DENSE_BACKENDS
from ..documents import shown
from ..engine.layout import TokenLayout

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
        ValueError: backend is unknown, or named and unable to run these inputs here; or shapes or devices disagree.
        TypeError: an argument is no tensor, or dtypes are mixed.

    Example:
        out = svg.dense_attention(q, k, v, backend="cudnn")
    """
    if not isinstance(backend, str) or backend not in DENSE_BACKENDS:
        raise ValueError(f"dense_backend must be one of {', '.join(DENSE_BACKENDS)}, got {shown(backend)}")
    _check(q, k, v, key_mask)
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


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided or x.is_quantized or x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be a dense tensor of 16 to 64 bits, got {x.dtype}, {x.layout} on {x.device}")
        if x.dim() != 4 or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be [B, H, S, D] of q's dtype and device, {q.dtype} on {q.device}, got "
                f"{tuple(x.shape)} {x.dtype} on {x.device}"
            )
    if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (q.shape[0], q.shape[1], q.shape[3]):
        raise ValueError(
            f"k and v must be [B, H, Sk, D] with q's B, H and D, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != (k.shape[0], k.shape[2]) or mask.device != q.device:
        raise ValueError(f"key_mask must be [B, S] on {q.device}, got {tuple(mask.shape)} on {mask.device}")


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
