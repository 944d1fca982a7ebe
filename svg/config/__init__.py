"""Settings of every method: frozen, validated when built, turned into and out of plain dicts. Needs no torch."""

from .base import DENSE_BACKENDS, GuardedConfig, MethodConfig
from .methods import (
    METHODS,
    ORDERS,
    PRECISIONS,
    SELECTIONS,
    DenseConfig,
    NearConfig,
    SpargeConfig,
    SVG1Config,
    SVG2Config,
    TunedFor,
    config_from_dict,
)
from .sage import LAYER_PRECISIONS, Sage2Config, Sage2PlusConfig, Sage3Config

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
    "TunedFor",
    "config_from_dict",
]
