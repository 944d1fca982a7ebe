"""The hook on a transformer: says before every forward where the run is, and times the forward."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, HookFunctionReference, HookRegistry, ModelHook, StateManager
from torch import nn

from svg.config import MethodConfig
from svg.engine.compiler import not_compiled
from svg.engine.state import RunState, Timer

from .fused_blocks import FusedForward, fuse, unfuse
from .linear_guard import LinearGuard
from .linears import all_quantized, find_linears, quantize_linears, restore_linears
from .linears_file import read_linears
from .modules import Attention
from .position import Position, find_step
from .processor import CHOICES, VideoAttnProcessor, check_parallel
from .spec import ModelSpec

__all__ = ["HOOK_NAME", "RunHook", "find_step"]

HOOK_NAME = "svg_video"


class RunHook(ModelHook):
    """Binds one transformer of one pipeline to a RunState.

    Args:
        pipe: the Diffusers pipeline, held weakly, or None for a transformer by itself.
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
        self.modules: list[Attention] = spec.attention_modules(transformer)
        self.originals = [attn.processor for attn in self.modules]
        self.processors: list[VideoAttnProcessor] = []
        self.timers: list[Timer] = []
        self.position = Position(pipe)
        kept: Any = BaseState  # the class, where Diffusers' annotation has an instance
        self._contexts = StateManager(kept)
        self.started = 0.0  # host clock at the start of the run
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._made_registry = False
        self._fused: list[FusedForward] = []
        self.linears: list[str] = []  # those in 8 bits

    def attach(self, transformer: Any, linears: list[str] | None = None) -> None:
        """Replace the processors and start listening to the transformer's forward.

        Args:
            transformer: the transformer.
            linears: those that are in 8 bits already, as `release_linears` gave them; None: put the config's there.
        """
        config = self.state.config
        self.processors = [self.spec.processor(old, self.state, i) for i, old in enumerate(self.originals)]
        # What may end in an error, or take so long that somebody ends it, comes before anything that must be undone.
        self.linears = self._quantize(transformer) if linears is None else linears
        try:
            self.linear_guard = LinearGuard(transformer, self.linears, config)
        except BaseException:
            restore_linears(transformer, self.linears)
            raise
        for attn, processor, original in zip(self.modules, self.processors, self.originals):
            _copy_choices(original, processor)
            _put(attn, processor)
        if self.state.config.fused is not False:
            self._fused = fuse(transformer.modules(), everywhere=bool(self.state.config.fused))
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

    def _quantize(self, transformer: nn.Module) -> list[str]:
        config, precision = self.state.config, self.state.config.linear_precision
        names = find_linears(transformer, self.spec, config.linears, self.state.name)
        if config.linears_file is not None and names:
            precision = next(iter(read_linears(config.linears_file, self.state.name, precision).values()))
        return quantize_linears(transformer, names, precision)

    def detach(self, transformer: Any) -> None:
        """Undo `attach`: every module that still has our processor gets its own back, nothing else is left.

        What others stored on our processors in the meantime (a backend, a parallel configuration) goes to the originals,
        and what others took from us (processors that `unfuse_qkv_projections` would put back) is replaced by them.
        """
        ours = {id(processor): original for processor, original in zip(self.processors, self.originals)}
        for attn, processor, original in zip(self.modules, self.processors, self.originals):
            _copy_choices(processor, original)
            if attn.processor is processor:
                _put(attn, original)
        kept = getattr(transformer, "original_attn_processors", None)
        if isinstance(kept, dict):
            transformer.original_attn_processors = {name: ours.get(id(found), found) for name, found in kept.items()}
        self.state.replays.clear()  # those of a run that was interrupted
        unfuse(self._fused)
        restore_linears(transformer, self.linears)
        for handle in self._handles:
            handle.remove()
        registry = transformer._diffusers_hook
        index = registry._hook_order.index(HOOK_NAME)
        del registry.hooks[HOOK_NAME], registry._hook_order[index], registry._fn_refs[index]
        if self._made_registry and not registry.hooks:
            del transformer._diffusers_hook

    def release_linears(self, transformer: nn.Module, config: MethodConfig) -> list[str] | None:
        """Leave linears in 8 bits where other settings want the same, so that their 16-bit weights needn't come back between.

        Args:
            transformer: the transformer.
            config: the settings that follow.

        Returns:
            Their names, for `attach`; None: they are put back by `detach`.
        """
        own = self.state.config
        same = (own.linears, own.linear_precision) == (config.linears, config.linear_precision)
        if (
            not self.linears
            or not same
            or config.linears_file is not None
            or not all_quantized(transformer, self.linears)
        ):
            return None
        linears, self.linears = self.linears, []
        return linears

    def reset(self) -> None:
        """Forget the run: state, timers and position."""
        self.state.reset()
        self.timers = []
        self.position.forget()

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Diffusers calls this when a pipeline call is over: the last forward is checked, the report stays."""
        self._contexts.reset()
        self.position.end_run()
        self.state.end_run()
        return module

    def same_run(self, other: RunHook) -> bool:
        """Whether both transformers last ran under one schedule."""
        return self.position.timesteps is other.position.timesteps

    def seconds(self) -> float:
        """Seconds spent in the transformer's forwards of the run; waits for the GPU."""
        return sum(timer.seconds() for timer in self.timers)

    @not_compiled
    def _before(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        self._check_processors()
        self._check_gradients(transformer)
        check_parallel(self.processors[0], self.spec, self.state.config)
        inputs = self._inputs(args, kwargs)
        layout = self.spec.layout(getattr(transformer, "config", None), inputs)
        latents = inputs[self.spec.latents]
        latents = latents[0] if isinstance(latents, (list, tuple)) else latents
        position = self.position
        if position.enter(transformer, self._context(), latents, inputs[self.spec.timestep]):
            self._begin_run()
            self.linear_guard.begin_run()
            self.timers = []
            self.started = time.perf_counter()
            self._warn_of_no_warmup()
        step, num_steps, branch = position.current
        self.state.begin_forward(
            step=step,
            num_steps=num_steps,
            branch=branch,
            layout=layout,
            halves=self.spec.guidance_in_batch and position.guided and len(latents) % 2 == 0,
        )
        self.linear_guard.begin_forward(step, branch, self.state.in_warm_up)
        self._running = Timer(latents.device)

    def _begin_run(self) -> None:
        _, num_steps, _ = self.position.current
        by_noise = self.state.config.warms_up_by_noise(num_steps)
        try:
            self.state.begin_run(self.position.noise() if by_noise else None)
        except ValueError:
            self.position.forget()  # nothing has begun
            raise

    @not_compiled
    def _after(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        self._running.stop()
        self.timers.append(self._running)

    def _inputs(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the forward by name; not by its signature, which others patch to (*args, **kwargs)."""
        inputs = {**dict(zip(self.spec.arguments, args)), **kwargs}
        missing = [name for name in (self.spec.latents, self.spec.timestep) if name not in inputs]
        if missing:
            raise TypeError(
                f"the forward of {self.spec.transformer} must be given {' and '.join(missing)}, got neither"
            )
        return inputs

    def _warn_of_no_warmup(self) -> None:
        """A run that starts in the middle of its schedule, as video-to-video does, may start after its warm-up."""
        config, (step, steps, _) = self.state.scheduled, self.position.current
        layers = range(self.state.num_layers)
        if self.state.config.warmup_noise is not None:
            return
        if step == 0 or self.state.name != "transformer" or all(config.is_dense(layer) for layer in layers):
            return
        first, now = (config.is_warmup(index, steps, layers[-1], layers.stop) for index in (0, step))
        if first and not now:
            warnings.warn(
                f"this run begins at step {step} of {steps}, after its warm-up: no step of it is dense; raise "
                f"warmup_steps above {step / steps:.2f} for dense steps",
                stacklevel=2,
            )

    def _check_gradients(self, transformer: nn.Module) -> None:
        recomputed = getattr(transformer, "gradient_checkpointing", False) and torch.is_grad_enabled()
        if recomputed and not all(self.state.config.is_dense(layer) for layer in range(self.state.num_layers)):
            raise NotImplementedError(
                f"gradient checkpointing must be off with {self.state.config.method}: the second computation of a block "
                f"would plan anew and give other gradients; call transformer.disable_gradient_checkpointing(), run under "
                f"torch.no_grad(), or use the method dense or svg.int8_training"
            )

    def _context(self) -> CacheContext | None:
        # The public `.context` raises outside a context, which is a normal case here.
        return self._contexts._context

    def _check_processors(self) -> None:
        for layer, (attn, processor) in enumerate(zip(self.modules, self.processors)):
            if attn.processor is not processor:
                raise RuntimeError(
                    f"the attention processors of {self.state.name} must stay those that svg.accelerate set, got "
                    f"{type(attn.processor).__name__} in layer {layer}; call svg.accelerate(pipe, config) again"
                )

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and what is pickled, is attached as this one is, and has no run."""
        return {key: value for key, value in vars(self).items() if key != "_running"} | {"timers": [], "started": 0.0}


def _put(attn: Attention, processor: Any) -> None:
    """Give a module a processor; MochiAttention has no method for it."""
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:
        attn.processor = processor


def _copy_choices(source: Any, target: Any) -> None:
    """Hand on what Diffusers sets on the processors of a transformer: a backend, a parallel configuration."""
    for name in CHOICES:
        if hasattr(source, name) and hasattr(target, name):
            setattr(target, name, getattr(source, name))
