"""What generates a cell: one model held in memory, warmed up once a setting; knows no folder and no other cell."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from svg.eval.compare import compare
from svg.pipelines import GenerationResult, StepProgress, accelerate, generate, load_pipeline, restore, validate_request
from svg.pipelines.caches import disable_cache, enable_cache
from svg.pipelines.fingerprint import fingerprint
from svg.pipelines.peers import find_peer, use_peer

from ..config import MethodConfig
from ..environment import versions
from ..generate.job import Job
from ..generate.report import describe_device, overall_density, run_summary, seconds_of
from ..generate.run_job import to_uint8
from ..generate.warm_up import WARMUP_STEPS, control_config, warm_up
from .cell import Cell


class Stopped(RuntimeError):
    """A cell was broken off because the sweep was."""


class Worker:
    """Generates cells one after the other; a model is loaded when the first cell asks for it.

    Args:
        device: "cpu", "cuda" or "cuda:<index>": which one of the kind that cells ask for.
        threads: CPU threads of torch, or None to leave them.
        on_step: told about every step, or None.

    Attributes:
        stop: an event; once it is set, a cell breaks off at its next step.
    """

    def __init__(
        self,
        device: str,
        threads: int | None = None,
        on_step: Callable[[Cell, StepProgress], None] | None = None,
    ):
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.stop = threading.Event()
        self._device = device
        self._on_step = on_step
        self._loaded: tuple | None = None
        self._pipe: Any = None
        self._configs: dict[tuple, MethodConfig | None] = {}  # what is warmed up, and what a control runs as

    def run(self, cell: Cell, reference: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray]:
        """Generate a cell and measure it.

        Args:
            cell: the cell.
            reference: frames of its dense cell, uint8 [F, H, W, 3]; None for a dense cell.

        Returns:
            record: what sweep.json says of a finished cell beyond the cell itself, files apart.
            frames: uint8 [F, H, W, 3].

        Raises:
            What loading, generating and measuring raise.
        """
        started, job = datetime.now(UTC), cell.job()
        pipe = self.load(cell, job)
        validate_request(pipe, job.request)
        run = self._run_ours if job.peer is None else self._run_peer
        result, summary = run(pipe, cell, job)
        frames = to_uint8(result.frames, cell.label)
        device = pipe._execution_device
        return {
            "method": summary["config"],
            "quality": None if reference is None else compare(reference, frames, job.lpips, device),
            "seconds": summary["seconds"],
            "density": _density(summary, job.peer),
            "transformers": summary["transformers"],
            "pipeline": type(pipe).__name__,
            "device": describe_device(device),
            "versions": versions(),
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }, frames

    def _run_ours(self, pipe: Any, cell: Cell, job: Job) -> tuple[GenerationResult, dict[str, Any]]:
        try:
            config = self._warmed_up(pipe, cell, job)
            accelerate(pipe, config)
            if job.cache is not None:
                enable_cache(pipe, job.cache, job.request.steps)
            result = generate(pipe, job.request, lambda progress: self._step(cell, progress))
        finally:
            disable_cache(pipe)
            restore(pipe)
        return result, run_summary(result)

    def _run_peer(self, pipe: Any, cell: Cell, job: Job) -> tuple[GenerationResult, dict[str, Any]]:
        """The plain pipeline with a peer, after an untimed run: what its attention takes and skips is not known."""
        assert job.peer is not None
        with use_peer(pipe, job.peer):
            generate(pipe, replace(job.request, steps=WARMUP_STEPS), lambda progress: self._step(cell, progress))
            result = generate(pipe, job.request, lambda progress: self._step(cell, progress))
        return result, {"config": job.config.to_dict(), "seconds": seconds_of(result), "transformers": {}}

    def load(self, cell: Cell, job: Job) -> Any:
        """The pipeline of a cell; it stays until another model is asked for.

        Args:
            cell: a cell.
            job: its job.

        Returns:
            The pipeline, plain.

        Raises:
            ValueError: as `svg.pipelines.load_pipeline`.
        """
        key = (
            cell.model["name"],
            cell.model["fingerprint"],
            *(v for k, v in cell.run.items() if k not in ("lpips", "cache", "peer")),
        )
        if key != self._loaded:
            self._pipe, self._loaded, self._configs = None, None, {}  # two models at once may not fit
            if fingerprint(job.model) != cell.model["fingerprint"]:
                raise ValueError(f"{job.model} changed since the sweep began: run the same command again")
            self._pipe = load_pipeline(job.model, device=self._device, **job.loading)
            self._loaded = key
        return self._pipe

    def _warmed_up(self, pipe: Any, cell: Cell, job: Job) -> MethodConfig:
        """Compile and allocate, untimed, once for every setting and size."""
        request = job.request
        key = (
            cell.role,
            job.config.for_warm_up(),
            request.height,
            request.width,
            request.num_frames,
            request.guidance > 1,
        )
        if key not in self._configs:
            warm_up(pipe, job, job.config)  # tells a control how large the attention map is
            self._configs[key] = self._control(pipe, job) if cell.role == "control" else None
        return self._configs[key] or job.config

    def _control(self, pipe: Any, job: Job) -> MethodConfig:
        notes: list[str] = []
        config = control_config(pipe, job, notes)
        if config is None:
            raise ValueError("; ".join(notes))
        return config

    def _step(self, cell: Cell, progress: StepProgress) -> None:
        if self.stop.is_set():
            raise Stopped("the sweep was interrupted")
        if self._on_step is not None:
            self._on_step(cell, progress)


def _density(summary: dict[str, Any], peer: str | None) -> dict[str, float | None]:
    if peer is not None:
        return {"all_calls": 1.0 if find_peer(peer).exact else None, "sparse_calls": None}
    if summary["config"]["method"] == "dense":
        return {"all_calls": 1.0, "sparse_calls": None}
    return overall_density(summary) or {}
