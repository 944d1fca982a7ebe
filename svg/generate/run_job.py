"""One `svg generate`: load, warm up, run dense, accelerated and control from one seed, measure, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from svg.eval.compare import compare
from svg.eval.files import result_folder, write_json
from svg.eval.lpips_weights import BACKBONES
from svg.eval.page import PAGE, build_page
from svg.eval.video import side_by_side, write_video
from svg.pipelines import GenerationResult, StepProgress, accelerate, generate, load_pipeline, restore, validate_request
from svg.pipelines.attach import attached
from svg.pipelines.loading import BUNDLED, resolve_device

from ..config import DenseConfig, MethodConfig
from ..environment import version_problems, versions
from .command_line import command_line
from .job import Job, inputs_of

RESULTS = ("dense.mp4", "accelerated.mp4", "side_by_side.mp4", PAGE, "report.json")
WARMUP_STEPS = 2
_MATH_LIMIT = 4 * 2**30  # bytes of scores that the "math" backend may hold


class Display(Protocol):
    """Where a run tells how far it is."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def run(self, name: str, steps: int) -> AbstractContextManager[Callable[[StepProgress], None]]:
        """A timed run begins; call what it gives after each step."""


def run(job: Job, display: Display) -> dict[str, Any]:
    """Do a job and write its results.

    Args:
        job: what to do.
        display: told about every stage and step.

    Returns:
        The report, as written to report.json.

    Raises:
        ValueError, TypeError, OSError: bad input; nothing is written.
        FloatingPointError: q, k or v, or the frames, held NaN or infinity; nothing is written.
    """
    problems = version_problems()
    if problems:
        raise ValueError("; ".join(problems))
    resolve_device(job.device)
    with result_folder(job.out, RESULTS, job.force, inputs_of(job)) as folder:
        display.stage(f"loading {job.model}{' (bundled)' if job.model == BUNDLED else ''}")
        pipe = load_pipeline(
            job.model,
            device=job.device,
            dtype=job.dtype,
            offload=job.offload,
            flow_shift=job.flow_shift,
            vae_tiling=job.vae_tiling,
        )
        validate_request(pipe, job.request)
        _check_size_for_lpips(job)
        try:
            results, notes = _run_all(pipe, job, display)
        finally:
            restore(pipe)
        display.stage("measuring and writing")
        frames = {name: to_uint8(result.frames, name) for name, result in results.items()}
        report = _report(job, pipe, results, _quality(frames, job, pipe), notes)
        _write(folder, frames, job, report)
    return report


def _check_size_for_lpips(job: Job) -> None:
    smallest = BACKBONES[job.lpips].min_side if job.lpips in BACKBONES else 0
    if min(job.request.height, job.request.width) < smallest:
        raise ValueError(
            f"height and width must be >= {smallest} for LPIPS ({job.lpips}), got {job.request.height} x "
            f"{job.request.width}: use a larger video or --lpips none"
        )


def _run_all(pipe: Any, job: Job, display: Display) -> tuple[dict[str, GenerationResult], list[str]]:
    plans = _plans(job)
    notes = []
    for name, config in plans.items():
        display.stage(f"warming up {name}")
        warm_up(pipe, job, config)
    if job.control and job.dense:
        display.stage("warming up control")
        plans["control"] = warm_up_control(pipe, job, notes)
    results = {}
    for name, config in plans.items():
        if config is None:
            continue
        accelerate(pipe, config)
        label = config.method if name == "accelerated" else name
        with display.run(label, job.request.steps) as on_step:
            results[name] = generate(pipe, job.request, on_step)
    return results, notes


def _plans(job: Job) -> dict[str, MethodConfig | None]:
    plans: dict[str, MethodConfig | None] = {}
    if job.dense:
        plans["dense"] = DenseConfig(dense_backend=job.config.dense_backend, check_finite=job.config.check_finite)
    if job.config.method != "dense":
        plans["accelerated"] = job.config
    return plans


def warm_up(pipe: Any, job: Job, config: MethodConfig) -> None:
    """Compile and allocate, untimed: both steps run the method itself, in every layer."""
    accelerate(pipe, dataclasses.replace(config, warmup_steps=0.0, warmup_layers=0.0))
    generate(pipe, dataclasses.replace(job.request, steps=WARMUP_STEPS), lambda progress: None)


def warm_up_control(pipe: Any, job: Job, notes: list[str]) -> DenseConfig | None:
    """The first dense backend that differs from the baseline's and can run this model."""
    refused = None
    for backend in _control_backends(pipe, job):
        config = DenseConfig(dense_backend=backend, check_finite=job.config.check_finite)
        try:
            warm_up(pipe, job, config)
        except ValueError as error:
            refused = error
        else:
            return config
    notes.append(f"no control: {refused or 'a second dense backend would hold the whole attention map in memory'}")
    return None


def _control_backends(pipe: Any, job: Job) -> list[str]:
    device, dtype = pipe._execution_device, _transformer(pipe).dtype
    if device.type == "cuda" and dtype != torch.float32:
        # The baseline takes cuDNN first on Hopper and newer, flash before.
        hopper = torch.cuda.get_device_capability(device)[0] >= 9
        choices = ["flash", "efficient"] if hopper else ["efficient"]
    else:
        choices = ["math"] if _math_bytes(pipe) <= _MATH_LIMIT else []
    return [backend for backend in choices if backend != job.config.dense_backend]


def _math_bytes(pipe: Any) -> int:
    """Bytes of one call's attention scores, which the math backend holds whole."""
    state = next(iter(attached(pipe).values())).state
    heads = state.records[-1].density.numel()  # batch x heads
    return 4 * heads * state.layout.total_tokens**2


def to_uint8(frames: np.ndarray, name: str) -> np.ndarray:
    """Frames in [0, 1] as the 8-bit ones that are measured and written; NaN and infinity are refused."""
    if not np.isfinite(frames).all():
        raise FloatingPointError(f"frames of the {name} run must be finite, got NaN or infinity: try --dtype fp32")
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def _quality(frames: dict[str, np.ndarray], job: Job, pipe: Any) -> dict[str, Any]:
    if "dense" not in frames:
        return {}
    device = pipe._execution_device
    others = [name for name in frames if name != "dense"]
    return {name: compare(frames["dense"], frames[name], job.lpips, device) for name in others}


def _write(folder: Path, frames: dict[str, np.ndarray], job: Job, report: dict[str, Any]) -> None:
    for name in ("dense", "accelerated"):
        if name in frames:
            write_video(folder / f"{name}.mp4", frames[name], job.request.fps)
    if {"dense", "accelerated"} <= frames.keys():
        pair = side_by_side(frames["dense"], frames["accelerated"], ("dense", job.config.method))
        write_video(folder / "side_by_side.mp4", pair, job.request.fps)
    write_json(folder / "report.json", report)
    build_page(folder)


def _report(
    job: Job, pipe: Any, results: dict[str, GenerationResult], quality: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    device = pipe._execution_device
    runs = {name: run_summary(result) for name, result in results.items()}
    report = {
        "command": command_line(job),
        "model": {
            "name": job.model,
            "bundled": job.model == BUNDLED,
            "pipeline": type(pipe).__name__,
            "dtype": str(_transformer(pipe).dtype).removeprefix("torch."),
            "offload": job.offload,
            "flow_shift": job.flow_shift,
        },
        "preset": job.preset,
        "method": job.config.to_dict(),
        "generation": {**dataclasses.asdict(dataclasses.replace(job.request, image=None)), "image": job.image_path},
        "seeds": {"noise": job.request.seed, "method": job.config.seed},
        "device": describe_device(device),
        "versions": versions(),
        "runs": runs,
        "speedup": _speedup(runs),
        "density": overall_density(runs.get("accelerated")),
        "quality": quality,
    }
    return {**report, "notes": notes + _notes(job, device, report)}


def run_summary(result: GenerationResult) -> dict[str, Any]:
    """What a report says of one run: config, seconds and the transformers' summaries."""
    transformers = result.report["transformers"]
    if result.report["config"]["method"] == "dense":  # a table of ones tells nothing
        kept = ("calls", "attention_seconds", "transformer_seconds")
        transformers = {name: {key: part[key] for key in kept} for name, part in transformers.items()}
    return {
        "config": result.report["config"],
        "seconds": {
            "end_to_end": result.seconds,
            "transformer": result.transformer_seconds,
            "attention": result.attention_seconds,
            "vae": result.vae_seconds,
        },
        "transformers": transformers,
    }


def _speedup(runs: dict[str, Any]) -> dict[str, float] | None:
    if not {"dense", "accelerated"} <= runs.keys():
        return None
    before, after = runs["dense"]["seconds"], runs["accelerated"]["seconds"]
    return {stage: before[stage] / after[stage] for stage in ("end_to_end", "transformer", "attention")}


def overall_density(run: dict[str, Any] | None) -> dict[str, float | None] | None:
    """Density over all transformers' calls; per step, layer and head it stands beside each transformer."""
    if run is None:
        return None
    parts = run["transformers"].values()
    return {
        "all_calls": _weighted([(part["density"]["all_calls"], part["calls"]["total"]) for part in parts]),
        "sparse_calls": _weighted([(part["density"]["sparse_calls"], part["calls"]["sparse"]) for part in parts]),
    }


def _weighted(pairs: list[tuple[float | None, int]]) -> float | None:
    total = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs if count) / total if total else None


def describe_device(device: torch.device) -> dict[str, Any]:
    """What a report says of the device."""
    if device.type != "cuda":
        return {"type": device.type, "threads": torch.get_num_threads()}
    return {"type": "cuda", "name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def _notes(job: Job, device: torch.device, report: dict[str, Any]) -> list[str]:
    notes = []
    if job.model == BUNDLED:
        notes.append("the model is the bundled tiny-wan: small, trained on simple moving shapes")
    if device.type == "cpu" and job.config.method != "dense":
        notes.append("on a CPU sparse attention runs the plain-torch reference: no speed-up is expected")
    notes += _quantised_notes(report["runs"].get("accelerated"))
    density = report["density"]
    if density and density["sparse_calls"] is None:
        notes.append("no attention call was sparse: warm-up covers every step or layer; lower --warmup-steps")
    quality = report["quality"]
    for part in list(quality.values())[:1]:
        if part["lpips"].get("note") and job.lpips != "none":
            notes.append(part["lpips"]["note"])
    psnr = {name: part["psnr"]["mean"] for name, part in quality.items()}
    if psnr.keys() == {"accelerated", "control"} and psnr["accelerated"] >= psnr["control"]:
        notes.append("the accelerated video is as close to dense as dense is on another backend")
    return notes


def _quantised_notes(run: dict[str, Any] | None) -> list[str]:
    """What a reader must know of attention in fewer bits: emulation, and heads that were computed again."""
    parts = [part["quantised"] for part in (run or {"transformers": {}})["transformers"].values()]
    parts = [part for part in parts if part is not None]
    emulated = sorted({name for part in parts for name, one in part["precisions"].items() if one["emulated"]})
    notes = [f"{name} is an exact emulation on this device: its times mean nothing" for name in emulated]
    guards = [part["guard"] for part in parts if part["guard"] is not None]
    again, heads = (sum(guard[key] for guard in guards) for key in ("recomputed", "head_calls"))
    if again:
        notes.append(f"the guard computed {again} of {heads} head calls again without quantisation")
    return notes


def _transformer(pipe: Any) -> Any:
    return pipe.transformer if pipe.transformer is not None else pipe.transformer_2
