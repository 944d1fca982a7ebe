"""`svg sweep`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from svg.eval.names import LPIPS_NETS

from ..config import METHODS
from .options import Numbers, read_prompts, run_options, size_options
from .panels import Command
from .process import command_text, quiet_loading

_BUDGETS = ", ".join(f"{axis[1]} for {name}" for name, one in METHODS.items() if (axis := one.sweep_field()))


@click.command(cls=Command)
@click.argument("grid", required=False, type=click.Path(dir_okay=False))
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be given several times.")
@click.option(
    "--prompts", "prompt_file", type=click.Path(exists=True, dir_okay=False), help="Text file, a prompt a line."
)
@click.option("--model", "models", multiple=True, help="Hub id or directory; several times for several.")
@click.option("--methods", help=f"Of {', '.join(METHODS)}, with commas [default: svg1,svg2].")
@click.option("--budgets", type=Numbers(float), help=f"With commas: {_BUDGETS}.")
@click.option(
    "--caches", help="Step caches as `svg generate --cache` takes them, and none, with commas [default: none]."
)
@click.option(
    "--peers",
    help="Other people's ways beside them, with commas: sageattention, spargeattn, cache-dit, diffusers:BACKEND "
    "(native, flash ...); what is not installed is left out.",
)
@click.option("--seeds", type=Numbers(int), help="Seeds of the noise, with commas [default: 0].")
@click.option("--negative-prompt", help="What the videos must not show.")
@size_options
@run_options
@click.option("--lpips", type=click.Choice(LPIPS_NETS), help="[default: alex]")
@click.option("--no-control", is_flag=True, help="No dense-against-dense control.")
@click.option("--keep-frames", is_flag=True, help="Keep raw frames of every cell, not of dense and control alone.")
@click.option("--ray", "ray_address", help="Spread cells over a Ray cluster: its address, or `local` to start one.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes, each on a GPU of its own; with --ray actors [default: one a GPU].",
)
@click.option(
    "--recorded", type=click.Path(dir_okay=False), help="Sweep recorded q, k, v (`svg record`), no generation."
)
@click.option(
    "--no-run", is_flag=True, help="Generate nothing: videos, LPIPS and VMAF that another machine had to leave out."
)
@click.option("--out", type=click.Path(), default="svg-sweep", show_default=True, help="Folder of the results.")
def sweep(grid: str | None, **options: Any) -> int:
    """Generate every cell of models x methods x budgets x caches x prompts x seeds, measured against dense.

    GRID is a YAML file; flags win over it. What is finished is never run again: the same command goes on after a kill,
    and a larger grid adds to the folder. Exit code 1 if a cell failed.

    \b
    Example:
      svg sweep --prompt "a red ball" --methods near,svg2 --budgets 0.2,0.3 --seeds 0,1 --out grid
    """
    from .console import Terminal

    console = Terminal()
    if options["no_run"]:
        return _finish(console, options)
    if options["recorded"] is not None:
        return _sweep_recorded(console, grid, options)
    return _sweep(console, grid, options)


def _sweep(console: Any, grid: str | None, options: dict[str, Any]) -> int:
    from svg.eval.files import check_folder, check_no_others
    from svg.eval.page import PAGE, build_page
    from svg.eval.sweep_table import write_tables
    from svg.pipelines.loading import resolve_device

    from ..sweep.check import check_grid
    from ..sweep.grid import cells_of, inputs_of, read_grid
    from ..sweep.pool import LocalPool, ProcessPool, RayPool
    from ..sweep.run import Results, run_sweep
    from .sweep_display import SweepDisplay, print_summary

    quiet_loading()
    plan, left_out = _without_missing_peers(read_grid(grid, _flags(options)))
    address = options["ray_address"]
    device = _device_of(plan.run["device"], address, options["workers"], resolve_device)
    check_no_others("--out", options["out"], ("report.json", "tune.json", "curves"))
    check_folder("--out", options["out"], ("sweep.json", "sweep.csv", "paired.csv", PAGE), [grid, *inputs_of(plan)])
    check_grid(plan, device)
    header = {"command": command_text(), "lpips": plan.run["lpips"]}
    results = Results(options["out"], cells_of(plan, device.split(":")[0]), header, options["keep_frames"], left_out)
    with SweepDisplay(console) as display:

        def pool() -> Any:
            workers = options["workers"]
            if address is not None:
                return RayPool(address, device, workers)
            return LocalPool(device, display.step) if workers is None else ProcessPool(device, workers)

        try:
            summary = run_sweep(results, pool, display)
        except KeyboardInterrupt:
            click.echo(f"interrupted: finished cells stay in {options['out']}, the same command goes on", err=True)
            return 130
    build_page(options["out"])
    write_tables(summary, options["out"])
    print_summary(console, summary, options["out"])
    return 1 if summary["counts"]["failed"] else 0


def _sweep_recorded(console: Any, grid: str | None, options: dict[str, Any]) -> int:
    from svg.eval.files import check_folder
    from svg.eval.page import PAGE, build_page
    from svg.pipelines.loading import resolve_device

    from ..recordings.sweep import sweep_recorded
    from ..sweep.grid import inputs_of, method_configs, read_grid
    from .sweep_display import print_recorded

    plan = read_grid(grid, _flags(options), prompts_needed=False)
    inputs = [grid, options["recorded"], *inputs_of(plan)]
    check_folder("--out", options["out"], ("recorded.json", PAGE), inputs)
    device = resolve_device(plan.run["device"])
    result = sweep_recorded(options["recorded"], method_configs(plan), device, Path(options["out"]), command_text())
    build_page(options["out"])
    print_recorded(console, result, options["out"])
    return 0


def _finish(console: Any, options: dict[str, Any]) -> int:
    from svg.eval.page import build_page
    from svg.pipelines.loading import resolve_device

    from ..sweep.finish import finish
    from .sweep_display import print_summary

    out = options["out"]
    summary = finish(out, options["lpips"], resolve_device(options["device"] or "auto"))
    build_page(out)
    print_summary(console, summary, out)
    return 0


def _without_missing_peers(plan: Any) -> tuple[Any, list[str]]:
    """A grid with the peers that can run here, and a note for each of the others."""
    from svg.pipelines.peers import why_not

    reasons = {name: why_not(name) for name in plan.peers}
    notes = [f"peer {name} is left out: {reason}" for name, reason in reasons.items() if reason is not None]
    return replace(plan, peers=tuple(name for name, reason in reasons.items() if reason is None)), notes


def _flags(options: dict[str, Any]) -> dict[str, Any]:
    """Flags as a grid's keys, None where not given."""
    plain = ("budgets", "seeds", "negative_prompt", "height", "width", "frames", "steps", "guidance", "true_cfg")
    plain += ("flow_shift", "fps", "device", "dtype", "offload", "vae_tiling", "lpips")
    prompts = [*options["prompts"], *(read_prompts(options["prompt_file"]) if options["prompt_file"] else ())]
    lists = {"prompts": prompts or None, "models": list(options["models"]) or None}
    lists["peers"] = options["peers"].split(",") if options["peers"] is not None else None
    methods = options["methods"].split(",") if options["methods"] is not None else None
    caches = (
        [None if one == "none" else one for one in options["caches"].split(",")]
        if options["caches"] is not None
        else None
    )
    control = False if options["no_control"] else None
    given = {"methods": methods, "caches": caches, "control": control}
    return {**{key: options[key] for key in plain}, **lists, **given}


def _device_of(device: str, address: str | None, workers: int | None, resolve_device: Callable) -> str:
    alone = address is None and workers is None
    if alone or device == "cpu":
        return str(resolve_device(device))
    if device not in ("auto", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda with --ray or --workers, got {device}")
    if address is None:
        return str(resolve_device(device)).split(":")[0]
    # What counts is the cluster's GPUs; a local cluster has this machine's.
    return str(resolve_device(device)) if address == "local" else "cuda"
