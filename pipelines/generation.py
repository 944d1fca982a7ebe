"""One generation: check the request, run the pipeline, keep the raw frames and where the time went."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from svg.engine.state import Timer

from .attach import attached, is_accelerated, report, reset, transformers_of
from .branches import branches_of
from .processes import everyones, is_split, share_records
from .registry import PIPELINES
from .request import GenerationRequest, PipelineRules, check_request


@dataclass(frozen=True)
class StepProgress:
    """How far a generation is.

    Args:
        step: steps done.
        steps: steps of the run.
        seconds: since the start, as the host sees it (a GPU may lag behind).
        density: call it for the mean density of the step just done (None on a plain pipeline); waits for the GPU.
    """

    step: int
    steps: int
    seconds: float
    density: Callable[[], float | None]


@dataclass(frozen=True)
class GenerationResult:
    """A generated video and where the time went.

    Args:
        frames: float32 [F, H, W, 3] in [0, 1], as the pipeline gave them, never encoded.
        seconds: end to end.
        transformer_seconds: in the transformers' forwards.
        attention_seconds: in the accelerated attention calls; None on a plain pipeline.
        vae_seconds: in the VAE's decoder.
        peak_memory: bytes that torch held at most on the GPU during the run; None on a CPU.
        report: `svg.report(pipe)` after the run; None on a plain pipeline.
        ranks: where several processes made the video, what each measured: the fields from `seconds` to `peak_memory`.
            Those of the result are then the largest of all, this process' own `seconds` apart.
    """

    frames: np.ndarray
    seconds: float
    transformer_seconds: float
    attention_seconds: float | None
    vae_seconds: float
    peak_memory: int | None
    report: dict[str, Any] | None
    ranks: list[dict[str, float | None]] | None = None


def validate_request(pipe: Any, request: GenerationRequest) -> None:
    """Check a request against a pipeline before anything heavy runs.

    Args:
        pipe: a Diffusers pipeline of a supported class.
        request: the request.

    Raises:
        ValueError: a value breaks the pipeline's rule.
        TypeError: a value has the wrong type.
    """
    check_request(request, rules_of(pipe))


def rules_of(pipe: Any) -> PipelineRules:
    """What a loaded pipeline says about requests.

    Args:
        pipe: a Diffusers pipeline.

    Returns:
        Its rules, the same as `svg.pipelines.model_files.read_rules` reads from its files.

    Raises:
        ValueError: its class is not one that `generate` knows.
    """
    name = type(pipe).__name__
    if name not in PIPELINES:
        raise ValueError(f"pipe must be one of {', '.join(PIPELINES)}, got {name}")
    parameters = inspect.signature(type(pipe).__call__).parameters
    return PipelineRules(
        name=name,
        transformer=_config(pipe),
        spatial=pipe.vae_scale_factor_spatial,
        temporal=pipe.vae_scale_factor_temporal,
        image="image" in parameters,
        last_image="last_image" in parameters,
        true_cfg="true_cfg_scale" in parameters,
        guidance_in_batch=PIPELINES[name].guidance_in_batch,
        transformers=tuple(transformers_of(pipe)),
    )


def generate(
    pipe: Any, request: GenerationRequest, on_step: Callable[[StepProgress], None] | None = None
) -> GenerationResult:
    """Generate one video.

    Args:
        pipe: a Diffusers pipeline of a supported class, accelerated or plain.
        request: what to generate.
        on_step: called after every step; Diffusers' own progress bar is then off.

    Returns:
        The frames, the times and the report.

    Raises:
        ValueError, TypeError: as `validate_request`.
        FloatingPointError: q, k or v held NaN or infinity.
    """
    validate_request(pipe, request)
    accelerated = is_accelerated(pipe)
    if accelerated:
        reset(pipe)
    device = pipe._execution_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        _timed(list(transformers_of(pipe).values()), device) as transformer_timers,
        _timed([pipe.vae.decoder], device) as vae_timers,
        _own_progress(pipe, on_step),
    ):
        _synchronise(device)
        start = time.perf_counter()
        frames = pipe(**_arguments(pipe, request, on_step, start)).frames[0]
        _synchronise(device)
        seconds = time.perf_counter() - start
    measured = {
        "seconds": seconds,
        "transformer_seconds": _total(transformer_timers),
        "attention_seconds": _attention_seconds(pipe) if accelerated else None,
        "vae_seconds": _total(vae_timers),
        "peak_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    ranks = everyones(measured) if is_split(next(iter(transformers_of(pipe).values()))) else None
    _end_branches(pipe, accelerated)
    if ranks is not None:
        measured |= {name: max(rank[name] for rank in ranks) for name in measured if measured[name] is not None}
        measured["seconds"] = seconds
    return GenerationResult(
        frames=np.asarray(frames, dtype=np.float32),
        report=report(pipe) if accelerated else None,
        ranks=ranks,
        **measured,
    )


def _arguments(pipe: Any, request: GenerationRequest, on_step: Callable | None, start: float) -> dict[str, Any]:
    arguments = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "np",
    }
    length = request.max_sequence_length or _config(pipe).get("max_text_seq_length")
    optional = {
        "image": request.image,
        "last_image": request.last_image,
        "true_cfg_scale": request.true_cfg,
        "max_sequence_length": length,
    }
    arguments.update({key: value for key, value in optional.items() if value is not None})
    if on_step is not None:
        arguments["callback_on_step_end"] = _callback(request.steps, on_step, start)
    return arguments


def _callback(steps: int, on_step: Callable[[StepProgress], None], start: float) -> Callable:
    def after_step(pipe, step, timestep, tensors):
        seconds = time.perf_counter() - start
        on_step(StepProgress(step + 1, steps, seconds, lambda: _density(pipe, step)))
        return {}

    return after_step


def _density(pipe: Any, step: int) -> float | None:
    if not is_accelerated(pipe):
        return None
    records = [record for hook in attached(pipe).values() for record in hook.state.records if record.step == step]
    return float(torch.stack([record.density.float().mean() for record in records]).mean()) if records else None


def _attention_seconds(pipe: Any) -> float:
    records = [record for hook in attached(pipe).values() for record in hook.state.records]
    return sum(record.seconds for record in records if record.seconds is not None)


@contextmanager
def _timed(modules: list[nn.Module], device: torch.device) -> Iterator[list[Timer]]:
    timers: list[Timer] = []

    def before(module, args):
        timers.append(Timer(device))

    def after(module, args, output):
        timers[-1].stop()

    handles = [module.register_forward_pre_hook(before) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        yield timers
    finally:
        for handle in handles:
            handle.remove()


def _end_branches(pipe: Any, accelerated: bool) -> None:
    """Where processes took a branch each, every one gets the others' records."""
    for name, transformer in transformers_of(pipe).items():
        branches = branches_of(transformer)
        if branches is not None:
            branches.end_run()
            if accelerated:
                state = attached(pipe)[name].state
                state.records = share_records(state.records)


def _total(timers: list[Timer]) -> float:
    return sum(timer.seconds() for timer in timers)


@contextmanager
def _own_progress(pipe: Any, on_step: Callable | None) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", None)
    if on_step is not None:
        pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if on_step is not None:
            pipe.set_progress_bar_config(**(before or {}))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(
            device
        ).synchronize()  # the whole device must not be waited for while a thread captures


def _config(pipe: Any) -> Any:
    return next(iter(transformers_of(pipe).values())).config
