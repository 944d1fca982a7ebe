"""The file of a precision for every layer that `svg adapt` writes: JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...documents import MEBIBYTE, read_json, shown
from .config import LAYER_PRECISIONS

FORMAT, VERSION = "svg-layers", 1

Choices = Mapping[str, Mapping[int, str]]  # transformer -> layer -> precision


def layers_content(choices: Mapping[str, Mapping[int, Mapping[str, Any]]], about: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds.

    Args:
        choices: {"precision", "cosine" of each candidate} by transformer and layer.
        about: what they were measured with; JSON values.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "about": dict(about),
        "transformers": {
            name: {str(layer): dict(choice) for layer, choice in sorted(layers.items())}
            for name, layers in choices.items()
        },
    }


def read_choices(path: str) -> Choices:
    """Read the precisions of a file.

    Args:
        path: the file.

    Returns:
        Precision by transformer and layer.

    Raises:
        ValueError: no such file, or not one of precisions, or of another version.
    """
    if not os.path.isfile(path):
        raise ValueError(f"layers must be a file, got {path}, which is not there; make one with `svg adapt`")
    return _read(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Choices:
    try:
        content = read_json(path, 16 * MEBIBYTE)
    except ValueError as error:
        raise ValueError(f"layers must be a file of `svg adapt`: {error}; make it again") from error
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{path} must hold precisions ({FORMAT}, version {VERSION}), got {found[0]}, version {found[1]}"
        )
    try:
        choices = {
            name: {int(layer): choice["precision"] for layer, choice in layers.items()}
            for name, layers in content["transformers"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold a precision for every layer, as `svg adapt` writes it: make it again"
        ) from error
    unknown = [one for layers in choices.values() for one in layers.values() if one not in LAYER_PRECISIONS]
    if unknown:
        raise ValueError(f"{path}: precision must be one of {', '.join(LAYER_PRECISIONS)}, got {shown(unknown[0])}")
    return choices


def choice(path: str, transformer: str, layer: int) -> str:
    """The precision a file has for a layer.

    Args:
        path: the file.
        transformer: name of the transformer in its pipeline.
        layer: index of the layer, from 0.

    Raises:
        ValueError: the file has no such layer, and what `read_choices` raises.
    """
    choices = read_choices(path).get(transformer, {})
    if layer not in choices:
        raise ValueError(
            f"layers must have {transformer} layer {layer}, got {path} without it: record all layers and run `svg adapt`"
        )
    return choices[layer]
