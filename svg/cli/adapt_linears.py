"""`svg adapt-linears`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import model_option, pop_run_options, preset_option, run_options, seed_option, size_options
from .panels import Command
from .process import quiet_loading


@click.command(cls=Command)
@click.argument("prompt")
@model_option
@preset_option
@size_options
@click.option("--negative-prompt", help="What the videos must not show.")
@seed_option
@run_options
@click.option(
    "--max-error", type=float, default=0.05, show_default=True, help="Most relative L2 error of a linear's output."
)
@click.option("--out", type=click.Path(dir_okay=False), default="linears.json", show_default=True)
def adapt_linears(prompt: str, **options: Any) -> None:
    """Run PROMPT dense, choose which linears run in 8 bits, for `svg generate --linears FILE`.

    Each is given what it gets in three steps of the run; those whose output would err more stay in 16 bits.

    \b
    Example:
      svg adapt-linears "a red ball" --max-error 0.04 --out linears.json
    """
    from ..generate.job import resolve
    from ..recordings.linear_precisions import adapt_linears_job
    from .console import Terminal

    quiet_loading()
    out, max_error, run = options.pop("out"), options.pop("max_error"), pop_run_options(options)
    job = resolve(
        preset=options.pop("preset"),
        model=options.pop("model"),
        method="dense",
        settings={},
        generation={"prompt": prompt, **options},
        **run,
        out=Path(out),
        force=True,
        dense=True,
        control=False,
        lpips="none",
    )
    console = Terminal()
    for name, linears in adapt_linears_job(job, max_error, out)["transformers"].items():
        taken = [path for path, choice in linears.items() if choice["precision"] != "native"]
        worst = max(linears, key=lambda path: linears[path]["error"])
        console.print(f"{name}: {len(taken)} of {len(linears)} linears in 8 bits", highlight=False)
        console.print(f"  largest error {linears[worst]['error']:.4f}, of {worst}", highlight=False)
    console.print(f"written to {out}", highlight=False)
