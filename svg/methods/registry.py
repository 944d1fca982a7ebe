"""Every method. One is a folder beside this file: `config.py` with its settings, and `plan.py`, loaded when it first runs, with

    plan(q, k, v, config, state, layout, text_mask) -> CallPlan     of one attention call: q, k, v are float [B, H, S, D],
                                                            config is the method's, state the layer's, layout says where
                                                            video and text are, and text_mask, bool [B, text_tokens] or
                                                            None, which tokens are the prompt's
    precision_of(config, state, layer, device) -> str       optional, else the setting `precision`; "native": dense attention runs

    steady(q, config, state, layout, text_mask) -> Steady or None
                                                            optional: with what this call can be captured in a CUDA graph
                                                            that serves other layers and steps too, once what only the host
                                                            can do (draws, numbers that change with the step) is in the
                                                            state's cache; None: it runs as it is

To add a method, make its folder and name its settings here.
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from functools import cache
from types import ModuleType
from typing import Any

from ..config.base import DenseConfig, MethodConfig
from ..documents import shown
from .near.config import NearConfig
from .sage.config import Sage2Config, Sage2PlusConfig, Sage3Config
from .sparge.config import SpargeConfig
from .svg1.config import SVG1Config
from .svg2.config import SVG2Config

METHODS: dict[str, type[MethodConfig]] = {
    config.method: config
    for config in (
        DenseConfig,
        NearConfig,
        SVG1Config,
        SVG2Config,
        SpargeConfig,
        Sage2Config,
        Sage2PlusConfig,
        Sage3Config,
    )
}


def planner(config: MethodConfig) -> ModuleType:
    """The module `plan` beside the one that a method's settings are from."""
    return _planner_of(type(config))


@cache
def _planner_of(kind: type[MethodConfig]) -> ModuleType:
    return importlib.import_module(f"{kind.__module__.rpartition('.')[0]}.plan")


def method_flags() -> dict[str, tuple[type, str]]:
    """Settings with a flag of their own: type and help by name, in the order of METHODS, what all methods have last."""
    common = {one.name for one in fields(MethodConfig)}
    flags: dict[str, tuple[type, dict[str, list[str]]]] = {}
    for config in METHODS.values():
        for one in fields(config):
            if one.metadata.get("flag") and one.name not in common:
                _, said = flags.setdefault(one.name, (one.metadata["flag"], {}))
                said.setdefault(one.metadata["help"], []).append(config.method)
    own = {
        name: (kind, " ".join(f"{', '.join(methods)}: {text}" for text, methods in said.items()))
        for name, (kind, said) in flags.items()
    }
    shared = {one.name: (one.metadata["flag"], one.metadata["help"]) for one in fields(MethodConfig) if one.metadata}
    return own | shared


def config_from_dict(settings: dict[str, Any]) -> MethodConfig:
    """Build a method's config from a plain dict such as `to_dict` gives or a YAML file holds.

    Args:
        settings: "method" (one of METHODS) and any of that method's fields.

    Returns:
        The config.

    Raises:
        ValueError: the method or a key is unknown, or a value is outside its range.
        TypeError: a value has the wrong type.

    Example:
        svg.config_from_dict({"method": "svg2", "top_p": 0.8})
    """
    if not isinstance(settings, dict):
        raise TypeError(f"settings must be keys and values, got {shown(settings)}")
    values = dict(settings)
    method = values.pop("method", None)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {shown(method)}")
    for key in values:
        _check_setting(key, METHODS[method])
    return METHODS[method](**values)


def _check_setting(key: str, config: type[MethodConfig]) -> None:
    """Raise ValueError unless a method has such a setting; say which method has it, and what this one stops at."""
    choices = [field.name for field in fields(config)]
    if key in choices:
        return
    owners = [name for name, other in METHODS.items() if key in {one.name for one in fields(other)}]
    instead = f", where {config.method} has {config.budget_field}" if config.budget_field else ""
    belongs = f" (it belongs to {', '.join(owners)}{instead})" if owners else ""
    raise ValueError(f"unknown key {shown(key)} for method {config.method}{belongs}; choose from {', '.join(choices)}")
