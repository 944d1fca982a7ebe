"""Transformer class name -> ModelSpec; a name that is not here is refused."""

from __future__ import annotations

from torch import nn

from . import cogvideox, hunyuan_video, wan
from .spec import ModelSpec

MODELS: dict[str, ModelSpec] = {spec.transformer: spec for spec in (wan.SPEC, hunyuan_video.SPEC, cogvideox.SPEC)}

PIPELINES: dict[str, ModelSpec] = {name: spec for spec in MODELS.values() for name in spec.pipelines}


def find_spec(transformer: nn.Module) -> ModelSpec:
    """The spec of a transformer, by its exact class name.

    Args:
        transformer: a Diffusers transformer.

    Returns:
        Its ModelSpec.

    Raises:
        ValueError: the class is not supported; subclasses and look-alikes are not guessed at.
    """
    name = type(transformer).__name__
    if name not in MODELS:
        raise ValueError(f"transformer must be one of {', '.join(MODELS)}, got {name}; run it without svg")
    return MODELS[name]
