"""`svg sweep`: every cell generated once, journalled, resumed after a kill; the journal is written here alone."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from svg.eval.files import atomic_path, write_json
from svg.eval.names import METRICS
from svg.eval.page.sweep import load_cell
from svg.eval.video import VideoError, ffmpeg_is_there, write_video

from ..environment import anonymous, version_problems, versions
from ..generate.command_line import command_line
from .cell import VERSION, Cell
from .journal import Journal
from .pool import Pool

ATTEMPTS = 3  # a worker lost that often in one cell is the cell's fault
_POLL = 0.2
NO_FFMPEG = (
    "ffmpeg is missing: raw frames are kept in frames/ instead of videos; `pip install imageio-ffmpeg`, then "
    "`svg sweep --no-run --out` with this folder writes the videos and measures the rest"
)


class Display(Protocol):
    """Where a sweep tells how far it is."""

    def start(self, cells: list[Cell], finished: dict[str, dict[str, Any]], workers: int) -> None:
        """The cells to run are known."""

    def begin(self, cell: Cell) -> None:
        """A cell begins."""

    def end(self, cell: Cell, record: dict[str, Any]) -> None:
        """A cell is finished or has failed."""

    def note(self, text: str) -> None:
        """Something to know."""


class Results:
    """The folder of a sweep: journal, frames, videos, sweep.json.

    Args:
        out: the folder.
        cells: the cells of the grid.
        header: what sweep.json says of the sweep: command, lpips.
        keep_frames: keep raw frames of every cell.
        notes: what a reader of the results must know from the start.
    """

    def __init__(
        self,
        out: str | Path,
        cells: list[Cell],
        header: dict[str, Any],
        keep_frames: bool = False,
        notes: Sequence[str] = (),
    ):
        self.out, self.cells = Path(os.path.abspath(out)), cells
        self.journal = Journal(self.out, VERSION)
        self.records: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._header = {**header, "created": now(), "versions": versions()}
        self._keep_frames, self._notes = keep_frames, list(notes)
        self._first_blocks = {cell.id: _first_block(cell) for cell in cells}
        self._frames: tuple[str, np.ndarray] | None = None

    def load(self) -> None:
        """Read what is finished; call it with the journal locked."""
        for folder in ("videos", "frames"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        found, problems = self.journal.read()
        self.notes = [*self._notes, *problems]
        for cell in self.cells:
            if cell.id in found and self._is_usable(cell, found[cell.id]):
                self.records[cell.id] = found[cell.id]
            elif cell.id in found:
                self.notes.append(f"{cell.id}.json in the journal is not used: it is not as svg writes it")
        if not ffmpeg_is_there():
            self.notes.append(NO_FFMPEG)

    def _is_usable(self, cell: Cell, record: dict[str, Any]) -> bool:
        """Whether a record has all that the summary and the page show of it, in the right types."""
        try:
            shown = load_cell({**self._first_blocks[cell.id], **record}, self.out)
            numbers = [*record["seconds"].values(), shown["density"]["all_calls"]] if shown["density"] else []
            quality = record["quality"] if record["status"] == "finished" else None
            numbers += [quality[name]["mean"] for name in METRICS] if quality else []
            [float(number) for number in numbers if number is not None]
            return record["status"] == "failed" or (record["status"] == "finished" and len(numbers) > 4)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            return False

    def store(self, cell: Cell, record: dict[str, Any], frames: np.ndarray | None) -> dict[str, Any]:
        """Write a cell's files, then its journal entry, then sweep.json.

        Args:
            cell: the cell.
            record: what is known of it, "status" first.
            frames: uint8 [F, H, W, 3], or None for a failed cell.

        Returns:
            The record with the names of its files.

        Raises:
            OSError: the folder cannot be written to, such as on a full disk; entries before this one are intact.
        """
        with self._writing():
            files = {} if frames is None else self._write_files(cell, frames)
            record = {**record, **files}
            self.journal.write(cell.id, record, [name for name in files.values() if name is not None])
            self.records[cell.id] = record
        self.write_summary()
        return record

    def reference(self, cell: Cell) -> np.ndarray | None:
        """Raw frames of a cell's dense cell, uint8 [F, H, W, 3]; None for a dense cell."""
        if cell.reference is None:
            return None
        if self._frames is None or self._frames[0] != cell.reference:
            self._frames = (cell.reference, read_frames(self.out / self.records[cell.reference]["frames"])[0])
        return self._frames[1]

    def status(self, cell_id: str | None) -> str:
        """finished, failed or pending."""
        return self.records.get(cell_id or "", {}).get("status", "pending")

    def count(self, status: str) -> int:
        return sum(self.status(cell.id) == status for cell in self.cells)

    def write_summary(self) -> dict[str, Any]:
        """Write sweep.json and return it."""
        counts = {status: self.count(status) for status in ("finished", "failed", "pending")}
        summary = {
            "format": "svg-sweep",
            "version": VERSION,
            "state": "running" if counts["pending"] else "finished",
            **self._header,
            "updated": now(),
            "counts": {"total": len(self.cells), **counts},
            "cells": [self._entry(cell) for cell in self.cells],
            "notes": self.notes,
        }
        with self._writing():
            write_json(self.out / "sweep.json", summary)
        return summary

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk is told as what it is, with what it spared."""
        try:
            yield
        except (OSError, VideoError) as error:
            raise OSError(
                f"{self.out} could not be written to ({error}): {self.count('finished')} finished cells in it are intact; "
                f"make room and run the same command again"
            ) from error

    def _entry(self, cell: Cell) -> dict[str, Any]:
        record = self.records.get(cell.id, {"status": "pending"})
        entry = {**self._first_blocks[cell.id], **record}
        if record["status"] == "finished" and cell.reference and self.status(cell.reference) == "finished":
            before, after = self.records[cell.reference]["seconds"], record["seconds"]
            entry["speedup"] = {
                stage: before[stage] / after[stage] for stage in after if after[stage] and before[stage]
            }
        return entry

    def _write_files(self, cell: Cell, frames: np.ndarray) -> dict[str, str | None]:
        fps, videos = cell.generation["fps"], ffmpeg_is_there()
        keep = self._keep_frames or not videos or cell.role != "accelerated"
        files = {
            "video": f"videos/{cell.id}.mp4" if videos else None,
            "frames": f"frames/{cell.id}.npz" if keep else None,
        }
        if files["video"]:
            write_video(self.out / files["video"], frames, fps)
        if files["frames"]:
            write_frames(self.out / files["frames"], frames, fps)
        return files


def run_sweep(results: Results, pool: Callable[[], Pool], display: Display) -> dict[str, Any]:
    """Run every cell that isn't finished; failed ones are tried again.

    Args:
        results: the folder and the cells.
        pool: makes the workers, once it is known that there is something to do.
        display: told how far it is.

    Returns:
        sweep.json.

    Raises:
        JournalError: the folder is in use, or its journal has another version.
        ValueError: versions of libraries are too old.
        OSError: the folder cannot be written to; finished cells are intact.
    """
    problems = version_problems()
    if problems:
        raise ValueError("; ".join(problems))
    with results.journal.locked():
        results.load()
        for note in results.notes:
            display.note(note)
        results.write_summary()
        waiting = [cell for cell in results.cells if results.status(cell.id) != "finished"]
        for cell in waiting:
            results.records.pop(cell.id, None)
        if waiting:
            workers = pool()
            try:
                display.start(waiting, results.records, workers.size)
                _Run(results, workers, display, waiting).until_done()
            finally:
                workers.close()
        return results.write_summary()


class _Run:
    """One pass over the waiting cells: hands each to an idle worker once its reference is there."""

    def __init__(self, results: Results, pool: Pool, display: Display, waiting: list[Cell]):
        self._results, self._pool, self._display = results, pool, display
        self._waiting = list(waiting)
        self._running: dict[Future, tuple[int, Cell]] = {}
        self._idle = list(range(pool.size))
        self._models: dict[int, str] = {}  # what each worker has loaded
        self._attempts: Counter[str] = Counter()

    def until_done(self) -> None:
        while self._waiting or self._running:
            self._hand_out()
            done, _ = wait(self._running, timeout=_POLL, return_when=FIRST_COMPLETED)
            for future in done:
                slot, cell = self._running.pop(future)
                self._idle.append(slot)
                self._finish(slot, cell, future)

    def _hand_out(self) -> None:
        for slot in sorted(self._idle):
            cell = self._next(slot)
            if cell is None:
                continue
            self._idle.remove(slot)
            self._waiting.remove(cell)
            self._attempts[cell.id] += 1
            self._models[slot] = cell.model["name"]
            self._display.begin(cell)
            self._running[self._pool.submit(slot, cell, self._results.reference(cell))] = (slot, cell)

    def _next(self, slot: int) -> Cell | None:
        """The first cell whose reference is there; of the worker's model, if there is one."""
        ready = [c for c in self._waiting if c.reference is None or self._results.status(c.reference) == "finished"]
        same = [cell for cell in ready if cell.model["name"] == self._models.get(slot)]
        return next(iter(same or ready), None)

    def _finish(self, slot: int, cell: Cell, future: Future) -> None:
        error = future.exception()
        if error is None:
            record, frames = future.result()
            self._store(cell, {"status": "finished", **record}, frames)
        elif not self._pool.lost(slot, error):
            self._fail(cell, _describe(error))
        elif self._attempts[cell.id] < ATTEMPTS:
            self._display.note(f"{cell.label}: its worker was lost, it runs again")
            self._waiting.insert(0, cell)
        else:
            self._fail(cell, {**_describe(error), "message": f"its worker was lost {ATTEMPTS} times: {error}"})

    def _fail(self, cell: Cell, error: dict[str, str]) -> None:
        self._store(cell, {"status": "failed", "error": error}, None)
        for other in [other for other in self._waiting if other.reference == cell.id]:
            self._waiting.remove(other)
            message = f"its dense reference {cell.id} failed: {error['message']}"
            self._store(other, {"status": "failed", "error": {**error, "message": message}}, None)

    def _store(self, cell: Cell, record: dict[str, Any], frames: np.ndarray | None) -> None:
        record = self._results.store(cell, {**record, "attempts": self._attempts[cell.id]}, frames)
        self._display.end(cell, record)


def write_frames(path: Path, frames: np.ndarray, fps: float) -> None:
    """Keep raw frames, compressed without loss; the file, an npz, appears whole or not at all."""
    values = {"frames": frames, "fps": np.asarray(fps)}
    # numpy's own level, 6, takes three times as long for a tenth less.
    with atomic_path(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, value in values.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


def read_frames(path: Path) -> tuple[np.ndarray, float]:
    """Raw frames uint8 [F, H, W, 3] and frames per second, as `write_frames` kept them."""
    with np.load(path, allow_pickle=False) as content:
        return content["frames"], float(content["fps"])


def _first_block(cell: Cell) -> dict[str, Any]:
    known = dataclasses.asdict(cell)
    empty = dict.fromkeys(("error", "video", "frames", "quality", "seconds", "speedup", "density", "transformers"))
    return {"id": cell.id, **known, "status": "pending", "reproduce": _reproduce(cell), **empty}


def _reproduce(cell: Cell) -> str:
    """The command that makes a cell again: a peer's is a sweep, for `svg generate` runs svg's methods alone."""
    job = cell.job()
    if job.peer is None:
        return command_line(job)
    size = {"height": job.request.height, "width": job.request.width, "frames": job.request.num_frames}
    size |= {name: getattr(job.request, name) for name in ("steps", "guidance", "fps")} | {"seeds": job.request.seed}
    words = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    head = ["svg", "sweep", "--model", job.model, "--methods", "dense", "--peers", job.peer]
    return shlex.join([*head, *words, "--prompt", job.request.prompt])


def _describe(error: BaseException) -> dict[str, str]:
    cause = getattr(error, "cause", None) or error  # Ray wraps what a cell raised
    text = re.sub(r'File "[^"]*?([^/"]*)"', r'File "\1"', "".join(traceback.format_exception(error)))
    message = anonymous(" ".join(str(cause).split()))  # whose machine it was is nobody's business
    return {"type": type(cause).__name__, "message": message, "traceback": anonymous(text)}


def now() -> str:
    """The time in ISO form, with its zone."""
    return datetime.now(UTC).isoformat(timespec="seconds")
