"""Which settings `accelerate` runs with when it is given none, a word, or a name."""

from __future__ import annotations

from typing import Any

import torch

from svg.config import METHODS, MethodConfig, NearConfig, config_from_dict
from svg.documents import shown
from svg.kernels.common import target
from svg.methods.near.levels import LEVELS, level_settings

# Below this many tokens a GPU is done with dense attention before sparse attention has planned: whole calls of svg2 at
# density 0.25 against cuDNN on an H100 take 3.2 times as long at 7,200 tokens and 0.88 times at 18,000 (`svg bench scale`).
DENSE_BELOW = 16_384
TOO_SHORT = 1024  # on a CPU, where nothing is faster: means and text alone would be most of the map
FEW_STEPS_NOISE = 0.9  # in runs of few steps: docs/lab/near.md
_SUFFIXES = tuple(f":{method}" for method in METHODS)


def resolve(config: MethodConfig | dict | str | None) -> MethodConfig:
    """Turn what `accelerate` takes into settings.

    Args:
        config: settings, their dict, a word of LEVELS, a method's name, a preset's ("name" or "name:method"), or None,
            which is "balanced". A word keeps sequences dense that a GPU is faster with dense.

    Returns:
        The settings.

    Raises:
        ValueError: a name that is none of these; the message lists all of them.
        TypeError: something else.
    """
    if isinstance(config, MethodConfig):
        return config
    if isinstance(config, dict):
        return config_from_dict(config)
    if config is None or (isinstance(config, str) and config in LEVELS):
        return _level(config or "balanced")
    if not isinstance(config, str):
        raise TypeError(
            f"config must be a MethodConfig, a dict, a word ({', '.join(LEVELS)}), a method's or a preset's name, got "
            f"{type(config).__name__}"
        )
    if config in METHODS:
        return METHODS[config]()
    return _preset(config)


def _level(level: str) -> MethodConfig:
    short = DENSE_BELOW if torch.cuda.is_available() else TOO_SHORT
    return NearConfig(**settings_of(level, "auto"), min_tokens=short, few_steps_noise=FEW_STEPS_NOISE)


def settings_of(level: str, device: str) -> dict[str, Any]:
    """What a word changes on a device.

    Args:
        level: one of LEVELS.
        device: "auto" (the current GPU, if there is one), "cpu", "cuda" or "cuda:<index>".

    Returns:
        Fields of NearConfig.
    """
    gpu = level == "fast" and device != "cpu" and torch.cuda.is_available()  # nothing else asks, and so starts, CUDA
    return level_settings(level, gpu and target.has_fp8(torch.device("cuda" if device == "auto" else device)))


def _preset(text: str) -> MethodConfig:
    from svg.configs import load_preset, preset_names

    name, _, method = text.rpartition(":") if text.endswith(_SUFFIXES) else (text, ":", None)
    if not name.endswith((".yaml", ".yml")) and name not in preset_names():
        raise ValueError(
            f"config must be a word ({', '.join(LEVELS)}), a method ({', '.join(METHODS)}), or a preset "
            f"({', '.join(preset_names())}, or a YAML file), got {shown(text)}"
        )
    preset = load_preset(name)
    return preset.config(method or ("near" if "near" in preset.methods else "svg2"))
