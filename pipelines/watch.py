"""Notices, at the start of a pipeline's denoising, that a transformer was put in which is not accelerated."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from .hook import HOOK_NAME


class WatchedProgress:
    """In the place of a pipeline's `progress_bar`, which every Diffusers pipeline calls before its first step.

    Args:
        pipe: the pipeline.
        names: its components that are accelerated.
    """

    def __init__(self, pipe: Any, names: tuple[str, ...]):
        self.pipe = pipe
        self.names = names

    def __call__(self, *args, **kwargs):
        for name in self.names:
            if not is_attached(getattr(self.pipe, name, None)):
                raise RuntimeError(
                    f"pipe.{name} must stay the transformer that svg.accelerate was given, got another one, which would run "
                    f"without sparse attention; call svg.accelerate(pipe, config) again, or svg.restore(pipe)"
                )
        return type(self.pipe).progress_bar(self.pipe, *args, **kwargs)


def watch(pipe: Any, names: tuple[str, ...]) -> None:
    """Begin to look after the transformers of a pipeline."""
    if isinstance(pipe, DiffusionPipeline):
        vars(pipe)["progress_bar"] = WatchedProgress(pipe, names)


def unwatch(pipe: Any) -> None:
    """Undo `watch`."""
    if isinstance(getattr(pipe, "progress_bar", None), WatchedProgress):
        del pipe.progress_bar


def is_attached(transformer: nn.Module | None) -> bool:
    """Whether a transformer, compiled or not, carries our hook; None, a component that was taken out, counts as well."""
    registry = getattr(getattr(transformer, "_orig_mod", transformer), "_diffusers_hook", None)
    return transformer is None or (registry is not None and registry.get_hook(HOOK_NAME) is not None)
