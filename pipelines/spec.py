"""What a transformer family must say about itself to be accelerated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from svg.documents import shown
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState

from .processor import VideoAttnProcessor
from .stock import StockAttnProcessor

SELF, LAST, FIRST, PACKED = "self-attention", "joint, text last", "joint, text first", "packed: prefix, video"

ON_A_CPU = "tiny random model, CPU"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One transformer family.

    Args:
        transformer: exact class name of the transformer.
        attention_modules: transformer -> its video self-attention (or joint attention) modules in layer order. Each has a
            `processor` that computes it, and `set_processor`.
        layout: (transformer config, forward arguments by name) -> TokenLayout of that forward.
        arguments: the forward's leading parameters in order, up to the last that `layout` or the step needs.
        latents, timestep: names of the forward's arguments that hold the noisy video and its time.
        processor: (original processor, state, layer) -> the processor that replaces it; by default the original itself,
            with its call of attention led through svg.
        replaces: class names of Diffusers' processors that it may stand in for; any other is refused. Empty: no check.
        patch: transformer config -> latents in a token along (time, height, width); for `load_pipeline` and `generate`.
        pipelines: class names of the Diffusers pipelines that `load_pipeline` and `generate` know.
        fp32_components: components of the pipeline that are loaded in fp32 whatever the dtype.
        parallel: whether it runs under Diffusers' context parallelism (Ulysses).
        guidance_in_batch: whether its pipelines run both guidance branches in one batch, the negative prompt's half first.
        cp_plan: how the sequence is split then, where Diffusers' class does not say it: a plan, or transformer -> plan.
        kind: which of the four layouts it has, for the table of models.
        others: class names of further pipelines it runs in, for the table.
        hub: hub ids of its weights, for the table.
        tested: how it was tested, for the table.

    Raises:
        TypeError: a field has the wrong type.
    """

    transformer: str
    attention_modules: Callable[[Any], list[Any]]
    layout: Callable[[Any, Mapping[str, Any]], TokenLayout]
    arguments: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states")
    latents: str = "hidden_states"
    timestep: str = "timestep"
    processor: Callable[[Any, RunState, int], VideoAttnProcessor] = StockAttnProcessor.stand_for
    replaces: tuple[str, ...] = ()
    patch: Callable[[Any], tuple[int, int, int]] | None = None
    pipelines: tuple[str, ...] = ()
    fp32_components: tuple[str, ...] = ()
    parallel: bool = False
    guidance_in_batch: bool = False
    cp_plan: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None = None
    kind: str = SELF
    others: tuple[str, ...] = ()
    hub: tuple[str, ...] = ()
    tested: str = ON_A_CPU

    def __post_init__(self):
        for name in ("transformer", "latents", "timestep", "kind", "tested"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise TypeError(f"{name} must be text, got {shown(value)}")
        for name in ("arguments", "replaces", "pipelines", "fp32_components", "others", "hub"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"{name} must be a tuple of texts, got {shown(value)}")
        for name in ("attention_modules", "layout", "processor", "patch"):
            value = getattr(self, name)
            if not (callable(value) or (name == "patch" and value is None)):
                raise TypeError(f"{name} must be a function, got {shown(value)}")
        for name in ("parallel", "guidance_in_batch"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be true or false, got {shown(value)}")
        if not (self.cp_plan is None or callable(self.cp_plan) or isinstance(self.cp_plan, Mapping)):
            raise TypeError(f"cp_plan must be a plan, a function or None, got {shown(self.cp_plan)}")
