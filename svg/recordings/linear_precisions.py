"""`svg adapt-linears`: which linears run in 8 bits, by the error that each has on what a run gives it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svg.eval.files import check_outputs, write_json
from svg.kernels.linears import (
    fp8_linear,
    int8_matmul,
    int8_rows_matmul,
    quantize_blocks,
    quantize_int8_rows,
    quantize_rows,
)
from svg.kernels.linears.blocks import first_threshold
from svg.pipelines import GenerationRequest, StepProgress, accelerate, generate, load_pipeline, restore
from svg.pipelines.attach import attached, transformers_of
from svg.pipelines.linears import best_precision, find_linears
from svg.pipelines.linears_file import linears_content
from svg.pipelines.loading import check_offload, resolve_device

from ..config import DenseConfig
from ..config.base import LINEAR_PRECISIONS
from ..generate.job import Job, inputs_of
from ..generate.preflight import check_job

ROWS = 512  # tokens whose output is compared; blocks of INT8 have 128
PARTS = 3  # of the run: one step each


def adapt_linears(
    pipe: Any,
    request: GenerationRequest,
    max_error: float,
    precision: str = "auto",
    on_step: Callable[[StepProgress], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run a pipeline dense and measure what 8 bits would do to each linear.

    Args:
        pipe: a Diffusers pipeline of a supported class; it is plain afterwards.
        request: what to generate.
        max_error: most relative L2 error of a linear's output that is taken, > 0, in every step looked at.
        precision: "fp8", "int8-rows", "int8", or "auto": as `MethodConfig.linear_precision`.
        on_step: told about every step.

    Returns:
        {"precision": the chosen one or "native", "error": the largest} by transformer and linear; "native" and None for
        those that ran in none of the steps looked at, as all of Wan 2.2's second transformer may.

    Raises:
        ValueError: max_error is not positive and finite, or precision unknown.
        NotImplementedError: there are no linears to put in 8 bits.
    """
    _check_max_error(max_error)
    if precision not in LINEAR_PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(LINEAR_PRECISIONS)}, got {precision!r}")
    steps = {(2 * part + 1) * request.steps // (2 * PARTS) for part in range(PARTS)}
    errors: dict[str, dict[str, Tensor | None]] = defaultdict(dict)
    handles, chosen = [], {}
    accelerate(pipe, DenseConfig())
    try:
        transformers = transformers_of(pipe)
        for name, hook in attached(pipe).items():
            transformer = transformers[name]
            chosen[name] = best_precision(transformer) if precision == "auto" else precision
            for path in find_linears(transformer, hook.spec, "all"):
                errors[name][path] = None
                probe = _Probe(hook.state, steps, chosen[name], errors[name], path)
                handles.append(transformer.get_submodule(path).register_forward_hook(probe))
        generate(pipe, request, on_step or (lambda progress: None))
    finally:
        for handle in handles:
            handle.remove()
        restore(pipe)
    return {
        name: {path: _choice(found, chosen[name], max_error) for path, found in own.items()}
        for name, own in errors.items()
    }


def _choice(found: Tensor | None, precision: str, max_error: float) -> dict[str, Any]:
    error = None if found is None else found.item()
    return {"precision": "native" if error is None or error > max_error else precision, "error": error}


def _check_max_error(max_error: float) -> None:
    if not 0 < max_error < math.inf:
        raise ValueError(f"max_error must be > 0 and finite, got {max_error}")


class _Probe:
    """A forward hook of a linear that keeps the largest error of its 8-bit output, on the device."""

    def __init__(self, state: Any, steps: set[int], precision: str, errors: dict[str, Tensor | None], path: str):
        self.state, self.steps, self.precision, self.errors, self.path = state, steps, precision, errors, path

    @torch.no_grad()
    def __call__(self, linear: nn.Linear, args: tuple[Tensor, ...], out: Tensor) -> None:
        if self.state.step not in self.steps:
            return
        x, exact = args[0].flatten(0, -2), out.flatten(0, -2)
        rows = torch.linspace(0, len(x) - 1, min(ROWS, len(x)), device=x.device).long()
        x, exact = x[rows], exact[rows].float()
        if self.precision == "fp8":
            got = fp8_linear(quantize_rows(x), quantize_rows(linear.weight), linear.bias)
        elif self.precision == "int8-rows":
            got = int8_rows_matmul(quantize_int8_rows(x), quantize_int8_rows(linear.weight), linear.bias)
        else:
            got = int8_matmul(quantize_blocks(x, first_threshold(x)), quantize_blocks(linear.weight), linear.bias)
        error = (got.float() - exact).norm() / exact.norm().clamp_min(1e-30)
        error = torch.where(error.isfinite(), error, torch.inf)
        before = self.errors[self.path]
        self.errors[self.path] = error if before is None else torch.maximum(before, error)


def adapt_linears_job(job: Job, max_error: float, out: str | Path, **options: Any) -> dict[str, Any]:
    """`adapt_linears` for the command line: load the job's model, run it, and write the file.

    Args:
        job: the resolved job.
        max_error: as `adapt_linears`.
        out: the file to write.
        options: the other arguments of `adapt_linears`.

    Returns:
        What was written.

    Raises:
        As `adapt_linears`; OSError: the file cannot be written.
    """
    check_outputs({"out": out}, inputs_of(job))
    _check_max_error(max_error)
    check_job(job)
    check_offload(job.offload, resolve_device(job.device))
    pipe = load_pipeline(job.model, device=job.device, **job.loading)
    choices = adapt_linears(pipe, job.request, max_error, **options)
    about = {"model": job.model, "preset": job.preset, "max_error": max_error, "prompt": job.request.prompt}
    content = linears_content(choices, about)
    write_json(out, content)
    return content
