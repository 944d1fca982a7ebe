"""Which model: attach to a Diffusers pipeline, restore it, load it, run it."""

from .attach import accelerate, report, reset, restore
from .generate import GenerationRequest, GenerationResult, StepProgress, generate, validate_request
from .loading import load_pipeline

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
