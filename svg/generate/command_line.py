"""The `svg generate` command line of a resolved job, so that every result says how to get it again."""

from __future__ import annotations

import json
import shlex
from typing import Any

from svg.configs import load_preset

from ..config import METHODS, MethodConfig
from ..methods.registry import method_flags
from .job import Job

_REQUEST = ("height", "width", "num_frames", "steps", "guidance", "true_cfg", "seed", "negative_prompt", "fps")


def command_line(job: Job) -> str:
    """Spell a job as a shell command that runs it again, the folder of the results left out.

    Args:
        job: what was done. Settings without a flag of their own are spelt with --set, unless its preset, which the command
            names, has them.

    Returns:
        One line, quoted for a POSIX shell.
    """
    settings = job.config.to_dict()
    flags = {
        "model": job.model,
        "preset": job.preset,
        "method": job.config.method,
        **{name: settings.get(name) for name in method_flags()},
        **{name: getattr(job.request, name) for name in _REQUEST},
        "image": job.image_path,
        "last_image": job.last_image_path,
        **{name: getattr(job, name) for name in ("flow_shift", "device", "dtype", "offload", "lpips")},
        **{name: getattr(job, name) for name in ("revision", "variant", "cache", "vae_tiling", "yes")},
        "gpus": job.gpus if job.gpus > 1 else None,
        "split": job.split if job.split != "sequence" else None,
        "compile": job.compiled,
        "no_dense": not job.dense,
        "no_control": not job.control,
    }
    words = [word for name, value in flags.items() for word in _words(name, value)]
    for source, scale in job.loras:
        words += _words("lora", f"{source}={scale:g}")
    for name, value in _unflagged(job).items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    return shlex.join(["svg", "generate", *words, "--", job.request.prompt])


def _unflagged(job: Job) -> dict[str, Any]:
    """Settings without a flag that a bare `svg generate` of this model, preset and method would not have."""
    settings = job.config.to_dict()
    method, flags = settings.pop("method"), method_flags()
    bare = _bare_config(job.preset, method).to_dict() | {"few_steps_noise": None}  # as the flag of a warm-up leaves it
    return {name: value for name, value in settings.items() if name not in flags and value != bare[name]}


def _bare_config(preset: str | None, method: str) -> MethodConfig:
    methods = load_preset(preset).methods if preset is not None else {}
    return methods.get(method) or METHODS[method]()


def _words(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    # "=" keeps a text that begins with a dash from being read as a flag
    return [f"{flag}={value}"] if isinstance(value, str) and value.startswith("-") else [flag, str(value)]
