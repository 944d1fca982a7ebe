"""`svg adapt-linears`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from typing import Any

import click

from .options import dense_job, dense_run_options
from .panels import Command
from .process import quiet_loading


@click.command(cls=Command)
@click.argument("prompt")
@dense_run_options
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
    from ..recordings.linear_precisions import adapt_linears_job
    from .console import Terminal

    quiet_loading()
    max_error = options.pop("max_error")
    job = dense_job(prompt, options)
    console = Terminal()
    for name, linears in adapt_linears_job(job, max_error, job.out)["transformers"].items():
        taken = [path for path, choice in linears.items() if choice["precision"] != "native"]
        console.print(f"{name}: {len(taken)} of {len(linears)} linears in 8 bits", highlight=False)
        errors = {path: choice["error"] for path, choice in linears.items() if choice["error"] is not None}
        if errors:
            worst = max(errors, key=errors.__getitem__)
            console.print(f"  largest error {errors[worst]:.4f}, of {worst}", highlight=False)
        else:
            console.print("  it ran in none of the steps looked at: take more of them with --steps", highlight=False)
    console.print(f"written to {job.out}", highlight=False)
