"""What a transformer family must say about itself to be accelerated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from svg.engine.layout import TokenLayout
from svg.engine.state import RunState

from .processor import VideoAttnProcessor


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One transformer family.

    Args:
        transformer: exact class name of the transformer in Diffusers.
        pipelines: class names of the Diffusers pipelines that `load_pipeline` and `generate` know.
        arguments: the forward's leading parameters in order, up to the last that `layout` or the step needs.
        attention_modules: transformer -> its video self-attention (or joint attention) modules in layer order.
        processor: (original processor, state, layer) -> the processor that replaces it.
        replaces: class names of Diffusers' processors that it may stand in for; any other is refused. Empty: no check.
        patch: transformer config -> latents in a token along (time, height, width).
        layout: (transformer config, forward arguments by name) -> TokenLayout of that forward.
        fp32_components: components of the pipeline that are loaded in fp32 whatever the dtype.
    """

    transformer: str
    pipelines: tuple[str, ...]
    arguments: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states")
    attention_modules: Callable[[nn.Module], list[nn.Module]]
    processor: Callable[[Any, RunState, int], VideoAttnProcessor]
    patch: Callable[[Any], tuple[int, int, int]]
    layout: Callable[[Any, Mapping[str, Any]], TokenLayout]
    replaces: tuple[str, ...] = ()
    fp32_components: tuple[str, ...] = ()
