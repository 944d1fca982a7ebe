"""Where settings are tried on videos: a sweep's folder that grows by a cell at a time, and a model that stays loaded."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svg.pipelines import StepProgress

from ..config import DenseConfig, MethodConfig
from ..generate.job import Job
from ..sweep.cell import Cell, cell_of
from ..sweep.pool import LocalPool
from ..sweep.run import Display, Results, run_sweep
from ..sweep.worker import Stopped
from .calibrate import calibrate


class KeptPool(LocalPool):
    """One worker that outlives the sweeps it serves: the model is loaded once."""

    def close(self) -> None:
        """Keep the worker; `end` stops it."""

    def end(self) -> None:
        """Stop what runs and give everything back."""
        super().close()

    def calibrate(self, cell: Cell, config: MethodConfig, **options: Any) -> dict[str, Any]:
        """`calibrate` on the worker's model, in the worker's thread.

        Args:
            cell: a cell of that model: which request.
            config: settings of the method that is tuned.
            options: levels, steps and probe of `calibrate`.

        Returns:
            What `calibrate` gives.
        """

        def work() -> dict[str, Any]:
            job = cell.job()
            return calibrate(self._worker.load(cell, job), job.request, config, on_step=self._check, **options)

        return self._thread.submit(work).result()

    def _check(self, progress: StepProgress) -> None:
        if self._worker.stop.is_set():
            raise Stopped("the tuning was interrupted")


class Stage:
    """One set of prompts and the cells generated for them; its folder is that of a sweep, page included.

    Args:
        out: the folder.
        job: model, size and everything else but method, prompt and seed.
        prompts, seeds: what to generate, each prompt with each seed.
        control: whether to add dense once more on another backend.
        place: mark, device, dtype of `cell_of`.
        header: command and lpips, for sweep.json.
        pool: gives the worker.
        display: told how far it is.
    """

    def __init__(
        self,
        out: Path,
        job: Job,
        prompts: list[str],
        seeds: list[int],
        control: bool,
        place: dict[str, Any],
        header: dict[str, Any],
        pool: Callable[[], KeptPool],
        display: Display,
    ):
        self.out = out
        self._job, self._place, self._header = job, place, header
        self._pool, self._display = pool, display
        self._videos = list(itertools.product(prompts, seeds))
        self._cells: dict[str, Cell] = {}
        self.dense = [self._cell(video, DenseConfig(), "dense", "dense") for video in self._videos]
        self._controls = {
            cell.id: self._cell(video, DenseConfig(), "control", "control", cell)
            for video, cell in zip(self._videos, self.dense)
            if control
        }

    def try_out(self, config: MethodConfig, label: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Generate every video with a method, or find them generated.

        Args:
            config: its settings.
            label: what the page calls it.

        Returns:
            Records of the videos, and of their dense references.

        Raises:
            ValueError: a cell failed; what is finished stays.
        """
        wanted = []
        for video, dense in zip(self._videos, self.dense):
            control = self._controls.get(dense.id)
            cell = self._cell(video, config, "accelerated", label, dense)
            for one in filter(None, (dense, control, cell)):
                one = dataclasses.replace(one, control=control and control.id)
                self._cells.setdefault(one.id, one)
            wanted.append(cell.id)
        ordered = sorted(self._cells.values(), key=lambda cell: (cell.generation["prompt"], cell.generation["seed"]))
        results = Results(self.out, ordered, self._header)
        run_sweep(results, self._pool, self._display)
        records = [results.records[name] for name in (*wanted, *(cell.id for cell in self.dense))]
        for record in records:
            if record["status"] != "finished":
                raise ValueError(f"{label} could not be generated: {record['error']['message']}")
        return records[: len(wanted)], records[len(wanted) :]

    def _cell(
        self, video: tuple[str, int], config: MethodConfig, role: str, label: str, reference: Cell | None = None
    ) -> Cell:
        request = dataclasses.replace(self._job.request, prompt=video[0], seed=video[1])
        job = dataclasses.replace(self._job, request=request, config=config)
        return cell_of(job, role=role, label=label, reference=reference, **self._place)
