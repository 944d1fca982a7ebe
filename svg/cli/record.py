"""`svg record`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from typing import Any

import click

from .options import Numbers, dense_job, dense_run_options
from .panels import Command
from .process import quiet_loading


@click.command(cls=Command)
@click.argument("prompt")
@dense_run_options
@click.option("--record-steps", type=Numbers(int), help="Steps to record, from 0; -1 is the last [default: three].")
@click.option("--record-layers", type=Numbers(int), help="Layers to record, from 0; -1 is the last [default: all].")
@click.option("--record-branches", help="Guidance branches, with commas, such as cond [default: all].")
@click.option("--out", type=click.Path(dir_okay=False), default="qkv.safetensors", show_default=True)
def record(prompt: str, **options: Any) -> None:
    """Run PROMPT dense and keep q, k, v of chosen steps and layers, for `svg sweep --recorded`.

    \b
    Example:
      svg record "a red ball" --record-steps 4,12 --out qkv.safetensors
    """
    from ..recordings.record import record_job
    from .console import Terminal

    quiet_loading()
    console = Terminal()
    branches = options.pop("record_branches")
    chosen = {
        "steps": options.pop("record_steps"),
        "layers": options.pop("record_layers"),
        "branches": None if branches is None else branches.split(","),
    }
    job = dense_job(prompt, options)
    calls, size = record_job(job, job.out, **chosen)
    console.print(f"{calls} attention calls, {size / 2**20:.1f} MiB, written to {job.out}", highlight=False)
