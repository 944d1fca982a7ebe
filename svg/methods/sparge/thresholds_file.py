"""The file of SpargeAttn's thresholds, one set a head, that `svg sparge-tune` writes: safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...documents import parse_json, read_header

FORMAT, VERSION = "svg-sparge", "1"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds of the heads of one layer; a head that computes everything has simthresh -1 and cdf 1.

    Args:
        simthresh: fp32 [H], least self-similarity, not included.
        cdf: fp32 [H], most predicted mass of the kept blocks.
        pv_threshold: fp32 [H], powers of two below the running maximum at which P V is skipped; infinity: never.
    """

    simthresh: Tensor
    cdf: Tensor
    pv_threshold: Tensor


_THRESHOLDS = tuple(field.name for field in fields(Thresholds))
Layers = Mapping[tuple[str, int], Thresholds]


def save_thresholds(path: str | Path, layers: Layers, about: Mapping[str, Any]) -> None:
    """Write a file; the caller gives a path that may be half-written.

    Args:
        path: the file.
        layers: thresholds by (transformer, layer).
        about: what they were found with; "order" and "attention_sink" must be there. JSON values.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {
        f"{name}.{layer}.{key}": x.cpu() for (name, layer), one in layers.items() for key, x in vars(one).items()
    }
    try:
        save_file(tensors, path, {"format": FORMAT, "version": VERSION, "about": json.dumps(about)})
    except SafetensorError as error:
        raise OSError(f"thresholds could not be written ({error}): make room and run the same command again") from error


def read_about(path: str | Path) -> dict[str, Any]:
    """What a file's thresholds were found with.

    Args:
        path: the file.

    Returns:
        `about` of `save_thresholds`.

    Raises:
        ValueError: no such file, or not one of thresholds, or of another version.
    """
    metadata = read_header(path, "thresholds", (FORMAT, VERSION), "make one with `svg sparge-tune`")
    about = parse_json(metadata.get("about", "null"))
    if (
        not isinstance(about, dict)
        or not isinstance(about.get("layers", {}), dict)
        or not {"order", "attention_sink"} <= set(about)
    ):
        raise ValueError(
            f"{path} does not say what its thresholds were found with: make it again with `svg sparge-tune`"
        )
    return about


def read_layers(path: str | Path) -> dict[tuple[str, int], Thresholds]:
    """All thresholds of a file.

    Args:
        path: a file that `read_about` accepts.

    Returns:
        Thresholds by (transformer, layer), on the CPU.

    Raises:
        ValueError: a tensor is not as `save_thresholds` writes it.
    """
    layers: dict[tuple[str, int], dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            transformer, layer, key = name.rsplit(".", 2) if name.count(".") > 1 else (name, "", "")
            tensor = file.get_tensor(name)
            key = key if layer.isdecimal() else ""
            if key not in _THRESHOLDS or tensor.dtype != torch.float32 or tensor.dim() != 1:
                raise ValueError(f"{path} must hold fp32 [H] of {', '.join(_THRESHOLDS)}, got {name}: make it again")
            layers.setdefault((transformer, int(layer)), {})[key] = tensor
    if any(len(one) < len(_THRESHOLDS) or len({len(x) for x in one.values()}) > 1 for one in layers.values()):
        raise ValueError(f"{path} must hold {', '.join(_THRESHOLDS)} of every head in every layer: make it again")
    return {key: Thresholds(**layers[key]) for key in sorted(layers)}


def thresholds_of(
    path: str | Path, transformer: str, layer: int, heads: int, order: str, attention_sink: bool, device: torch.device
) -> Thresholds:
    """One layer's thresholds, for a run with the settings that they were found with.

    Args:
        path: the file.
        transformer: the transformer's name in its pipeline.
        layer: index of the layer.
        heads: H.
        order, attention_sink: the run's settings.
        device: where the tensors are to be.

    Returns:
        The thresholds.

    Raises:
        ValueError: no such file or layer, another number of heads, or other settings.
    """
    (found,) = check_thresholds(path, transformer, [layer], heads, order, attention_sink)
    return Thresholds(**{key: x.to(device) for key, x in vars(found).items()})


def check_thresholds(
    path: str | Path, transformer: str, wanted: Sequence[int], heads: int, order: str, attention_sink: bool
) -> list[Thresholds]:
    """Some layers' thresholds, for a run with the settings that they were found with.

    Args:
        path: the file.
        transformer: the transformer's name in its pipeline.
        wanted: indices of layers.
        heads: H.
        order, attention_sink: the run's settings.

    Returns:
        The thresholds of each layer, on the CPU.

    Raises:
        ValueError: no such file or layer, another number of heads, or other settings.
    """
    about = read_about(path)
    for name, value in (("order", order), ("attention_sink", attention_sink)):
        if about[name] != value:
            raise ValueError(
                f"{name} must be {about[name]!r}, with which thresholds in {path} were made, got {value!r}"
            )
    layers = read_layers(path)
    for layer in wanted:
        if (transformer, layer) not in layers:
            known = ", ".join(f"{name} {index}" for name, index in layers)
            raise ValueError(
                f"thresholds must have layer {layer} of {transformer}, got {path} with {known}: record that layer and go "
                "on with `svg sparge-tune`, or keep it dense with warmup_layers"
            )
        found = layers[transformer, layer].cdf
        if found.shape != (heads,):
            raise ValueError(f"thresholds must be of {heads} heads, got {found.numel()} in {path}: of another model?")
    return [layers[transformer, layer] for layer in wanted]
