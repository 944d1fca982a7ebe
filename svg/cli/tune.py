"""`svg tune`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..config import METHODS
from .options import (
    Numbers,
    lpips_option,
    model_option,
    pop_run_options,
    preset_option,
    run_options,
    settings_option,
    size_options,
)
from .panels import Command
from .process import command_text, quiet_loading

_TUNABLE = tuple(name for name, config in METHODS.items() if config.head_field)
_TARGETS = ("min_psnr", "max_lpips", "target_speedup")
# Of the bundled model's world; other models need prompts of their own.
_PROMPTS = (
    "a large red circle moving right over a gray and navy checkered background, the camera is still",
    "a small green square moving up in front of a large white ring moving left "
    "over a brown and black plain background, the camera pans right",
)
_HELD_OUT = (
    "a small blue square moving up over a olive and beige striped background, the camera pans left",
    "a large yellow triangle moving down over a navy and beige dotted background, the camera is still",
)


@click.command(cls=Command)
@click.option("--min-psnr", type=float, help="Target: PSNR of the videos against dense, in dB.")
@click.option("--max-lpips", type=float, help="Target: LPIPS of the videos against dense.")
@click.option("--target-speedup", type=float, help="Target: attention so many times as fast (by density on a CPU).")
@click.option("--worst", is_flag=True, help="Every video must reach the target, not their mean.")
@click.option("--prompt", "prompts", multiple=True, help="Measured and searched on; several times for several.")
@click.option("--held-out", multiple=True, help="Verified on, never searched on; several times for several.")
@click.option("--seeds", type=Numbers(int), default="0", show_default=True, help="Seeds of the noise, with commas.")
@model_option
@preset_option
@click.option("--method", type=click.Choice(_TUNABLE), default="svg2", show_default=True)
@settings_option
@size_options
@click.option("--negative-prompt", help="What the videos must not show.")
@run_options
@lpips_option
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Settings tried in a search.")
@click.option("--tune-steps", type=Numbers(int), help="Steps to measure, from 0 [default: three of the sparse ones].")
@click.option("--probe", type=click.Choice(("heads", "layers", "none")), default="layers", show_default=True,
              help="Whose effect on the prediction to measure: a forward each, for every measured step and branch.")  # fmt: skip
@click.option("--budgets", type=click.Choice(("heads", "layers", "one")),
              help="Whose: of each head, of each layer, or one for all, of which only the dense steps are tuned "
              "[default: one for near, else heads].")  # fmt: skip
@click.option("--keep-warmup", is_flag=True, help="Keep the dense steps as they are, instead of trying fewer.")
@click.option(
    "--keep-refresh", is_flag=True, help="Keep refresh as it is, instead of trying 2, 4 and 8 where that saves time."
)
@click.option("--keep-granule", is_flag=True, help="Keep near's granule as it is, instead of trying larger ones.")
@click.option(
    "--keep-precision",
    is_flag=True,
    help="Keep near's dense steps in 16 bits, instead of trying 8 where there is FP8.",
)
@click.option("--no-control", is_flag=True, help="No dense-against-dense control on the held-out videos.")
@click.option("--out", type=click.Path(), default="svg-tune", show_default=True, help="Folder of the results.")
def tune(**options: Any) -> int:
    """Find budgets for every layer or head that reach a target, and write them as a preset.

    Measures what each layer or head loses at which density, spends where the error per cost is largest, searches the target on
    videos, verifies it on held-out prompts, and compares with one budget for all. The same command goes on after
    a kill. Exit code 1 if the target was not reached.

    \b
    Example:
      svg tune --min-psnr 35 --method near --out tuned
    """
    from svg.eval.files import check_folder, check_no_others
    from svg.eval.page import PAGE
    from svg.pipelines.loading import check_offload, resolve_device

    from ..generate.job import inputs_of
    from ..tune.run import PRESET, Tuner
    from .console import Terminal
    from .tune_display import ConsoleDisplay, print_tuning

    quiet_loading()
    console = Terminal()
    plan = _plan(options)
    if not os.path.isdir(os.path.join(options["out"], "curves")):  # else it is a tuning that goes on
        check_no_others("--out", options["out"], ("report.json", "sweep.json"))
    check_folder("--out", options["out"], ("sweep.json", "tune.json", PRESET, PAGE), inputs_of(plan.job))
    device = resolve_device(plan.job.device)
    check_offload(plan.job.offload, device)
    dtype = plan.job.dtype or ("bf16" if device.type == "cuda" else "fp32")
    tuner = Tuner(plan, Path(options["out"]), str(device), dtype, command_text(), ConsoleDisplay(console))
    try:
        result = tuner.run()
    except KeyboardInterrupt:
        click.echo(f"interrupted: what is done stays in {options['out']}, the same command goes on", err=True)
        return 130
    print_tuning(console, result, options["out"])
    return 0 if result["state"] == "finished" else 1


def _plan(options: dict[str, Any]) -> Any:
    from svg.pipelines.model_files import BUNDLED

    from ..generate.job import parse_assignments, resolve
    from ..generate.preflight import check_job
    from ..tune.run import Plan
    from ..tune.search import Target

    given = [name for name in _TARGETS if options[name] is not None]
    if len(given) != 1:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in _TARGETS)
        raise ValueError(f"one of {flags} must be given, got {len(given)}")
    target = Target(given[0], options[given[0]], options["worst"])
    if target.kind == "max_lpips" and options["lpips"] == "none":
        raise ValueError("--max-lpips needs a network: --lpips alex or vgg, got none")
    sizes = ("height", "width", "frames", "steps", "guidance", "true_cfg", "flow_shift", "fps", "negative_prompt")
    job = resolve(
        preset=options["preset"],
        model=options["model"],
        method=options["method"],
        settings=parse_assignments(options["assignments"]),
        generation={"prompt": "-", **{key: options[key] for key in sizes}},
        **pop_run_options(options),
        out=Path(options["out"]),
        force=False,
        dense=True,
        control=False,
        lpips=options["lpips"],
    )
    check_job(job)
    bundled = job.model == BUNDLED
    return Plan(
        job=job,
        prompts=list(options["prompts"] or (_PROMPTS if bundled else ())),
        held_out=list(options["held_out"] or (_HELD_OUT if bundled else ())),
        seeds=list(dict.fromkeys(options["seeds"])),
        target=target,
        steps=options["tune_steps"],
        probe=options["probe"],
        rounds=options["rounds"],
        control=not options["no_control"],
        budgets=options["budgets"] or job.config.tuned_by,
        keep_warmup=options["keep_warmup"],
        keep_refresh=options["keep_refresh"],
        keep_granule=options["keep_granule"],
        keep_precision=options["keep_precision"],
    )
