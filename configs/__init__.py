"""Presets: one YAML file a model and resolution, with generation defaults and the settings of every sparse method."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from svg.config import METHODS, MethodConfig, config_from_dict
from svg.documents import shown

from .reader import read_yaml

_FOLDER = Path(__file__).parent
_SPARSE = tuple(method for method in METHODS if method != "dense")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a video of this preset is generated with.

    Args:
        steps: denoising steps, >= 1.
        height: pixels, >= 1.
        width: pixels, >= 1.
        frames: video frames, >= 1.
        guidance: classifier-free guidance scale, >= 0.
        fps: frames per second of the written file, >= 1.
        flow_shift: shift of the flow-matching scheduler, > 0, or None to leave the scheduler as it is.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value has the wrong type.
    """

    steps: int
    height: int
    width: int
    frames: int
    guidance: float
    fps: int
    flow_shift: float | None = None

    def __post_init__(self):
        for name in ("steps", "height", "width", "frames", "fps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {shown(value)}")
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name in ("guidance", "flow_shift"):
            value = getattr(self, name)
            if name == "flow_shift" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {shown(value)}")
        if self.guidance < 0:
            raise ValueError(f"guidance must be >= 0, got {self.guidance}")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"flow_shift must be > 0, got {self.flow_shift}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model at a resolution with tested settings.

    Args:
        name: the preset's name.
        model: hub id, directory or name of a bundled model.
        source: where the settings come from.
        generation: generation defaults.
        methods: config by method name; dense and the quantised dense ones are always there.
    """

    name: str
    model: str
    source: str
    generation: Generation
    methods: dict[str, MethodConfig]

    def config(self, method: str) -> MethodConfig:
        """Settings of a method.

        Raises:
            ValueError: the preset has no such method.
        """
        if method not in self.methods:
            raise ValueError(f"method must be one of {', '.join(self.methods)}, got {shown(method)}")
        return self.methods[method]


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_preset(name: str | Path) -> Preset:
    """Read a preset.

    Args:
        name: name of a preset that ships with the package, or path of a YAML file of the same form.

    Returns:
        The preset, validated.

    Raises:
        ValueError: no such preset, or the file has an unknown key, a missing key or an impossible value.
        TypeError: a value has the wrong type.

    Example:
        svg.load_preset("wan2.1-t2v-720p").config("svg2").top_p
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not os.path.isfile(path):
        raise ValueError(
            f"preset must be one of {', '.join(preset_names())}, or the path of a YAML file, got {shown(str(name))}"
        )
    try:
        return _preset(path.stem, read_yaml(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path.name}: {error}") from error


def _preset(name: str, content: Any) -> Preset:
    _keys("the file", content, required=("model", "source", "generation"), optional=_SPARSE)
    generation = content["generation"]
    _keys("generation", generation, [f.name for f in fields(Generation) if f.name != "flow_shift"], ("flow_shift",))
    for key in ("model", "source"):
        if not isinstance(content[key], str):
            raise TypeError(f"{key} must be text, got {shown(content[key])}")
    methods: dict[str, MethodConfig] = {method: config() for method, config in METHODS.items() if config.for_any_model}
    for method in _SPARSE:
        if method in content:
            methods[method] = _method(method, content[method])
    methods = {method: methods[method] for method in METHODS if method in methods}
    return Preset(
        name=name,
        model=content["model"],
        source=" ".join(content["source"].split()),
        generation=Generation(**generation),
        methods=methods,
    )


def _method(method: str, settings: Any) -> MethodConfig:
    _keys(method, settings, (), [field.name for field in fields(METHODS[method])])
    try:
        return config_from_dict({**settings, "method": method})
    except (ValueError, TypeError) as error:
        raise type(error)(f"{method}: {error}") from error


def _keys(where: str, mapping: Any, required, optional) -> None:
    if not isinstance(mapping, dict):
        raise TypeError(f"{where} must be a mapping of keys to values, got {shown(mapping)}")
    choices = [*required, *optional]
    for key in mapping:
        if key not in choices:
            raise ValueError(f"unknown key {shown(key)} in {where}; choose from {', '.join(choices)}")
    for key in required:
        if key not in mapping:
            raise ValueError(f"key {shown(key)} is missing in {where}")
