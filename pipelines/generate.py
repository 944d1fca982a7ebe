"""One generation: check the request, run the pipeline, keep the raw frames and where the time went."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from svg.engine.state import Timer

from .attach import attached, is_accelerated, report, reset, transformers_of
from .registry import PIPELINES

_SIDE = 16  # every supported Diffusers pipeline refuses sides that 16 doesn't divide


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to generate.

    Args:
        prompt: what the video shows.
        negative_prompt: what it must not show, or None.
        height, width: pixels.
        num_frames: video frames, 4k + 1.
        steps: denoising steps.
        guidance: classifier-free guidance scale (HunyuanVideo: embedded guidance).
        true_cfg: HunyuanVideo only: classifier-free guidance with the negative prompt, > 1, or None.
        seed: seed of the CPU generator that draws the noise.
        image: first frame for image-to-video, resized to height x width; None for text-to-video.
        max_sequence_length: text tokens, or None for the model's own.
        fps: frames per second of the written video.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int
    width: int
    num_frames: int
    steps: int = 50
    guidance: float = 5.0
    true_cfg: float | None = None
    seed: int = 0
    image: Image.Image | None = None
    max_sequence_length: int | None = None
    fps: int = 16


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
        report: `svg.report(pipe)` after the run; None on a plain pipeline.
    """

    frames: np.ndarray
    seconds: float
    transformer_seconds: float
    attention_seconds: float | None
    vae_seconds: float
    report: dict[str, Any] | None


def validate_request(pipe: Any, request: GenerationRequest) -> None:
    """Check a request against a pipeline before anything heavy runs.

    Args:
        pipe: a Diffusers pipeline of a supported class.
        request: the request.

    Raises:
        ValueError: a value breaks the pipeline's rule.
        TypeError: a value has the wrong type.
    """
    name = type(pipe).__name__
    if name not in PIPELINES:
        raise ValueError(f"pipe must be one of {', '.join(PIPELINES)}, got {name}")
    _check_types(request)
    if not request.prompt.strip():
        raise ValueError("prompt must not be empty")
    for field in ("height", "width", "num_frames", "steps", "fps"):
        if getattr(request, field) < 1:
            raise ValueError(f"{field} must be >= 1, got {getattr(request, field)}")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {request.seed}")
    if not (math.isfinite(request.guidance) and request.guidance >= 0):
        raise ValueError(f"guidance must be finite and >= 0, got {request.guidance}")
    _check_size(pipe, request)
    _check_image(pipe, request)
    _check_text(pipe, request)


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
    return GenerationResult(
        frames=np.asarray(frames, dtype=np.float32),
        seconds=seconds,
        transformer_seconds=_total(transformer_timers),
        attention_seconds=_attention_seconds(pipe) if accelerated else None,
        vae_seconds=_total(vae_timers),
        report=report(pipe) if accelerated else None,
    )


def _check_types(request: GenerationRequest) -> None:
    for field in ("height", "width", "num_frames", "steps", "seed", "fps", "max_sequence_length"):
        value = getattr(request, field)
        if value is None and field == "max_sequence_length":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{field} must be an integer, got {value!r}")
    for field in ("prompt", "negative_prompt"):
        value = getattr(request, field)
        if not (isinstance(value, str) or (value is None and field == "negative_prompt")):
            raise TypeError(f"{field} must be text, got {value!r}")
    for field in ("guidance", "true_cfg"):
        value = getattr(request, field)
        if value is None and field == "true_cfg":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{field} must be a number, got {value!r}")
    if request.image is not None and not isinstance(request.image, Image.Image):
        raise TypeError(f"image must be a PIL image, got {type(request.image).__name__}")


def _check_size(pipe: Any, request: GenerationRequest) -> None:
    config = _config(pipe)
    _, patch_h, patch_w = PIPELINES[type(pipe).__name__].patch(config)
    for field, patch in (("height", patch_h), ("width", patch_w)):
        multiple, value = math.lcm(_SIDE, pipe.vae_scale_factor_spatial * patch), getattr(request, field)
        if value % multiple:
            below = max(value // multiple, 1) * multiple
            raise ValueError(
                f"{field} must be a multiple of {multiple} for this model, got {value}; "
                f"try {below} or {(value // multiple + 1) * multiple}"
            )
        fixed = getattr(config, f"sample_{field}", None)
        if config.get("use_learned_positional_embeddings") and value != fixed * pipe.vae_scale_factor_spatial:
            raise ValueError(f"{field} must be {fixed * pipe.vae_scale_factor_spatial} for this model, got {value}")
    stride = pipe.vae_scale_factor_temporal
    if request.num_frames % stride != 1 % stride:
        below = (request.num_frames - 1) // stride * stride + 1
        raise ValueError(
            f"num_frames must be {stride}k + 1 for this model, got {request.num_frames}; "
            f"try {below} or {below + stride}"
        )


def _check_image(pipe: Any, request: GenerationRequest) -> None:
    wanted = "image" in _parameters(pipe)
    if wanted and request.image is None:
        raise ValueError(f"image must be given for {type(pipe).__name__}, got none; pass the first frame")
    if not wanted and request.image is not None:
        raise ValueError(
            f"image must be left out for {type(pipe).__name__}, which is text-to-video; use an image-to-video model"
        )


def _check_text(pipe: Any, request: GenerationRequest) -> None:
    length, config, true_cfg = request.max_sequence_length, _config(pipe), request.true_cfg
    if length is not None and length < 1:
        raise ValueError(f"max_sequence_length must be >= 1, got {length}")
    # Wan I2V splits its cross-attention context at the last 512 tokens, CogVideoX adds a table of this length.
    fixed = 512 if config.get("added_kv_proj_dim") else config.get("max_text_seq_length")
    if length is not None and fixed is not None and length != fixed:
        raise ValueError(f"max_sequence_length must be {fixed} for this model, got {length}; leave it out")
    if "true_cfg_scale" in _parameters(pipe):
        if request.negative_prompt and true_cfg is None:
            raise ValueError(
                f"negative_prompt must be left out without true_cfg on {type(pipe).__name__}, which would ignore it; "
                f"give true_cfg > 1 (twice the time)"
            )
        if true_cfg is not None and not (true_cfg > 1 and request.negative_prompt is not None):
            raise ValueError(f"true_cfg must be > 1 and come with a negative_prompt, got {true_cfg}")
    elif true_cfg is not None:
        raise ValueError(f"true_cfg must be left out on {type(pipe).__name__}, got {true_cfg}; use guidance")


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
    optional = {"image": request.image, "true_cfg_scale": request.true_cfg, "max_sequence_length": length}
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
        torch.cuda.synchronize(device)


def _parameters(pipe: Any) -> Any:
    return inspect.signature(type(pipe).__call__).parameters


def _config(pipe: Any) -> Any:
    return next(iter(transformers_of(pipe).values())).config
