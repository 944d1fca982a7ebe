"""One `svg generate`: load, run accelerated, dense and control from one seed, and write each as it ends.

The accelerated video comes first: it is what was asked for. Whatever stops a later run, the videos before it stay,
with a report that says what is missing and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from svg.eval.compare import compare
from svg.eval.files import growing_folder, write_json
from svg.eval.page import build_page
from svg.eval.video import side_by_side, to_watch, write_video
from svg.pipelines import GenerationResult, StepProgress, accelerate, generate, load_pipeline, restore, validate_request
from svg.pipelines.attach import transformers_of
from svg.pipelines.branches import split_branches
from svg.pipelines.caches import disable_cache, enable_cache
from svg.pipelines.extras import check_size_for_cpu, compile_blocks, load_loras
from svg.pipelines.loading import check_offload, resolve_device
from svg.pipelines.model_files import BUNDLED
from svg.pipelines.processes import join, split_sequence

from ..config import DenseConfig, MethodConfig
from ..environment import anonymous
from .command_line import command_line
from .estimate import Estimate
from .job import RESULTS, Job, inputs_of
from .report import describe_device, make_report, overall_density, run_summary
from .several_gpus import rank
from .warm_up import control_config, is_plain, warm_up

__all__ = ["RESULTS", "describe_device", "overall_density", "run", "run_all", "run_summary", "to_uint8", "warm_up"]

FINISHED, PARTIAL, INTERRUPTED, FAILED = "finished", "partial", "interrupted", "failed"


class Display(Protocol):
    """Where a run tells how far it is."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def run(self, name: str, steps: int) -> AbstractContextManager[Callable[[StepProgress], None]]:
        """A timed run begins; call what it gives after each step."""
        ...


def run(job: Job, display: Display) -> dict[str, Any]:
    """Do a job and write its results, each video as it ends.

    Args:
        job: what to do.
        display: told about every stage and step.

    Returns:
        The report, as written to report.json. Its `state` is "finished", or "interrupted" or "failed" where a later run
        was stopped after an earlier one had been written; `stopped` then says in which run, and why.

    Raises:
        ValueError, TypeError, OSError: bad input; nothing is written.
        FloatingPointError: q, k or v, or the frames, of the first run held NaN or infinity; nothing is written.
        KeyboardInterrupt: before the first video was finished; nothing is written.
    """
    return next(run_all([job], display))


def run_all(jobs: Sequence[Job], display: Display) -> Iterator[dict[str, Any]]:
    """Do jobs that differ in their prompts and folders, with one load of the model.

    Args:
        jobs: what to do.
        display: told about every stage and step.

    Yields:
        The report of each as it ends; a job that was interrupted or failed is the last.

    Raises:
        As `run`, where the first video of a job was not finished; the jobs before it are written.
    """
    first, pipe = jobs[0], None
    for job in jobs:
        follows = bool(rank())  # another process writes
        place = (job.out, RESULTS, job.force, inputs_of(job), command_line(job))
        with nullcontext() if follows else growing_folder(*place) as folder:
            if pipe is None:
                display.stage(f"loading {first.model}{' (bundled)' if first.model == BUNDLED else ''}")
                pipe = load(first)
            validate_request(pipe, job.request)
            try:
                report = (_Follower if follows else _Run)(pipe, job, display, folder).everything()
            finally:
                disable_cache(pipe)
                restore(pipe)
        yield report
        if report["state"] != FINISHED:
            break


def load(job: Job) -> Any:
    """The pipeline of a job, with its LoRAs, compiled where that is asked for, on all GPUs where there are several."""
    device = resolve_device(job.device)
    check_offload(job.offload, device)
    check_size_for_cpu(job.model, device, job.revision, job.yes)
    # LoRAs wrap linears, blocks are compiled and sequences split as they are: these come first.
    config = None if job.loras or job.compiled or job.gpus > 1 else job.config
    name = job.device if job.gpus == 1 else str(join(device.type))
    pipe = load_pipeline(job.model, device=name, config=config, **job.loading)
    load_loras(pipe, job.loras)
    if job.gpus > 1:
        for transformer in transformers_of(pipe).values():
            (split_branches if job.split == "branches" else split_sequence)(transformer)
    if job.compiled:
        compile_blocks(pipe)
    return pipe


class _Run:
    """One job on a loaded pipeline: what is finished, what is written, and what was measured."""

    def __init__(self, pipe: Any, job: Job, display: Display, folder: Any):  # a GrowingFolder; None for a `_Follower`
        self.pipe, self.job, self.display, self.folder = pipe, job, display, folder
        self.results: dict[str, GenerationResult] = {}
        self.frames: dict[str, np.ndarray] = {}
        self.quality: dict[str, Any] = {}
        self.notes: list[str] = []
        self.written: set[str] = set()

    def everything(self) -> dict[str, Any]:
        names, name = self._names(), ""
        try:
            for name in names:
                self._attempt(name)
                self._publish(FINISHED if name == names[-1] else PARTIAL)
        except (Exception, KeyboardInterrupt) as error:
            if not self.frames:
                raise
            return self._stop(name, error)
        report = self._publish(FINISHED)
        self._finish()
        return report

    def _attempt(self, name: str) -> None:
        """One run; a control that fails leaves a note, because the others are worth keeping without it."""
        try:
            self._one(name)
        except Exception as error:
            if name != "control" or not self.frames or name in self.frames:
                raise
            self.notes.append(f"no control: {_one_line(error)}")

    def _finish(self) -> None:
        self.folder.finish()

    def _names(self) -> list[str]:
        sparse = self.job.config.method != "dense"
        dense = ["dense", "control"] if self.job.control else ["dense"]
        return [*(["accelerated"] if sparse else []), *(dense if self.job.dense else [])]

    def _one(self, name: str) -> None:
        if not is_plain(self.pipe, self.job):
            self.display.stage(f"warming up {name}")
        config, last_step = self._warmed_up(name)
        if config is None:
            return
        accelerate(self.pipe, config)
        if name == "accelerated" and self.job.cache is not None:
            enable_cache(self.pipe, self.job.cache, self.job.request.steps)
        label = config.method if name == "accelerated" else name
        with self.display.run(label, self.job.request.steps) as on_step:
            sparse_step = last_step if name == "accelerated" else None
            later = len(self._names()) - 1 - self._names().index(name)
            estimate = Estimate(self.pipe, self.job, config, later, sparse_step, self.display.stage)

            def step(progress: StepProgress) -> None:
                on_step(progress)
                estimate(progress)

            result = generate(self.pipe, self.job.request, step)
        disable_cache(self.pipe)
        self.frames[name] = to_uint8(result.frames, name)
        self.results[name] = result

    def _warmed_up(self, name: str) -> tuple[MethodConfig | None, float | None]:
        """What a run computes with, None where it cannot be made, and seconds of the warm-up's last step, if it had one."""
        job, plain = self.job, is_plain(self.pipe, self.job)
        if name == "control":
            return control_config(self.pipe, job, self.notes, warmed_up=not plain), None
        if name == "accelerated":
            config = job.config
        else:
            config = DenseConfig(dense_backend=job.config.dense_backend, check_finite=job.config.check_finite)
        return config, None if plain else warm_up(self.pipe, job, config)

    def _stop(self, name: str, error: BaseException) -> dict[str, Any]:
        """Keep what is there after a later run, its measurement or its file went wrong."""
        if isinstance(error, KeyboardInterrupt):
            return self._publish(INTERRUPTED, f"interrupted in the {name} run")
        return self._publish(FAILED, f"the {name} run failed: {_one_line(error)}")

    def _publish(self, state: str, stopped: str | None = None) -> dict[str, Any]:
        self._write_videos()
        if stopped is None:
            self._measure()
        report = make_report(self.job, self.pipe, self.results, self.quality, self.notes)
        report = {**report, "state": state, "stopped": stopped}
        write_json(self.folder.path / "report.json", report)
        self.folder.publish()
        try:
            build_page(self.job.out)
        except (OSError, ValueError) as error:
            self.notes.append(f"report.html could not be written: {error}; `svg page {self.job.out}` tries again")
        return report

    def _write_videos(self) -> None:
        fps = self.job.request.fps
        for name in ("accelerated", "dense"):
            if name in self.frames and name not in self.written:
                self.display.stage(f"writing {name}.mp4")
                write_video(self.folder.path / f"{name}.mp4", self.frames[name], fps)
                self.written.add(name)
        if {"dense", "accelerated"} <= self.frames.keys() and "pair" not in self.written:
            pair = side_by_side(self.frames["dense"], self.frames["accelerated"], ("dense", self.job.config.method))
            write_video(self.folder.path / "side_by_side.mp4", to_watch(pair, fps), fps)
            self.written.add("pair")

    def _measure(self) -> None:
        """Compare every run with dense, once; whatever fails is a note, never the end of a run."""
        if "dense" not in self.frames:
            return
        for name in self.frames.keys() - {"dense"} - self.quality.keys():
            self.display.stage(f"measuring {name} against dense")
            try:
                device = self.pipe._execution_device
                self.quality[name] = compare(self.frames["dense"], self.frames[name], self.job.lpips, device)
            except Exception as error:
                self.notes.append(f"quality of the {name} video could not be measured: {_one_line(error)}")


class _Follower(_Run):
    """A process that computes its part and writes nothing."""

    def _publish(self, state: str, stopped: str | None = None) -> dict[str, Any]:
        return {"state": state, "stopped": stopped, "runs": {}}

    def _finish(self) -> None:
        """Nothing was written."""


def _one_line(error: BaseException) -> str:
    return anonymous(f"{type(error).__name__}: {' '.join(str(error).split())}")


def to_uint8(frames: np.ndarray, name: str) -> np.ndarray:
    """Frames in [0, 1] as the 8-bit ones that are measured and written; NaN and infinity are refused."""
    if not np.isfinite(frames).all():
        raise FloatingPointError(f"frames of the {name} run must be finite, got NaN or infinity: try --dtype fp32")
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)
