"""The hook on a transformer: says before every forward where the run is, and times the forward."""

from __future__ import annotations

import inspect
import time
import weakref
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, HookFunctionReference, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from svg.state import RunState, Timer

from .fused_blocks import fuse, unfuse
from .processor import VideoAttnProcessor
from .spec import ModelSpec

HOOK_NAME = "svg_video"


class RunHook(ModelHook):
    """Binds one transformer of one pipeline to a RunState.

    Args:
        pipe: the Diffusers pipeline; held weakly, its scheduler is looked up at every forward.
        transformer: the transformer to bind.
        spec: its family.
        state: its state.
    """

    # `cache_context` and `_reset_stateful_cache` look for stateful hooks and the StateManagers they hold.
    _is_stateful = True

    def __init__(self, pipe: Any, transformer: nn.Module, spec: ModelSpec, state: RunState):
        super().__init__()
        self.spec = spec
        self.state = state
        self.modules = spec.attention_modules(transformer)
        self.originals = [attn.processor for attn in self.modules]
        self.processors: list[VideoAttnProcessor] = []
        self.timers: list[Timer] = []
        self._pipe = weakref.ref(pipe)
        self._contexts = StateManager(BaseState)
        self._signature = inspect.signature(type(transformer).forward)
        self.started = 0.0  # host clock at the start of the run
        self._timesteps: Tensor | None = None
        self._calls_in_step = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._made_registry = False
        self._fused: list[nn.Module] = []

    def attach(self, transformer: nn.Module) -> None:
        """Replace the processors and start listening to the transformer's forward."""
        self.processors = [self.spec.processor(old, self.state, i) for i, old in enumerate(self.originals)]
        for attn, processor in zip(self.modules, self.processors):
            attn.set_processor(processor)
        if self.state.config.fused:
            self._fused = fuse(transformer.modules())
        self._made_registry = not hasattr(transformer, "_diffusers_hook")
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        # `register_hook` would wrap `forward`, and Accelerate's offloading unwraps it again after every run. The
        # registry is only needed for `cache_context`; torch's own hooks do the work. In front, where no other hook's
        # removal relinks anything through this entry.
        registry.hooks[HOOK_NAME] = self
        registry._hook_order.insert(0, HOOK_NAME)
        registry._fn_refs.insert(0, HookFunctionReference())
        self._handles = [
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after),
        ]

    def detach(self, transformer: nn.Module) -> None:
        """Undo `attach`: every module that still has our processor gets its own back, nothing else is left."""
        for attn, processor, original in zip(self.modules, self.processors, self.originals):
            if attn.processor is processor:
                attn.set_processor(original)
        unfuse(self._fused)
        for handle in self._handles:
            handle.remove()
        registry = transformer._diffusers_hook
        index = registry._hook_order.index(HOOK_NAME)
        del registry.hooks[HOOK_NAME], registry._hook_order[index], registry._fn_refs[index]
        if self._made_registry and not registry.hooks:
            del transformer._diffusers_hook

    def reset(self) -> None:
        """Forget the run: state, timers and position."""
        self.state.reset()
        self.timers = []
        self._timesteps = None
        self._calls_in_step = 0

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Diffusers calls this when a pipeline call is over: the last forward is checked, the report stays."""
        self._contexts.reset()
        self.state.end_run()
        return module

    def same_run(self, other: RunHook) -> bool:
        """Whether both transformers last ran under one schedule."""
        return self._timesteps is other._timesteps

    def seconds(self) -> float:
        """Seconds spent in the transformer's forwards of the run; waits for the GPU."""
        return sum(timer.seconds() for timer in self.timers)

    @torch.compiler.disable
    def _before(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        self._check_processors()
        inputs = self._signature.bind_partial(transformer, *args, **kwargs).arguments
        layout = self.spec.layout(transformer.config, inputs)
        self._enter_step(inputs["timestep"])
        self.state.begin_forward(step=self._step, num_steps=self._num_steps, branch=self._branch(), layout=layout)
        self._running = Timer(inputs["hidden_states"].device)

    @torch.compiler.disable
    def _after(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        self._running.stop()
        self.timers.append(self._running)

    def _enter_step(self, timestep: Tensor) -> None:
        context, scheduler = self._context(), self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        step, self._num_steps = find_step(context, scheduler, timestep)
        last = self.state.step
        # `set_timesteps` makes a new tensor for every run, finished or interrupted.
        if last is None or timesteps is not self._timesteps or step < last:
            self.reset()
            self.state.begin_run()
            self._timesteps = timesteps
            self.started = time.perf_counter()
        elif step == last:
            self._calls_in_step += 1
        else:
            self._calls_in_step = 0
        self._step = step

    def _branch(self) -> str:
        context = self._context()
        return f"call {self._calls_in_step}" if context is None else context.name

    def _context(self) -> CacheContext | None:
        # The public `.context` raises outside a context, which is a normal case here.
        return self._contexts._context

    def _scheduler(self) -> Any:
        return getattr(self._pipe(), "scheduler", None)

    def _check_processors(self) -> None:
        for layer, (attn, processor) in enumerate(zip(self.modules, self.processors)):
            if attn.processor is not processor:
                raise RuntimeError(
                    f"the attention processors of {self.state.name} must stay those that svg.accelerate set, got "
                    f"{type(attn.processor).__name__} in layer {layer}; call svg.accelerate(pipe, config) again"
                )


def find_step(context: CacheContext | None, scheduler: Any, timestep: Tensor | float) -> tuple[int, int]:
    """Which step of how many a forward belongs to.

    Args:
        context: what the pipeline passed to `cache_context`, or None.
        scheduler: the pipeline's scheduler, or None.
        timestep: the transformer's timestep, a scalar or [B] or [B, S] (tokens of a given image have smaller ones).

    Returns:
        (step, num_steps): `step_index` of the context, else of the scheduler (None before its first step), else the
        position of the timestep in `scheduler.timesteps`.

    Raises:
        RuntimeError: none of the three tells.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    step = getattr(context, "step_index", None)
    num_steps = getattr(context, "num_inference_steps", None)
    if num_steps is None and timesteps is not None:
        num_steps = len(timesteps)
    if step is None:
        step = getattr(scheduler, "step_index", None)
    if step is None and timesteps is not None:
        step = _position(timesteps, torch.as_tensor(timestep))
    if step is None or num_steps is None:
        raise RuntimeError(
            "the step must be known during an accelerated forward; run the very pipeline that svg.accelerate was given, "
            "or wrap the call in transformer.cache_context(name, step_index=i, num_inference_steps=n)"
        )
    return step, num_steps


def _position(timesteps: Tensor, timestep: Tensor) -> int | None:
    current = timestep.max()
    matches = (timesteps.to(current) == current).nonzero()
    return int(matches[0]) if len(matches) else None
