"""Untimed runs that compile and allocate, and the second dense backend that a control runs on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from svg.pipelines import accelerate, generate
from svg.pipelines.attach import attached

from ..config import DenseConfig, MethodConfig
from .job import Job
from .report import transformer_of

WARMUP_STEPS = 2
_MATH_LIMIT = 4 * 2**30  # bytes of scores that the "math" backend may hold


def is_plain(pipe: Any, job: Job) -> bool:
    """Whether all of a job is plain code on a CPU, which compiles nothing: its first step is like any other."""
    return pipe._execution_device.type == "cpu" and not job.compiled


def warm_up(pipe: Any, job: Job, config: MethodConfig) -> float:
    """Compile and allocate, untimed: every step runs the method itself, in every layer, but for a dense one in 8 bits.

    Args:
        pipe: a loaded pipeline.
        job: whose size it warms up.
        config: what it warms up.

    Returns:
        Seconds that its last step took.
    """
    steps = 1 if is_plain(pipe, job) else WARMUP_STEPS  # one touches all memory
    dense = getattr(config, "warmup_precision", "native") != "native"  # has kernels of its own
    steps += dense
    warmup = {"warmup_steps": 1 / steps if dense else 0.0, "warmup_noise": None, "few_steps_noise": None}
    accelerate(pipe, replace(config, **warmup, warmup_layers=0.0))
    ends = [0.0]
    generate(pipe, replace(job.request, steps=steps), lambda progress: ends.append(progress.seconds))
    return ends[-1] - ends[-2]


def control_config(pipe: Any, job: Job, notes: list[str], warmed_up: bool = True) -> DenseConfig | None:
    """The first dense backend that differs from the baseline's and can run this model.

    Args:
        pipe: a pipeline that has run the job densely, which tells how large the attention map is.
        job: what the control is of.
        notes: told why there is none.
        warmed_up: whether each is tried, untimed; else the first is taken.

    Returns:
        The control's settings, or None.
    """
    refused = None
    for backend in _control_backends(pipe, job):
        config = DenseConfig(dense_backend=backend, check_finite=job.config.check_finite)
        try:
            if warmed_up:
                warm_up(pipe, job, config)
        except ValueError as error:
            refused = error
        else:
            return config
    notes.append(f"no control: {refused or 'a second dense backend would hold the whole attention map in memory'}")
    return None


def _control_backends(pipe: Any, job: Job) -> list[str]:
    device, dtype = pipe._execution_device, transformer_of(pipe).dtype
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
