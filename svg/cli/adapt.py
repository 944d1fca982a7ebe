"""`svg adapt`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from typing import Any

import click

from .options import device_option, settings_option
from .panels import Command


@click.command(cls=Command)
@click.argument("recording", type=click.Path(dir_okay=False))
@click.option("--method", default="sage2", show_default=True, help="sage2, sage2++ or sage3.")
@click.option("--min-cosine", type=float, default=0.998, show_default=True, help="Least cosine similarity of a layer.")
@settings_option
@device_option
@click.option("--out", type=click.Path(dir_okay=False), default="layers.json", show_default=True)
def adapt(recording: str, assignments: tuple[str, ...], **options: Any) -> None:
    """Choose a precision for every layer on RECORDING (`svg record`), for `svg generate --set layers=FILE`.

    The fastest whose output is close enough to unquantised attention: the method's own, then P V in 16 bits, then none.

    \b
    Example:
      svg adapt qkv.safetensors --method sage2 --out layers.json
    """
    from rich.table import Table

    from svg.pipelines.loading import resolve_device

    from ..generate.job import parse_assignments
    from ..recordings.layer_precisions import adapt as measure

    device = resolve_device(options["device"])
    settings = parse_assignments(assignments)
    content = measure(recording, options["method"], settings, options["min_cosine"], device, options["out"])
    table = Table(title="least cosine similarity of a layer", title_justify="left")
    names = list(next(iter(next(iter(content["transformers"].values())).values()))["cosine"])
    for heading in ("layer", *names, "chosen"):
        table.add_column(heading)
    for transformer, layers in content["transformers"].items():
        for layer, choice in layers.items():
            values = (f"{choice['cosine'][name]:.5f}" for name in names)
            table.add_row(f"{transformer} {layer}", *values, choice["precision"])
    from .console import Terminal

    console = Terminal()
    console.print(table)
    console.print(f"written to {options['out']}", highlight=False)
