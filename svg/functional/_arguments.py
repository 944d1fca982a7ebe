"""The arguments that every drop-in shares with PyTorch's scaled_dot_product_attention, checked once."""

from __future__ import annotations

from torch import Tensor

LAYOUTS = ("HND", "NHD")


def sdpa_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tensor_layout: str,
    dropout_p: float,
    enable_gqa: bool,
    scale: float | None,
    no_dropout: str,
    instead_of_nested: str,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Check what does not depend on the kernel, and bring heads first.

    Args:
        q: [B, H, S, D], or [B, S, H, D] where tensor_layout is "NHD".
        k, v: the same, of Hkv heads.
        tensor_layout: "HND" or "NHD".
        dropout_p, enable_gqa, scale: as in PyTorch.
        no_dropout: why there is none, for the error.
        instead_of_nested: what takes packed sequences, for the error.

    Returns:
        q, k, v with heads first, and the softmax scale.

    Raises:
        ValueError: the layout is unknown, or k has other heads than q.
        NotImplementedError: dropout or nested tensors.
    """
    if tensor_layout not in LAYOUTS:
        raise ValueError(f"tensor_layout must be one of {', '.join(LAYOUTS)}, got {tensor_layout!r}")
    if dropout_p:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p}: {no_dropout}")
    if q.is_nested or k.is_nested or v.is_nested:
        raise NotImplementedError(f"nested tensors are not supported: {instead_of_nested}")
    q, k, v = (in_layout(x, tensor_layout) for x in (q, k, v))
    check_heads(q.shape[1], k.shape[1], enable_gqa)
    return q, k, v, q.shape[-1] ** -0.5 if scale is None else scale


def in_layout(x: Tensor, tensor_layout: str) -> Tensor:
    """A tensor between heads first and a layout: there and back again."""
    return x.transpose(1, 2) if tensor_layout == "NHD" else x


def check_heads(heads: int, key_heads: int, enable_gqa: bool) -> None:
    """Raise where keys have other heads than queries and nobody asked for that."""
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"k must have q's {heads} heads, got {key_heads}: pass enable_gqa=True to share them")
