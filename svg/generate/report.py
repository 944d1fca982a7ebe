"""What report.json of `svg generate` says."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from svg.eval.compare import failures
from svg.pipelines import GenerationResult
from svg.pipelines.model_files import BUNDLED

from ..environment import versions
from .command_line import command_line
from .job import Job

RUNS = ("dense", "accelerated", "control")  # in a report's order; they run in another
BUSY = 2.0  # times as long for the same work, and a second more: fused passes alone save less


def make_report(
    job: Job, pipe: Any, results: dict[str, GenerationResult], quality: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Everything report.json says but for how the job ended.

    Args:
        job: what was done.
        pipe: its pipeline.
        results: by run, those that are finished.
        quality: of each run against dense, as far as it was measured.
        notes: what a reader must know.

    Returns:
        The report, runs in the order of RUNS.
    """
    device = pipe._execution_device
    runs = {name: run_summary(results[name]) for name in RUNS if name in results}
    report = {
        "command": command_line(job),
        "model": {
            "name": job.model,
            "bundled": job.model == BUNDLED,
            "pipeline": type(pipe).__name__,
            "dtype": str(transformer_of(pipe).dtype).removeprefix("torch."),
            "offload": job.offload,
            "flow_shift": job.flow_shift,
            "revision": job.revision,
            "variant": job.variant,
            "compiled": job.compiled,
        },
        "preset": job.preset,
        "method": job.config.to_dict(),
        "generation": _generation(job),
        "loras": [{"source": source, "scale": scale} for source, scale in job.loras],
        "cache": job.cache,
        "seeds": {"noise": job.request.seed, "method": job.config.seed},
        "device": describe_device(device),
        "gpus": job.gpus,
        "versions": versions(),
        "runs": runs,
        "speedup": _speedup(runs),
        "density": overall_density(runs.get("accelerated")),
        "quality": quality,
    }
    return {**report, "notes": notes + _notes(job, device, report)}


def _generation(job: Job) -> dict[str, Any]:
    request = dataclasses.asdict(dataclasses.replace(job.request, image=None, last_image=None))
    return {**request, "image": job.image_path, "last_image": job.last_image_path}


def run_summary(result: GenerationResult) -> dict[str, Any]:
    """What a report says of one run: config, seconds and the transformers' summaries."""
    assert result.report is not None, "a job's pipelines are accelerated, the dense ones too"
    transformers = result.report["transformers"]
    if result.report["config"]["method"] == "dense":  # a table of ones tells nothing
        kept = ("calls", "steps", "attention_seconds", "transformer_seconds")
        transformers = {name: {key: part[key] for key in kept} for name, part in transformers.items()}
    return {
        "config": result.report["config"],
        "seconds": seconds_of(result),
        "peak_memory": result.peak_memory,
        "ranks": result.ranks,
        "transformers": transformers,
    }


def seconds_of(result: GenerationResult) -> dict[str, float | None]:
    """Where a run's time went; the attention's is None where nobody timed it."""
    return {
        "end_to_end": result.seconds,
        "transformer": result.transformer_seconds,
        "attention": result.attention_seconds,
        "vae": result.vae_seconds,
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
    weighted = [(value, count) for value, count in pairs if value is not None and count]
    total = sum(count for _, count in weighted)
    return sum(value * count for value, count in weighted) / total if total else None


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
    if job.split == "branches" and job.config.method == "near":
        notes.append(
            "share_branches is off: the branches are on two GPUs and choose apart, which --split sequence does not"
        )
    notes += _busy_notes(job, report["runs"])
    notes += _quantized_notes(report["runs"].get("accelerated"))
    density = report["density"]
    if density and density["sparse_calls"] is None:
        notes.append("no attention call was sparse: warm-up covers every step or layer; lower --warmup-steps")
    elif (
        density and sum(part["steps"]["dense"] for part in report["runs"]["accelerated"]["transformers"].values()) == 0
    ):
        notes.append("every step was sparse: none was dense from the first layer to the last")
    quality = report["quality"]
    notes += dict.fromkeys(note for part in quality.values() for note in failures(part))
    psnr = {name: part["psnr"]["mean"] for name, part in quality.items()}
    known = None not in psnr.values() and psnr.keys() == {"accelerated", "control"}
    if known and psnr["accelerated"] >= psnr["control"]:
        notes.append("the accelerated video is as close to dense as dense is on another backend")
    return notes


def _busy_notes(job: Job, runs: dict[str, Any]) -> list[str]:
    """That something else kept the machine busy in one of the runs: what both do alike took times that differ."""
    if not {"dense", "accelerated"} <= runs.keys() or job.cache is not None or job.config.linears != "none":
        return []
    seconds = {name: runs[name]["seconds"] for name in ("dense", "accelerated")}
    if any(one["attention"] is None for one in seconds.values()):
        return []
    rest = {name: one["transformer"] - one["attention"] for name, one in seconds.items()}
    less, more = sorted(rest.values())
    if more < BUSY * less or more - less < 1:
        return []
    return [
        f"the machine was busier in one run than in the other: outside of attention the transformer took {rest['dense']:.1f} s "
        f"dense and {rest['accelerated']:.1f} s accelerated for the same work, so speed-ups say little; run it again alone"
    ]


def _quantized_notes(run: dict[str, Any] | None) -> list[str]:
    """What a reader must know of fewer bits: emulation, heads that were computed again, linears that left 8 bits."""
    parts = [part["quantised"] for part in (run or {"transformers": {}})["transformers"].values()]
    parts = [part for part in parts if part is not None]
    emulated = sorted({name for part in parts for name, one in part["precisions"].items() if one["emulated"]})
    notes = [f"{name} is an exact emulation on this device: its times mean nothing" for name in emulated]
    guards = [part["guard"] for part in parts if part["guard"] is not None]
    again, heads = (sum(guard[key] for guard in guards) for key in ("recomputed", "head_calls"))
    if again:
        notes.append(f"the guard computed {again} of {heads} head calls again without quantisation")
    return notes + _linear_notes(run)


def _linear_notes(run: dict[str, Any] | None) -> list[str]:
    """Which linears left 8 bits during the run."""
    parts = [part.get("linears") for part in (run or {"transformers": {}})["transformers"].values()]
    guards = [(part["linears"], part["guard"]) for part in parts if part is not None and part["guard"] is not None]
    back, linears = sum(len(guard["own_precision"]) for _, guard in guards), sum(count for count, _ in guards)
    return [f"the guard took {back} of {linears} linears back to their own precision"] if back else []


def transformer_of(pipe: Any) -> Any:
    return pipe.transformer if pipe.transformer is not None else pipe.transformer_2
