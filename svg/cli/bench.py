"""`svg bench`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path

import click

from .panels import Command

BENCHES = (
    "attention",
    "whole-blocks",
    "kmeans",
    "permute",
    "near",
    "svg1",
    "svg2",
    "quantised",
    "sparge",
    "training",
    "scale",
    "step",
    "linears",
    "layers",
    "all",
)


@click.command(cls=Command)
@click.argument("what", metavar="[PART]...", type=click.Choice(BENCHES), nargs=-1)
@click.option("--save", is_flag=True, help="Write docs/benchmarks/<gpu>.json and docs/benchmarks.md.")
@click.option("--docs", type=click.Path(file_okay=False), default="docs", show_default=True, help="Folder of --save.")
@click.option("--sweep", is_flag=True, help="Also time other tile sizes, which takes minutes.")
def bench(what: tuple[str, ...], save: bool, docs: str, sweep: bool) -> None:
    """Time this GPU's ceilings, our kernels, and peers that are installed: all of it, or the parts that are named.

    Parts: attention, whole-blocks, kmeans, permute, near, svg1, svg2, quantised, sparge, training, scale, step,
    linears, layers.

    \b
    Example:
      svg bench near svg2 --save
    """
    from ..bench import report
    from ..bench.run import Bench, gpu_name, run
    from .console import Terminal, bench_line

    console = Terminal()
    what = what or ("all",)
    command = " ".join(["svg bench", *what, *(["--save"] if save else []), *(["--sweep"] if sweep else [])])
    found = Bench(
        command=command,
        show=lambda key, entry: console.print(bench_line(key, entry), highlight=False, soft_wrap=True),
        say=lambda line: console.print(f"note: {line}", highlight=False, soft_wrap=True),
        sweep=sweep,
    )
    try:
        run(what, found)
    finally:
        # An hour-long machine may end in the middle: what was measured stays.
        if save and found.results:
            for path in report.save(Path(docs), gpu_name(), found.results):
                console.print(f"wrote {path}", highlight=False)
