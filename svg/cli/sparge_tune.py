"""`svg sparge-tune`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import ORDERS
from .options import device_option
from .panels import Command

if TYPE_CHECKING:
    from rich.console import Console

    from ..recordings.sparge_tune import Key, LayerFit


@click.command("sparge-tune", cls=Command)
@click.argument("recordings", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--l1", type=float, default=0.07, show_default=True,
              help="Relative L1 that the selection may cost "
              "(the paper: 0.05 for CogVideoX, 0.07 for Wan and HunyuanVideo).")  # fmt: skip
@click.option("--l2", type=float, default=0.08, show_default=True, help="The same with the filter of P V (0.06; 0.08).")
@click.option("--order", type=click.Choice(ORDERS), default="hilbert", show_default=True, help="How blocks are cut.")
@click.option("--attention-sink", is_flag=True, help="Always keep the first key block.")
@click.option("--blocks", type=int, default=32, show_default=True, help="Query blocks of a head and call to look at.")
@click.option("--rows", type=int, default=8, show_default=True, help="Rows of each of them.")
@device_option
@click.option("--out", type=click.Path(dir_okay=False), default="sparge.safetensors", show_default=True)
@click.option("--force", is_flag=True, help="Start over, whatever the file holds.")
def sparge_tune(recordings: tuple[str, ...], out: str, force: bool, **options: Any) -> int:
    """Find SpargeAttn's thresholds of every head on RECORDINGS of `svg record`, in minutes.

    Layers that the file has are skipped: the same command goes on after a kill, and recordings of other layers add to
    the file. Use it with `svg generate --method sparge --thresholds FILE`.

    \b
    Example:
      svg sparge-tune qkv.safetensors --l1 0.07 --out sparge.safetensors
    """
    from rich.progress import Progress

    from svg.pipelines.loading import resolve_device

    from ..config import SpargeConfig
    from ..recordings.sparge_fit import Sampling
    from ..recordings.sparge_tune import Bounds, tune
    from .console import Terminal

    console = Terminal()
    config = SpargeConfig(order=options["order"], attention_sink=options["attention_sink"])
    bounds = Bounds(l1=options["l1"], l2=options["l2"])
    sampling = Sampling(blocks=options["blocks"], rows=options["rows"])
    start = time.perf_counter()
    with Progress(console=console) as progress:
        bar = progress.add_task("looking", total=None)

        def on_call(key: Key, done: int, total: int) -> None:
            progress.update(bar, description=f"{key[0]} {key[1]}", completed=done, total=total)

        def on_layer(key: Key, fit: LayerFit) -> None:
            progress.console.print(_line(key, fit), highlight=False)

        try:
            found = tune(
                list(recordings), out, config, bounds, sampling, resolve_device(options["device"]),
                force=force, on_call=on_call, on_layer=on_layer,
            )  # fmt: skip
        except KeyboardInterrupt:
            click.echo(f"interrupted: finished layers stay in {out}, the same command goes on", err=True)
            return 130
    _print_end(console, found, Path(out), time.perf_counter() - start)
    return 0


def _line(key: Key, fit: LayerFit) -> str:
    whole = sum(density == 1 for density in fit.density)
    return (
        f"{key[0]} {key[1]:>3}  density {_mean(fit.density):.3f}, {whole} of {len(fit.density)} heads dense, "
        f"P V {_mean(fit.pv_share):.3f} of the selected, {fit.seconds:.1f} s"
    )


def _print_end(console: Console, found: dict[Key, LayerFit], out: Path, seconds: float) -> None:
    if not found:
        console.print(f"nothing to do: {out} has every recorded layer", highlight=False)
        return
    density = _mean([x for fit in found.values() for x in fit.density])
    console.print(f"{len(found)} layers in {seconds:.0f} s, density {density:.3f}, written to {out}", highlight=False)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
