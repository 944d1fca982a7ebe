"""What a person sees of a tuning: stages, a line a video, and what came out."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ..sweep.cell import Cell
from .console import number
from .sweep_display import cell_line


class ConsoleDisplay:
    """Prints stages and finished cells.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console):
        self._console = console
        self._notes: set[str] = set()

    def stage(self, text: str) -> None:
        self._console.print(f"{text} ...", style="dim")

    def start(self, cells: list[Cell], finished: dict[str, dict[str, Any]], workers: int) -> None:
        """Nothing to say: stages say it."""

    def begin(self, cell: Cell) -> None:
        """Nothing to say."""

    def end(self, cell: Cell, record: dict[str, Any]) -> None:
        self._console.print(f"  {cell_line(cell, record)}", highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        if text not in self._notes:  # every trial opens the folder anew
            self._notes.add(text)
            self._console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def print_tuning(console: Console, result: dict[str, Any], out: str) -> None:
    """Print what was reached on held-out videos and at which cost, and where the preset is."""
    table = Table(title=f"held-out prompts: {len(result['prompts']['held-out'])}", title_justify="left")
    for heading in ("", "target", "dense steps", "density", "attention, s", "PSNR, dB", "LPIPS"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {
        "tuned": result["tuned"],
        "one for all, at the target": result["uniform"],
        "one for all, at equal cost": result["uniform_at_equal_cost"],
    }
    for name, trial in rows.items():
        if trial is None or "value" not in trial:
            continue
        met = {True: "reached", False: "missed"}.get(trial.get("met"), "")
        digits = (("density", 3), ("attention_seconds", 3), ("psnr", 2), ("lpips", 4))
        dense = f"{trial['dense_steps']} of {result['steps']}"
        table.add_row(f"{name} ({trial['label']})", met, dense, *(number(trial[key], n) for key, n in digits))
    console.print(table)
    unit = "attention time" if result["cost"]["unit"] == "seconds" else "density"
    for saved, where in (
        ("saved", "as tried, both at the target"),
        ("saved_at_equal_quality", "exactly at the target"),
    ):
        if result[saved] is not None:
            share = f"{100 * abs(result[saved]):.1f} % {'less' if result[saved] >= 0 else 'more'}"
            console.print(f"what was tuned needs {share} {unit} than one budget for all, {where}", highlight=False)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    files = ", ".join(filter(None, (result["preset"], "report.html", "tune.json", "search/report.html")))
    console.print(f"written to {out}: {files}", highlight=False)
