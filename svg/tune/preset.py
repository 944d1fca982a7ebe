"""A tuned preset: the YAML of `svg.configs`, bound to model, token grid and device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from svg.configs import load_preset
from svg.eval.files import atomic_path
from svg.pipelines.fingerprint import fingerprint

from ..config import METHODS
from ..generate.job import Job


def write_preset(
    path: Path, job: Job, settings: dict[str, Any], tokens: tuple[int, int, int], device: str, source: str
) -> Path:
    """Write a preset that `--preset PATH` and `svg.accelerate(pipe, PATH)` take; it appears whole or not at all.

    Args:
        path: the YAML file.
        job: model and size it is for.
        settings: of the method, "method" among them.
        tokens: frames, height and width of the latent video, in tokens.
        device: name of the GPU, or "cpu".
        source: where the settings come from.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written.
    """
    request = job.request
    generation = {key: getattr(request, key) for key in ("steps", "height", "width")}
    generation |= {"frames": request.num_frames, "guidance": request.guidance, "fps": request.fps}
    if job.flow_shift is not None:
        generation["flow_shift"] = job.flow_shift
    bound = {"model": job.model, "fingerprint": fingerprint(job.model), "tokens": list(tokens), "device": device}
    content = {
        "model": job.model,
        "source": source,
        "generation": generation,
        settings["method"]: {**_changed(settings), "tuned_for": bound},
    }
    with atomic_path(path) as partial:
        partial.write_text(
            yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8"
        )
    load_preset(path)
    return path


def _changed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that differ from the method's own, tables as lists."""
    values = dict(settings)
    own = METHODS[values.pop("method")]().to_dict()
    changed = {key: value for key, value in values.items() if value != own[key]}
    return {key: [list(row) for row in value] if isinstance(value, tuple) else value for key, value in changed.items()}
