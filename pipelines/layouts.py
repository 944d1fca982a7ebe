"""Token layouts from a transformer's own arguments; the token count is never factored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from svg.engine.layout import TokenLayout


def patches(config: Any) -> tuple[int, int, int]:
    """Latents in a token along (time, height, width), as configs spell it: three numbers, or one, and one for time."""
    size = config.patch_size
    return tuple(size) if isinstance(size, (list, tuple)) else (config.get("patch_size_t") or 1, size, size)


def grid(shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens along (time, height, width) of latents of that many frames, rows and columns."""
    frames, rows, columns = (size // step for size, step in zip(shape, patch, strict=True))
    return frames, rows, columns


def channels_first(text: str = "none") -> Callable[[Any, Mapping[str, Any]], TokenLayout]:
    """Layout of latents [B, C, F, H, W].

    Args:
        text: where text, or whatever shares the sequence with the video, is: "none", "first" or "last". Where it is in
            the sequence, processors of `svg.pipelines.stock` count it in each call.
    """
    return _FromShape(text, frames=2, height=3, width=4)


def frames_first(text: str = "none") -> Callable[[Any, Mapping[str, Any]], TokenLayout]:
    """Layout of latents [B, F, C, H, W]; `text` as in `channels_first`."""
    return _FromShape(text, frames=1, height=3, width=4)


def channels_last(text: str = "none") -> Callable[[Any, Mapping[str, Any]], TokenLayout]:
    """Layout of latents [B, F, H, W, C]; `text` as in `channels_first`."""
    return _FromShape(text, frames=1, height=2, width=3)


class _FromShape:
    def __init__(self, text: str, **dims: int):
        self.text = text
        self.dims = tuple(dims.values())

    def __call__(self, config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
        latents: Tensor = inputs["hidden_states"]
        sizes = grid(tuple(latents.shape[dim] for dim in self.dims), patches(config))
        return TokenLayout(*sizes, *((0, "none") if self.text == "none" else (1, self.text)))
