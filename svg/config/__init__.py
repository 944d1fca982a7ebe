"""Settings of every method: frozen, validated when built, turned into and out of plain dicts. Needs no torch.

A method's own settings are in its folder in `svg/methods/`; they are public here, and load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .base import DENSE_BACKENDS, ORDERS, PRECISIONS, DenseConfig, GuardedConfig, MethodConfig, SparseConfig
from .tuned import TunedFor

if TYPE_CHECKING:
    from ..methods.near.config import NearConfig
    from ..methods.registry import METHODS, config_from_dict
    from ..methods.sage.config import LAYER_PRECISIONS, Sage2Config, Sage2PlusConfig, Sage3Config
    from ..methods.sparge.config import SpargeConfig
    from ..methods.svg1.config import SVG1Config
    from ..methods.svg2.config import SELECTIONS, SVG2Config

__all__ = [
    "DENSE_BACKENDS",
    "LAYER_PRECISIONS",
    "METHODS",
    "ORDERS",
    "PRECISIONS",
    "SELECTIONS",
    "DenseConfig",
    "GuardedConfig",
    "MethodConfig",
    "NearConfig",
    "SVG1Config",
    "SVG2Config",
    "Sage2Config",
    "Sage2PlusConfig",
    "Sage3Config",
    "SpargeConfig",
    "SparseConfig",
    "TunedFor",
    "config_from_dict",
]

_CONSTANTS = {"LAYER_PRECISIONS": "sage", "SELECTIONS": "svg2"}


def __getattr__(name: str) -> Any:
    if name in _CONSTANTS:
        return getattr(importlib.import_module(f"svg.methods.{_CONSTANTS[name]}.config"), name)
    if name in ("METHODS", "config_from_dict") or name.endswith("Config"):
        registry = importlib.import_module("svg.methods.registry")
        found = {config.__name__: config for config in registry.METHODS.values()} | vars(registry)
        if name in found:
            return found[name]
    raise AttributeError(f"module 'svg.config' has no attribute {name!r}")
