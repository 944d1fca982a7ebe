"""Transformer class name -> ModelSpec; a name that is not here is refused."""

from __future__ import annotations

from torch import nn

from . import cogvideox, hunyuan_video, joint, packed, self_attention, wan
from .refused import REFUSED
from .spec import ModelSpec

_BUILT_IN = (wan.SPEC, hunyuan_video.SPEC, cogvideox.SPEC, *packed.SPECS, *self_attention.SPECS, *joint.SPECS)

MODELS: dict[str, ModelSpec] = {spec.transformer: spec for spec in _BUILT_IN}

PIPELINES: dict[str, ModelSpec] = {name: spec for spec in MODELS.values() for name in spec.pipelines}


def register_model(spec: ModelSpec) -> ModelSpec:
    """Teach `svg.accelerate` a transformer class.

    Args:
        spec: what it must know of the class.

    Returns:
        The same spec.

    Raises:
        TypeError: spec is no ModelSpec.
        ValueError: the class is known already.

    Example:
        svg.register_model(svg.ModelSpec(transformer="MyDiT", attention_modules=my_attentions, layout=my_grid))
    """
    if not isinstance(spec, ModelSpec):
        raise TypeError(f"spec must be a svg.ModelSpec, got {type(spec).__name__}")
    if spec.transformer in MODELS and MODELS[spec.transformer] is not spec:
        raise ValueError(f"transformer must be a class that is not registered yet, got {spec.transformer}")
    MODELS[spec.transformer] = spec
    return spec


def find_spec(transformer: nn.Module) -> ModelSpec:
    """The spec of a transformer, by its exact class name.

    Args:
        transformer: a Diffusers transformer, or one whose class was registered.

    Returns:
        Its ModelSpec.

    Raises:
        ValueError: the class is not supported; subclasses and look-alikes are not guessed at.
    """
    name = type(transformer).__name__
    if name in REFUSED:
        raise ValueError(f"transformer must not be {name}: {REFUSED[name]}")
    if name not in MODELS:
        raise ValueError(
            f"transformer must be one of {', '.join(MODELS)}, got {name}; register it with svg.register_model, or run it "
            f"without svg"
        )
    return MODELS[name]


def supported_models() -> list[dict[str, str | tuple[str, ...]]]:
    """What can be accelerated, from the registry.

    Returns:
        One dict a transformer class: transformer, pipelines, hub, layout, tested; then those that are refused, whose
        layout is empty and whose `tested` is the reason.

    Example:
        [row["transformer"] for row in svg.supported_models()]
    """
    rows = [
        {
            "transformer": spec.transformer,
            "pipelines": spec.pipelines + spec.others,
            "hub": spec.hub,
            "layout": spec.kind,
            "tested": spec.tested,
        }
        for spec in MODELS.values()
    ]
    refused = [
        {"transformer": name, "pipelines": (), "hub": (), "layout": "", "tested": f"refused: {reason}"}
        for name, reason in REFUSED.items()
    ]
    return rows + refused
