"""What a person sees of a sweep: a line a finished cell, a bar with the time left, a table at the end."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from svg.eval.compare import failures
from svg.pipelines import StepProgress

from ..sweep.cell import Cell
from ..words import speed
from .console import METRICS, number, visible

_METRICS = ("psnr", "ssim", "lpips", "vmaf")


class TimeLeft:
    """Estimates what is left from what cells of the same kind took, on the clock.

    Args:
        workers: cells that run at a time.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._took: dict[tuple, list[float]] = defaultdict(list)

    def took(self, cell: Cell, seconds: float) -> None:
        """A cell was done in so many seconds."""
        self._took[_kind(cell)].append(seconds)

    def seconds(self, cells: list[Cell]) -> float | None:
        """Seconds until `cells` are done, or None before anything was."""
        known = [value for values in self._took.values() for value in values]
        if not known:
            return None
        mean = sum(known) / len(known)
        each = {kind: sum(values) / len(values) for kind, values in self._took.items()}
        return sum(each.get(_kind(cell), mean) for cell in cells) / self._workers


class SweepDisplay(AbstractContextManager):
    """Shows a sweep in a terminal; use it as a context.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console):
        self._console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[step]}"),
            TextColumn("{task.fields[left]}"),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: Any = None
        self._began: dict[str, float] = {}
        self._open: dict[str, Cell] = {}

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start(self, cells: list[Cell], finished: dict[str, dict[str, Any]], workers: int) -> None:
        done = f", {len(finished)} are finished already" if finished else ""
        self._console.print(f"{len(cells)} cells to run{done}", highlight=False)
        self._open = {cell.id: cell for cell in cells}
        self._left = TimeLeft(workers)
        self._task = self._progress.add_task("sweep", total=len(cells), step="", left="")
        self._progress.start()

    def begin(self, cell: Cell) -> None:
        self._began[cell.id] = time.perf_counter()
        self._progress.update(self._task, description=visible(cell.label), step="loading and warming up")

    def step(self, cell: Cell, progress: StepProgress) -> None:
        """A step of a cell is done (cells of this process only)."""
        self._progress.update(self._task, step=f"step {progress.step}/{progress.steps}")

    def end(self, cell: Cell, record: dict[str, Any]) -> None:
        self._open.pop(cell.id)
        if cell.id in self._began and record["status"] == "finished":
            self._left.took(cell, time.perf_counter() - self._began[cell.id])
        left = self._left.seconds(list(self._open.values()))
        shown = "" if left is None else f"{clock(left)} left"
        self._progress.update(self._task, advance=1, step="", left=shown)
        line = f"{cell_line(cell, record)}{f'  [{shown}]' if shown else ''}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def print_summary(console: Console, summary: dict[str, Any], out: str) -> None:
    """Print a sweep's means over prompts and seeds, failures and where the results are."""
    title = "means over prompts and seeds, against dense from the same seed"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0, pad_edge=False)
    table.add_column("", min_width=18, overflow="fold")  # a long label folds before a number is cut
    for heading in ("cells", "density", "seconds", "against dense", *(METRICS[metric][0] for metric in _METRICS)):
        table.add_column(heading, justify="right", min_width=min(len(heading), 6))
    groups = defaultdict(list)
    for cell in summary["cells"]:
        if cell["status"] == "finished":
            groups[cell["model"]["name"], cell["label"]].append(cell)
    several = len({name for name, _ in groups}) > 1
    for (name, label), cells in groups.items():
        speedups = [cell["speedup"]["end_to_end"] for cell in cells if cell["speedup"]]
        table.add_row(
            f"{name} {label}" if several else label,
            str(len(cells)),
            number(_mean(_known([cell["density"]["all_calls"] for cell in cells])), 3),
            number(_mean([cell["seconds"]["end_to_end"] for cell in cells]), 2),
            speed(_mean(speedups)),
            *(number(_quality(cells, metric), METRICS[metric][1]) for metric in _METRICS),
        )
    console.print(table)
    failed = [cell for cell in summary["cells"] if cell["status"] == "failed"]
    for cell in failed:
        console.print(f"failed: {_where(cell)}: {cell['error']['message']}", highlight=False, markup=False)
    measured = [cell["quality"] for cell in summary["cells"] if cell["status"] == "finished" and cell["quality"]]
    for note in dict.fromkeys(note for quality in measured for note in failures(quality)):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    counts = summary["counts"]
    kept = "videos" if any(cell["video"] for cell in summary["cells"]) else "frames"
    shares = ", ".join(f"{counts[status]} {status}" for status in ("finished", "failed", "pending") if counts[status])
    console.print(
        f"{shares or 'no'} cells; written to {out}: report.html, sweep.json, {kept}/, journal/", highlight=False
    )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _kind(cell: Cell) -> tuple:
    return cell.model["name"], cell.label


def cell_line(cell: Cell, record: dict[str, Any]) -> str:
    """What a finished or failed cell came to, in one line."""
    where = f"{cell.label}, seed {cell.generation['seed']}, {_short(cell.generation['prompt'])}"
    if record["status"] == "failed":
        return f"failed: {where}: {record['error']['message']}"
    psnr = "" if record["quality"] is None else f", PSNR {_number(record['quality']['psnr']['mean'])} dB"
    return (
        f"{where}: {record['seconds']['end_to_end']:.2f} s, density {number(record['density']['all_calls'], 3)}{psnr}"
    )


def print_recorded(console: Console, result: dict[str, Any], out: str) -> None:
    """Print each method's means over calls and heads, and its worst head."""
    table = Table(title="means over recorded calls and heads", title_justify="left")
    for heading in ("", "density", "recall", "output error", "worst head"):
        table.add_column(heading, justify="right" if heading else "left")
    groups = defaultdict(list)
    for row in result["rows"]:
        groups[row["label"]].append(row)
    for label, rows in groups.items():
        means = [_mean([row[key] for row in rows if row[key] is not None]) for key in ("density", "recall", "error")]
        worst = max(rows, key=lambda row: row["error"])
        where = f"{worst['error']:.3f} (step {worst['step']}, layer {worst['layer']}, head {worst['head']})"
        table.add_row(label, *(number(mean, 4) for mean in means), where)
    console.print(table)
    console.print(f"written to {out}: recorded.json, report.html", highlight=False)


def _where(cell: dict[str, Any]) -> str:
    return f"{cell['label']}, seed {cell['generation']['seed']}, {_short(cell['generation']['prompt'])}"


def _short(prompt: str) -> str:
    return f"'{prompt}'" if len(prompt) <= 40 else f"'{prompt[:37]}...'"


def _number(value: float | str | None) -> str:
    return number(None if value is None else float(value), 2)


def _quality(cells: list[dict[str, Any]], metric: str) -> float | None:
    """Mean over the cells; an infinite PSNR (identical) counts only where all are, as it does over frames."""
    means = [cell["quality"][metric]["mean"] for cell in cells if cell["quality"]]
    values = [float(mean) for mean in means if mean is not None]
    finite = [value for value in values if math.isfinite(value)]
    return _mean(finite or values)


def _known(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
