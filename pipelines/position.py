"""Where in a run a forward is: which step of how many, which guidance branch, and whether it begins a new run."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn


class PipelineReference:
    """A pipeline, held weakly; a copy of the pipeline takes a reference to the copy with it.

    Args:
        pipe: a Diffusers pipeline, or None where a transformer was accelerated by itself.
    """

    def __init__(self, pipe: Any = None):
        self._pipe = None if pipe is None else weakref.ref(pipe)

    def __call__(self) -> Any:
        return None if self._pipe is None else self._pipe()

    def __deepcopy__(self, memo: dict) -> PipelineReference:
        return PipelineReference(memo.get(id(self())))

    def __reduce__(self):
        return PipelineReference, ()


class Position:
    """Follows one transformer through its runs.

    Args:
        pipe: the pipeline that was accelerated, or None.

    Attributes:
        step, num_steps, branch: of the forward that `enter` was last called for; step is None before the first.
        timesteps: the schedule of the run.
        guided: whether a pipeline runs, and with guidance.
    """

    def __init__(self, pipe: Any = None):
        self._pipe = PipelineReference(pipe)
        self.forget()

    def forget(self) -> None:
        """Forget the run."""
        self.step: int | None = None
        self.num_steps: int | None = None
        self.branch: str | None = None
        self.guided = False
        self.timesteps: Tensor | None = None
        self._scheduler: Any = None
        self._told_noise: list[float] | None = None
        self._over = False
        self._calls_in_step = 0
        self._names: set[str] = set()
        self._latents: Any = None  # weak reference to the latents of the call before

    def end_run(self) -> None:
        """Say that the pipeline's call is over: only a new schedule, or a context, can begin another run."""
        self._over = True

    def enter(self, transformer: nn.Module, context: CacheContext | None, latents: Tensor, timestep: Tensor) -> bool:
        """Find where the run is, before a forward.

        Args:
            transformer: the transformer.
            context: what the pipeline passed to `cache_context`, or None.
            latents, timestep: arguments of the forward.

        Returns:
            Whether this forward begins a new run.

        Raises:
            RuntimeError: nothing tells the step.
        """
        running = running_pipeline(transformer)
        scheduler = getattr(running or self._owner(transformer), "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        told = running is not None or getattr(context, "step_index", None) is not None
        if self._over and not told and timesteps is self.timesteps:
            raise _unknown("it comes after the end of a run, and no new one has begun")
        step, num_steps = find_step(context, scheduler, timestep, running=running is not None)
        # `set_timesteps` makes a new tensor for every run, finished or interrupted.
        new = self.step is None or timesteps is not self.timesteps or step < self.step
        new = new or (num_steps == 1 and self._repeats(context, latents))
        if new:
            self.forget()
            self.timesteps, self._scheduler = timesteps, scheduler
            self._told_noise = getattr(context, "noise", None)
        if new or step != self.step:
            self._calls_in_step, self._names = 0, set()
        else:
            self._calls_in_step += 1
        self.step, self.num_steps = step, num_steps
        guidance = getattr(running, "guidance_scale", None)
        self.guided = isinstance(guidance, (int, float)) and guidance > 1
        self.branch = f"call {self._calls_in_step}" if context is None else context.name
        self._names.add(self.branch)
        self._latents = weakref.ref(latents)
        return new

    @property
    def current(self) -> tuple[int, int, str]:
        """Step, number of steps and branch of the forward that `enter` was last called for."""
        assert self.step is not None and self.num_steps is not None and self.branch is not None, (
            "no forward was entered"
        )
        return self.step, self.num_steps, self.branch

    def noise(self) -> list[float] | None:
        """Share of noise in the latents of every step of the run, or None where nothing tells it."""
        return noise_of(self._scheduler) if self._told_noise is None else list(self._told_noise)

    def _owner(self, transformer: nn.Module) -> Any:
        pipe = self._pipe()
        return pipe if pipe is not None and holds(pipe, transformer) else None

    def _repeats(self, context: CacheContext | None, latents: Tensor) -> bool:
        """Whether the only step of a run is there again: the same branch, or other latents where branches have no names."""
        return context.name in self._names if context is not None else self._latents() is not latents

    def __getstate__(self) -> dict:
        return {"_pipe": self._pipe}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.forget()


def running_pipeline(transformer: nn.Module) -> Any:
    """The Diffusers pipeline whose call this thread is in and which runs a transformer, or None.

    Pipelines share transformers, are copied and get other schedulers: the one that runs knows its own.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, (DiffusionPipeline, ModularPipeline)) and holds(owner, transformer):
                return owner
        frame = frame.f_back
    return None


def holds(pipe: Any, transformer: nn.Module) -> bool:
    """Whether a transformer, compiled or not, is a component of a pipeline."""
    return any(getattr(value, "_orig_mod", value) is transformer for value in vars(pipe).values())


def find_step(
    context: CacheContext | None, scheduler: Any, timestep: Tensor | float, running: bool = False
) -> tuple[int, int]:
    """Which step of how many a forward belongs to.

    Args:
        context: what the pipeline passed to `cache_context`, or None.
        scheduler: the pipeline's scheduler, or None.
        timestep: the transformer's timestep, a scalar or [B] or [B, S] (tokens of a given image have others).
        running: whether the scheduler is that of a pipeline whose call is going on.

    Returns:
        (step, num_steps): `step_index` of the context, else of the scheduler (None before its first step), else the
        position of the timestep in `scheduler.timesteps`; or the first, where a running scheduler has made no step and
        the transformer's timestep is not the scheduler's.

    Raises:
        RuntimeError: none of them tells.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    # Before `set_timesteps` a scheduler holds the steps of training.
    if isinstance(scheduler, SchedulerMixin) and getattr(scheduler, "num_inference_steps", None) is None:
        timesteps = None
    step = getattr(context, "step_index", None)
    num_steps = getattr(context, "num_inference_steps", None)
    if num_steps is None and timesteps is not None:
        num_steps = len(timesteps)
    if step is None:
        step = getattr(scheduler, "step_index", None)
        if step is not None and num_steps is not None and step >= num_steps:
            raise _unknown(f"the scheduler has made all its {num_steps} steps")
    if step is None and timesteps is not None:
        step = _position(timesteps, torch.as_tensor(timestep))
        if step is None and running and hasattr(scheduler, "step_index"):
            step = getattr(scheduler, "begin_index", None) or 0
    if step is None or num_steps is None:
        raise _unknown("neither a cache context nor a scheduler tells it")
    return step, num_steps


def noise_of(scheduler: Any) -> list[float] | None:
    """Share of noise in the latents of every step of a scheduler's run.

    Args:
        scheduler: a Diffusers scheduler after `set_timesteps`, or None.

    Returns:
        For every step the weight of the noise where those of video and noise sum to 1: what flow matching calls sigma.
        None: the scheduler does not tell it.
    """
    timesteps, config = getattr(scheduler, "timesteps", None), getattr(scheduler, "config", {})
    if timesteps is None or not isinstance(scheduler, SchedulerMixin):
        return None
    if (
        "Flow" in type(scheduler).__name__
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    ):
        return [step / config.get("num_train_timesteps", 1000) for step in timesteps.double().tolist()]
    alphas, sigmas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "sigmas", None)
    if alphas is not None:
        kept = alphas.double().cpu()[timesteps.long().cpu().clamp(0, len(alphas) - 1)]  # of the video's variance
        noise = (1 - kept).sqrt()
        return (noise / (noise + kept.sqrt())).tolist()
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        return [sigma / (1 + sigma) for sigma in sigmas.double().tolist()[:-1]]
    return None


def _position(timesteps: Tensor, timestep: Tensor) -> int | None:
    current = timestep.max()
    matches = (timesteps.to(current) == current).nonzero()
    return int(matches[0]) if len(matches) else None


def _unknown(reason: str) -> RuntimeError:
    return RuntimeError(
        f"the step must be known during an accelerated forward, but {reason}; run the very pipeline that svg.accelerate "
        f"was given, or wrap the call in svg.at_step(transformer, i, n)"
    )
