"""One line to accelerate a Diffusers pipeline, one to undo it, one to see what was computed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import nn

from svg.config import MethodConfig
from svg.documents import shown
from svg.engine.state import RunState
from svg.engine.summary import summarize

from .branches import branches_of
from .choose import resolve
from .fingerprint import check_weights
from .hook import HOOK_NAME, RunHook
from .linears import find_linears, restore_linears
from .linears_file import read_linears
from .processor import check_original, check_parallel, dense_backend
from .registry import MODELS, find_spec
from .spec import ModelSpec
from .watch import unwatch, watch

TRANSFORMERS = ("transformer", "transformer_2")
_log = logging.getLogger("svg")


Pipe = TypeVar("Pipe")


def accelerate(pipe: Pipe, config: MethodConfig | dict | str | None = None) -> Pipe:
    """Run a pipeline's video self-attention with a method; all else stays as it is.

    Args:
        pipe: a Diffusers pipeline, modular ones included, with a supported `transformer` (and `transformer_2`, if it has
            one); or such a transformer by itself.
        config: how. None: "balanced". A word: "quality", "balanced" or "fast", which keep sequences dense that a GPU is
            faster with dense. A method's name such as "sage2", with its default settings. A preset's name, with its
            settings of the default method; "name:svg1" has those of svg1. A MethodConfig, or its dict.

    Returns:
        The same pipe. Accelerating it again replaces the method.

    Raises:
        ValueError: no transformer or an unsupported one, a bad config, processors that are not Diffusers' own, or a
            Diffusers attention backend that cannot be kept.
        TypeError: config is none of these.
        NotImplementedError: context parallelism is on.

    Example:
        svg.accelerate(pipe)                                # or "quality", "fast", svg.SVG2Config(top_p=0.9), "sage2"
        video = pipe("a cat walks on the grass").frames[0]
    """
    config = resolve(config)
    transformers = transformers_of(pipe)
    if any(branches_of(transformer) is not None for transformer in transformers.values()):
        config = config.for_branches_apart()
    if not isinstance(pipe, nn.Module):  # a transformer by itself knows its own folder, not the pipeline's
        check_weights(pipe, config)
    specs = {name: find_spec(transformer) for name, transformer in transformers.items()}
    for name, transformer in transformers.items():
        _check(name, transformer, specs[name], config)
    hooks = {name: _hook(transformer) for name, transformer in transformers.items()}
    linears = {name: hook and hook.release_linears(transformers[name], config) for name, hook in hooks.items()}
    restore(pipe)
    try:
        for name, transformer in transformers.items():
            state = RunState(config, len(specs[name].attention_modules(transformer)), name)
            hook = RunHook(None if pipe is transformer else pipe, transformer, specs[name], state)
            hook.attach(transformer, linears.pop(name))
    except BaseException:  # no memory for linears in 8 bits, or somebody who does not want to wait for them
        for name, kept in linears.items():
            restore_linears(transformers[name], kept or ())
        restore(pipe)
        raise
    watch(pipe, tuple(transformers))
    _tell(pipe, transformers, config)
    return pipe


def _tell(pipe: Any, transformers: dict[str, nn.Module], config: MethodConfig) -> None:
    layers = sum(len(find_spec(transformer).attention_modules(transformer)) for transformer in transformers.values())
    changed = {key: value for key, value in config.to_dict().items() if value != type(config)().to_dict()[key]}
    settings = ", ".join(f"{key}={value}" for key, value in changed.items())
    _log.info("%s: %s on %d layers%s", type(pipe).__name__, config.method, layers, f", {settings}" if settings else "")


@contextmanager
def accelerated(pipe: Pipe, config: MethodConfig | dict | str | None = None) -> Iterator[Pipe]:
    """Within the block, a pipeline runs with a method; after it, and after an error in it, the pipeline is as before.

    Args:
        pipe, config: as `accelerate`.

    Yields:
        The same pipe.

    Raises:
        As `accelerate`.

    Example:
        with svg.accelerated(pipe, "fast"):
            draft = pipe(prompt).frames[0]
    """
    accelerate(pipe, config)
    try:
        yield pipe
    finally:
        restore(pipe)


def _check(name: str, transformer: nn.Module, spec: ModelSpec, config: MethodConfig) -> None:
    """Everything that can be refused, before anything is changed."""
    hook = _hook(transformer)
    ours = {} if hook is None else {id(mine): old for mine, old in zip(hook.processors, hook.originals)}
    for attn in spec.attention_modules(transformer):
        check_parallel(attn.processor, spec, config)
        dense_backend(attn.processor, config)
        check_original(ours.get(id(attn.processor), attn.processor), spec.replaces)
    if config.linears_file is not None:
        read_linears(config.linears_file, name, config.linear_precision)
    find_linears(transformer, spec, config.linears, name)


def restore(pipe: Pipe) -> Pipe:
    """Undo `accelerate`: the original processor objects come back and no hook stays.

    Args:
        pipe: a Diffusers pipeline; one that isn't accelerated is left as it is.

    Returns:
        The same pipe.

    Example:
        svg.restore(pipe)
    """
    unwatch(pipe)
    for transformer in transformers_of(pipe).values():
        hook = _hook(transformer)
        if hook is not None:
            hook.detach(transformer)
    return pipe


def reset(pipe: Any) -> Any:
    """Forget the last run of an accelerated pipeline: caches, records and times. The next run starts by itself.

    Args:
        pipe: an accelerated pipeline.

    Returns:
        The same pipe.

    Raises:
        ValueError: the pipeline isn't accelerated.
    """
    for hook in attached(pipe).values():
        hook.reset()
    return pipe


def report(pipe: Any) -> dict[str, Any]:
    """What the last run computed, by transformer.

    Args:
        pipe: an accelerated pipeline.

    Returns:
        {"config": the method's settings, "transformers": {name: summary of its calls, "transformer_seconds", and
        "linears", None or {linears (in 8 bits), precision, guard {probes, largest_error, own_precision}}}}.

    Raises:
        ValueError: the pipeline isn't accelerated.
        FloatingPointError: q, k or v of the last forward held NaN or infinity.

    Example:
        svg.report(pipe)["transformers"]["transformer"]["density"]["all_calls"]
    """
    hooks = attached(pipe)
    latest = max(hooks.values(), key=lambda hook: hook.started)
    for hook in hooks.values():
        if not hook.same_run(latest):  # Wan2.2 may leave one of its transformers out of a run
            hook.reset()
    summaries = {
        name: {
            **summarize(hook.state),
            "transformer_seconds": hook.seconds(),
            "linears": hook.linear_guard.summary(),
        }
        for name, hook in hooks.items()
    }
    return {"config": latest.state.config.to_dict(), "transformers": summaries}


@contextmanager
def at_step(
    transformer: nn.Module, step: int, num_steps: int, branch: str = "cond", noise: Sequence[float] | None = None
) -> Iterator[None]:
    """Within the block, forwards of a transformer belong to a step of a run, where no pipeline tells.

    What `transformer.cache_context(branch, step_index=step, num_inference_steps=num_steps)` says for Diffusers' own.

    Args:
        transformer: an accelerated transformer.
        step: index of the step, from 0.
        num_steps: steps of the run.
        branch: guidance branch; branches share no state.
        noise: share of noise in the latents of each of the run's steps, in [0, 1], for a warm-up by noise.

    Raises:
        ValueError: the step is not one of the run's, or noise has not a share for each.
        TypeError: an argument has the wrong type.

    Example:
        with svg.at_step(dit, i, len(timesteps)):
            noise = dit(latents, timestep, text)
    """
    transformer = getattr(transformer, "_orig_mod", transformer)
    _check_step(transformer, step, num_steps, branch)
    _check_noise(noise, num_steps)
    _set_cache_context(transformer, _Told(branch, step_index=step, num_inference_steps=num_steps, noise=noise))
    try:
        yield
    finally:
        _set_cache_context(transformer, None)


@dataclass(frozen=True)
class _Told(CacheContext):
    """What `at_step` was told: Diffusers' context, and the noise of the run's steps."""

    noise: Sequence[float] | None = None


def _check_step(transformer: Any, step: Any, num_steps: Any, branch: Any) -> None:
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"transformer must be a torch module, got {type(transformer).__name__}")
    for name, value in (("step", step), ("num_steps", num_steps)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    if not 0 <= step < num_steps:
        raise ValueError(f"step must be in [0, num_steps) = [0, {num_steps}), got {step}")
    if not isinstance(branch, str):
        raise TypeError(f"branch must be text, got {shown(branch)}")


def _check_noise(noise: Any, num_steps: int) -> None:
    if noise is None:
        return
    numbers = isinstance(noise, (list, tuple)) and all(
        isinstance(level, (int, float)) and not isinstance(level, bool) for level in noise
    )
    if not numbers:
        raise TypeError(f"noise must be a list of numbers, one a step, got {shown(noise)}")
    if len(noise) != num_steps or not all(0 <= level <= 1 for level in noise):
        raise ValueError(f"noise must be {num_steps} numbers in [0, 1], one a step, got {shown(noise)}")


def attached(pipe: Any) -> dict[str, RunHook]:
    """The hooks of an accelerated pipeline.

    Args:
        pipe: a Diffusers pipeline.

    Returns:
        Transformer name -> RunHook.

    Raises:
        ValueError: the pipeline isn't accelerated.
    """
    hooks: dict[str, RunHook] = {}
    for name, transformer in transformers_of(pipe).items():
        hook = _hook(transformer)
        if hook is None:
            raise ValueError("pipe must be accelerated, got a plain one; call svg.accelerate(pipe, config) first")
        hooks[name] = hook
    return hooks


def is_accelerated(pipe: Any) -> bool:
    """Whether `accelerate` is in force on a pipeline."""
    return all(_hook(transformer) is not None for transformer in transformers_of(pipe).values())


def transformers_of(pipe: Any) -> dict[str, Any]:
    """The transformers of a pipeline, without torch.compile's wrapper.

    Args:
        pipe: a Diffusers pipeline, or a transformer of a supported class.

    Returns:
        "transformer" and "transformer_2", those that are there, and every other component of a supported class, by its
        name; one that is in two slots once. A transformer by itself is "transformer".

    Raises:
        ValueError: there is none.
    """
    if isinstance(pipe, nn.Module):
        return {"transformer": getattr(pipe, "_orig_mod", pipe)}
    found = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    found |= {name: part for name, part in getattr(pipe, "__dict__", {}).items() if type(part).__name__ in MODELS}
    # torch.compile(transformer) wraps the module; its attention modules and hooks are inside.
    found = {name: getattr(module, "_orig_mod", module) for name, module in found.items()}
    found = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    first = {id(module): name for name, module in reversed(found.items())}
    found = {name: module for name, module in found.items() if first[id(module)] == name}
    if not found:
        raise ValueError(
            f"pipe must have a video transformer ({', '.join(MODELS)}), got {type(pipe).__name__} without one"
        )
    return found


def _hook(transformer: nn.Module) -> RunHook | None:
    registry = getattr(transformer, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(HOOK_NAME)
