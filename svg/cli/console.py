"""What a person sees in the terminal: progress while a run goes on, tables at its end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ..words import speed

if TYPE_CHECKING:
    from svg.pipelines import StepProgress

    from ..generate.job import Job


_STAGES = {
    "end to end, s": "end_to_end",
    "transformer, s": "transformer",
    "attention, s": "attention",
    "VAE decoder, s": "vae",
}

# metric -> label and digits, in the order of tables
METRICS = {
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "vmaf": ("VMAF", 2),
    "temporal_psnr": ("temporal PSNR, dB", 2),
}
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text whose control characters are spelled out: a terminal obeys none of them."""
    return _UNSEEN.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Terminal(Console):
    """A console that prints texts as they are: names and prompts are no markup, no emoji codes and no control sequences."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, quiet=quiet)

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich's, of the visible text."""
        return super().render_str(visible(text), **options)


class TerminalDisplay:
    """Shows stages as lines and runs as a bar with step, seconds and live density.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console):
        self._console = console

    def stage(self, text: str) -> None:
        self._console.print(f"{text} ...", style="dim")

    @contextmanager
    def run(self, name: str, steps: int) -> Iterator[Callable[[StepProgress], None]]:
        columns = (
            TextColumn("{task.description:<8}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[seconds]:.1f} s"),
            TextColumn("density {task.fields[density]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=steps, seconds=0.0, density="-")

            def on_step(state: StepProgress) -> None:
                density = number(state.density(), 3)
                progress.update(task, completed=state.step, seconds=state.seconds, density=density)

            yield on_step


def print_job(console: Console, job: Job) -> None:
    """Print what was resolved from preset and flags, before anything runs."""
    request = job.request
    size = f"{request.num_frames} x {request.height} x {request.width} (frames x height x width)"
    settings = ", ".join(f"{key}={value}" for key, value in job.config.to_dict().items())
    for line in (
        f"model   {job.model}{f', preset {job.preset}' if job.preset else ''}",
        f"video   {size}, {request.steps} steps, guidance {request.guidance}, seed {request.seed}",
        f"method  {settings}",
    ):
        console.print(line, highlight=False)


def print_report(console: Console, report: dict[str, Any], out: str) -> None:
    """Print a report of `svg generate` as one table and its notes."""
    runs, quality = report["runs"], report["quality"]
    table = Table(title=_title(report), title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(_heading(name, report), justify="right")
    for label, key in _STAGES.items():
        table.add_row(label, *(_seconds(name, key, report) for name in runs))
    for label, key in (("density, all calls", "all_calls"), ("density, sparse calls", "sparse_calls")):
        table.add_row(label, *(_density(name, key, report) for name in runs))
    if quality:
        table.add_section()
        for label, metric, digits in _metrics(next(iter(quality.values()))):
            cells = {name: number(part[metric]["mean"], digits) for name, part in quality.items()}
            table.add_row(label, *(cells.get(name, "reference") for name in runs))
    console.print(table)
    kinds = _head_kinds(runs.get("accelerated"))
    if kinds:
        console.print(f"head kinds over the sparse calls: {kinds}")
    for note in report["notes"]:
        console.print(f"note: {note}", highlight=False)
    console.print(f"written to {out}: {', '.join(_written(runs))}", highlight=False)


def print_comparison(console: Console, reference: str, output: str, result: dict[str, Any]) -> None:
    """Print what `svg evaluate` measured."""
    console.print(f"{output} against {reference}:", highlight=False)
    title = f"{result['frames']} frames of {result['width']} x {result['height']}"
    table = Table("", title=title, title_justify="left")
    for heading in ("mean", "worst frame"):
        table.add_column(heading, justify="right")
    for label, metric, digits in _metrics(result):
        values = result[metric].get("per_frame")
        worst = max if metric == "lpips" else min
        table.add_row(label, number(result[metric]["mean"], digits), number(worst(values), digits) if values else "-")
    console.print(table)
    if result.get("clip"):
        _print_clip(console, result["clip"])


def _print_clip(console: Console, clip: dict[str, Any]) -> None:
    """How good both videos are by themselves."""
    table = Table("", "reference", "output", title="by themselves, as CLIP sees them", title_justify="left")
    for name in ("text", "consistency"):
        cells = (clip[video][name] for video in ("reference", "output"))
        table.add_row(f"CLIP, {name}", *(number(cell and cell["mean"], 4) for cell in cells))
    console.print(table)


def print_comparisons(console: Console, reference: str, output: str, result: dict[str, Any]) -> None:
    """Print what `svg evaluate` measured of two folders."""
    console.print(f"{output} against {reference}:", highlight=False)
    measured = [pair for pair in result["pairs"] if "error" not in pair]
    if measured:
        table = Table("video", title="means over the frames", title_justify="left")
        columns = _metrics(measured[0])
        for label, _, _ in columns:
            table.add_column(label, justify="right")
        for pair in measured:
            table.add_row(pair["name"], *(number(pair[metric]["mean"], digits) for _, metric, digits in columns))
        table.add_section()
        table.add_row("mean", *(number(result["mean"][metric], digits) for _, metric, digits in columns))
        console.print(table)
    for pair in result["pairs"]:
        if "error" in pair:
            console.print(f"not measured: {pair['name']}: {pair['error']}", highlight=False)
    notes = dict.fromkeys(note for pair in measured for note in pair["notes"])
    for note in notes:
        console.print(f"note: {note}", highlight=False)


def number(value: float | None, digits: int) -> str:
    """Format a number for a table: "-" for None, "inf" for infinity."""
    if value is None:
        return "-"
    return "inf" if math.isinf(value) else f"{value:.{digits}f}"


def _title(report: dict[str, Any]) -> str:
    device = report["device"].get("name") or f"CPU, {report['device']['threads']} threads"
    return f"{report['model']['name']} on {device}, {report['model']['dtype']}"


def _heading(name: str, report: dict[str, Any]) -> str:
    if name == "accelerated":
        return report["method"]["method"]
    backend = report["runs"][name]["config"]["dense_backend"]
    return f"{name} ({backend})"


def _seconds(name: str, key: str, report: dict[str, Any]) -> str:
    seconds = number(report["runs"][name]["seconds"][key], 2)
    speedup = (report["speedup"] or {}).get(key)
    return f"{seconds} ({speed(speedup)})" if name == "accelerated" and speedup else seconds


def _density(name: str, key: str, report: dict[str, Any]) -> str:
    if name == "accelerated":
        return number(report["density"][key], 3)
    return number(1.0 if key == "all_calls" else None, 3)


def _metrics(result: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Label, key and digits of each metric of a comparison."""
    net = f" ({result['lpips']['net']})"
    return [(label + net * (metric == "lpips"), metric, digits) for metric, (label, digits) in METRICS.items()]


def _head_kinds(run: dict[str, Any] | None) -> str:
    parts = []
    for name, transformer in (run or {"transformers": {}})["transformers"].items():
        shares = [layer["temporal"] for layer in (transformer["head_kinds"] or {}).values()]
        if shares:
            mean = sum(shares) / len(shares)
            parts.append(f"{name} {1 - mean:.0%} spatial, {mean:.0%} temporal")
    return "; ".join(parts)


def _written(runs: dict[str, Any]) -> list[str]:
    videos = [f"{name}.mp4" for name in ("dense", "accelerated") if name in runs]
    return [*videos, *(["side_by_side.mp4"] if len(videos) == 2 else []), "report.html", "report.json"]


def bench_line(key: str, entry: dict[str, Any]) -> str:
    """One result of `svg bench` as a line.

    Args:
        key: the result's key.
        entry: its fields.

    Returns:
        Key, value, unit, density, goal and baseline.
    """
    from ..bench.report import goal, number

    density = "" if entry["density"] is None else f"density {number(entry['density'])}"
    parts = (goal(key, entry["value"]), density, entry["baseline"] or "")
    return f"{key:<58} {number(entry['value']):>8} {entry['unit']:<10} " + "  ".join(part for part in parts if part)
