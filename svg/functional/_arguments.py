"""The arguments that every drop-in shares with PyTorch's scaled_dot_product_attention, checked once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..documents import shown

LAYOUTS = ("HND", "NHD")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
        ValueError: the layout is unknown, shapes or devices disagree, or the scale is not finite.
        TypeError: an argument has another type or dtype.
        NotImplementedError: dropout, or tensors that are nested, sparse, quantised or without data.
    """
    if not isinstance(tensor_layout, str) or tensor_layout not in LAYOUTS:
        raise ValueError(f"tensor_layout must be one of {', '.join(LAYOUTS)}, got {tensor_layout!r}")
    check_number("dropout_p", dropout_p)
    if dropout_p:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p}: {no_dropout}")
    check_flags(enable_gqa=enable_gqa)
    check_tensors({"q": q, "k": k, "v": v}, instead_of_nested)
    check_family(q, k, v, "[B, H, S, D]" if tensor_layout == "HND" else "[B, S, H, D]")
    check_scale(scale)
    q, k, v = (in_layout(x, tensor_layout) for x in (q, k, v))
    check_heads(q.shape[1], k.shape[1], enable_gqa)
    return q, k, v, q.shape[-1] ** -0.5 if scale is None else scale


def check_tensors(
    tensors: dict[str, Any], instead_of_nested: str = "", dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """Raise unless every argument is a dense tensor with data, of one of some dtypes.

    Args:
        tensors: by the argument's name.
        instead_of_nested: what takes packed sequences, for the error.
        dtypes: those that are taken.
    """
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}: torch.as_tensor makes one")
        if x.is_nested:
            raise NotImplementedError(
                f"{name} must not be nested: nested tensors are not supported, {instead_of_nested}"
            )
        if x.layout != torch.strided:
            raise NotImplementedError(f"{name} must be a dense tensor, got the layout {x.layout}: call .to_dense()")
        if x.is_quantized:
            raise NotImplementedError(f"{name} must not be quantised, got {x.dtype}: call .dequantize()")
        if x.is_meta:
            raise NotImplementedError(f"{name} must hold data, got a tensor on the meta device: move it to a real one")
        if x.dtype not in dtypes:
            shown = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be one of {shown}, got {x.dtype}: convert it with .to()")


def check_family(q: Tensor, k: Tensor, v: Tensor, shape: str) -> None:
    """Raise unless q, k and v go together: ranks, dtypes, devices, batches, tokens and head dims."""
    rank = shape.count(",") + 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{name} must be {shape}, got the shape {tuple(x.shape)}: reshape it")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got the shape {tuple(x.shape)}: leave the call out")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must share one dtype, got {q.dtype} and {x.dtype} ({name}): convert one with .to()"
            )
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}: move it with .to()")
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name} must have q's head dim {q.shape[-1]}, got {x.shape[-1]}: pad the shorter ones")
        if rank == 4 and x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch of {q.shape[0]}, got {x.shape[0]}: expand it")
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")


def check_scale(scale: Any) -> None:
    """Raise unless a softmax scale is None or a finite number."""
    if scale is not None:
        check_number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}: leave it out for D ** -0.5")


def check_number(name: str, value: Any) -> None:
    """Raise unless an argument is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_shown(value)}")


def check_flags(**flags: Any) -> None:
    """Raise unless arguments are booleans."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false, got {_shown(value)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless an argument is one of its choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {_shown(value)}")


def check_ends(name: str, ends: Any, device: torch.device) -> None:
    """Raise unless an argument is int [n + 1], n >= 1, on a device."""
    check_tensors({name: ends}, dtypes=(torch.int32, torch.int64))
    if ends.dim() != 1 or len(ends) < 2:
        raise ValueError(f"{name} must be [n + 1] for n >= 1 sequences, got the shape {tuple(ends.shape)}")
    if ends.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {ends.device}: move it with .to()")


def _shown(value: Any) -> str:
    return f"a tensor of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)


def in_layout(x: Tensor, tensor_layout: str) -> Tensor:
    """A tensor between heads first and a layout: there and back again."""
    return x.transpose(1, 2) if tensor_layout == "NHD" else x


def check_heads(heads: int, key_heads: int, enable_gqa: bool) -> None:
    """Raise where keys have other heads than queries and nobody asked for that."""
    if key_heads < 1 or (enable_gqa and heads % key_heads):
        raise ValueError(f"k must have a divisor of q's {heads} heads, got {key_heads}")
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"k must have q's {heads} heads, got {key_heads}: pass enable_gqa=True to share them")
