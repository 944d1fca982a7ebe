"""Which model: attach to a Diffusers pipeline, restore it, load it, run it. Names load on first use.

What reads a model's small JSON files (`model_files`, `request`) needs neither torch nor Diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attach import accelerate, report, reset, restore
    from .generation import GenerationResult, StepProgress, generate, validate_request
    from .loading import load_pipeline
    from .request import GenerationRequest

_PUBLIC = {
    "GenerationRequest": "request",
    "GenerationResult": "generation",
    "StepProgress": "generation",
    "accelerate": "attach",
    "generate": "generation",
    "load_pipeline": "loading",
    "report": "attach",
    "reset": "attach",
    "restore": "attach",
    "validate_request": "generation",
}
__all__ = [
    "GenerationRequest",
    "GenerationResult",
    "StepProgress",
    "accelerate",
    "generate",
    "load_pipeline",
    "report",
    "reset",
    "restore",
    "validate_request",
]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value
