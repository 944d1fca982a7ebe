"""What can be refused before torch is imported and before any weights are loaded or fetched."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from svg.eval.files import check_folder
from svg.eval.lpips_backbones import BACKBONES
from svg.pipelines.model_files import check_complete, locate_model, read_rules
from svg.pipelines.request import check_request

from ..environment import version_problems
from .job import RESULTS, Job, inputs_of


def preflight(job: Job) -> None:
    """Check a job against the JSON files of its model, and the files it names.

    Args:
        job: what to do.

    Raises:
        ValueError, TypeError: what a run would refuse later, after minutes of loading.
    """
    problems = version_problems()
    if problems:
        raise ValueError("; ".join(problems))
    check_folder("out", job.out, RESULTS, inputs_of(job))
    source = locate_model(job.model)
    if job.revision is not None and isinstance(source, Path):
        raise ValueError(f"--revision must be left out for a directory, got {job.revision!r}; it is for hub ids")
    check_request(job.request, read_rules(source, job.revision))
    _check_size_for_lpips(job)
    _check_loras(job)
    if isinstance(source, Path):
        check_complete(source, job.variant)


def _check_size_for_lpips(job: Job) -> None:
    smallest = BACKBONES[job.lpips].min_side if job.lpips in BACKBONES and (job.dense or job.control) else 0
    if min(job.request.height, job.request.width) < smallest:
        raise ValueError(
            f"height and width must be >= {smallest} for LPIPS ({job.lpips}), got {job.request.height} x "
            f"{job.request.width}: use a larger video or --lpips none"
        )


def _check_loras(job: Job) -> None:
    if job.loras and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora needs the package peft, which is not installed: pip install peft")
    for path, _ in job.loras:
        looks_local = path.endswith(".safetensors") or path.startswith((".", "/", "~"))
        if looks_local and not Path(path).expanduser().exists():
            raise ValueError(
                f"--lora must be an existing file or folder, or a hub id, got {path!r}, which does not exist"
            )
