"""`svg generate`. Nothing heavy is imported before its arguments are checked."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import METHODS
from ..config.run import DTYPES, OFFLOADS
from ..generate.several_gpus import check_gpus, last_words, quiet, rank, start
from ..methods.near.levels import LEVELS
from ..methods.registry import method_flags
from .options import (
    device_option,
    lpips_option,
    method_options,
    model_option,
    preset_option,
    read_prompts,
    seed_option,
    settings_option,
    size_options,
)
from .panels import Command
from .process import quiet_loading

if TYPE_CHECKING:
    from ..generate.job import Job

_GENERATION_FLAGS = (
    *("height", "width", "frames", "steps", "guidance", "true_cfg", "flow_shift", "seed"),
    *("negative_prompt", "image", "last_image", "fps"),
)


@click.command(cls=Command)
@click.argument("prompt", required=False)
@click.option(
    "--prompts",
    "prompts",
    type=click.Path(exists=True, dir_okay=False),
    help="Text file, a prompt a line: one load, a folder each.",
)
@model_option
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--variant", help="Which weights files, such as fp16.")
@preset_option
@click.option(
    "--method",
    type=click.Choice(tuple(METHODS)),
    metavar="NAME",
    help=f"Of {', '.join(METHODS)} [default: near, or svg2 where a preset has no near].",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    help="Of near: two fifths of the attention, the preset's quarter, or a quarter with fewer dense steps, in 8 bits.",
)
@method_options
@settings_option
@size_options
@seed_option
@click.option("--negative-prompt", help="What the video must not show.")
@click.option("--image", type=click.Path(exists=True, dir_okay=False), help="First frame, for image-to-video models.")
@click.option(
    "--last-image", type=click.Path(exists=True, dir_okay=False), help="Last frame, for Wan's models that take one."
)
@device_option
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: bf16 on a GPU, fp32 on a CPU]")
@click.option(
    "--offload", type=click.Choice(OFFLOADS), default="none", show_default=True, help="What waits in CPU memory."
)
@click.option("--vae-tiling", is_flag=True, help="Decode in tiles, for videos whose decoding doesn't fit.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    help="LoRA file, folder or hub id, with =SCALE if not 1; several times for several.",
)
@click.option(
    "--compile", "compiled", is_flag=True, help="torch.compile the transformer's blocks: minutes once, faster steps."
)
@click.option(
    "--cache",
    help="A step cache for the accelerated run: first-block[=threshold], taylorseer[=interval], seacache[=threshold], "
    "dbcache[=threshold] (cache-dit), magcache=FILE of ratios.",
)
@click.option(
    "--gpus",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="GPUs of this machine that make the video together, each with a part of the sequence.",
)
@click.option(
    "--split",
    type=click.Choice(("sequence", "branches")),
    default="sequence",
    show_default=True,
    help="What the GPUs share: the sequence, or two of them the branches of guidance.",
)
@click.option("--yes", is_flag=True, help="Run billions of weights on a CPU all the same.")
@click.option("--out", type=click.Path(), default="svg-out", show_default=True, help="Folder of the results.")
@click.option("--force", is_flag=True, help="Replace the results of an earlier run.")
@click.option("--fast", is_flag=True, help="The accelerated video alone: no dense video, nothing to compare with.")
@click.option("--no-dense", is_flag=True, help="Skip the dense baseline, and with it all comparison.")
@click.option("--no-control", is_flag=True, help="Skip the dense-against-dense control.")
@lpips_option
def generate(prompt: str | None, prompts: str | None, **options: Any) -> int:
    """Generate PROMPT sparse and dense from one seed; write both videos and a report.

    The accelerated video is written first, then the dense one, then the comparison. Ctrl-C keeps what is finished.

    \b
    Example:
      svg generate "a cat walks on the grass" --preset wan2.1-t2v-720p --offload model --out cat
    """
    from ..generate.preflight import preflight
    from .console import Terminal

    jobs = _jobs(prompt, prompts, options)
    if rank() is None:
        for job in jobs:
            preflight(job)
        if jobs[0].gpus > 1:
            check_gpus(jobs[0].gpus, jobs[0].device)
            return _on_several_gpus(jobs[0].gpus)
    return _run(jobs, Terminal(quiet=bool(rank())))


def _on_several_gpus(gpus: int) -> int:
    code, message = start(sys.argv[1:], gpus)
    if message is not None:
        click.echo(f"svg: error: {message}", err=True)
    return code


def _jobs(prompt: str | None, prompts: str | None, options: dict[str, Any]) -> list[Job]:
    """One job a prompt, each with a folder of its own where they come from a file."""
    from ..generate.job import parse_assignments, parse_loras, resolve

    if (prompt is None) == (prompts is None):
        raise ValueError(
            "PROMPT or --prompts FILE must be given, one of them" + ("" if prompt is None else ", got both")
        )
    flags = {name: options.pop(name) for name in method_flags()}
    settings = {name: value for name, value in flags.items() if value is not None}
    settings = _with_own_budget(settings | parse_assignments(options.pop("assignments")), options["method"])
    generation = {name: options.pop(name) for name in _GENERATION_FLAGS}
    fast, no_dense, no_control = (options.pop(name) for name in ("fast", "no_dense", "no_control"))
    job = resolve(
        settings=settings,
        generation={"prompt": "-" if prompt is None else prompt, **generation},
        dense=not (fast or no_dense),
        control=not (fast or no_control),
        loras=parse_loras(options.pop("loras")),
        **options,
    )
    if prompts is None:
        return [job]
    texts = read_prompts(prompts)
    return [
        replace(job, request=replace(job.request, prompt=text), out=Path(job.out) / _folder_name(index, text))
        for index, text in enumerate(texts, 1)
    ]


def _with_own_budget(settings: dict[str, Any], method: str | None) -> dict[str, Any]:
    """`--budget` means the same everywhere: to svg1 it is its density, to sparge its share of the key blocks."""
    own = METHODS[method].sweep_field() if method is not None else None
    if "budget" not in settings or own is None or own[0] in settings:
        return settings
    return {own[0] if name == "budget" else name: value for name, value in settings.items()}


def _folder_name(index: int, prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{index:03d}-{words}" if words else f"{index:03d}"


def _run(jobs: list[Job], console: Any) -> int:
    from .console import TerminalDisplay, print_job

    print_job(console, jobs[0])
    todo = [job for job in jobs if not (len(jobs) > 1 and _is_done(job))]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} prompts are done already", highlight=False)
    if not todo:
        return 0
    quiet_loading()
    from ..generate.run_job import run_all

    start, began = time.perf_counter(), time.time()
    try:
        code = _run_all(todo, run_all(todo, quiet(TerminalDisplay(console))), console)
    except KeyboardInterrupt:
        done = [str(job.out) for job in todo if _is_done(job) and (job.out / "report.json").stat().st_mtime >= began]
        if not done or rank():
            raise
        click.echo(f"interrupted; finished: {', '.join(done)}", err=True)
        return 130
    if code == 0 and not rank():
        console.print(f"done in {time.perf_counter() - start:.0f} s, warm-up and measuring included", highlight=False)
    return code


def _run_all(jobs: list[Job], reports: Iterable[dict[str, Any]], console: Any) -> int:
    from .console import print_report

    for job, report in zip(jobs, reports):
        if rank():  # another process prints, unless this one alone was stopped
            if report["stopped"] is not None:
                last_words(report["stopped"], 1)
                return 1
            continue
        print_report(console, report, str(job.out))
        if report["stopped"] is not None:
            click.echo(f"svg: {report['stopped']}; kept in {job.out}: {', '.join(_videos(report))}", err=True)
            return 130 if report["state"] == "interrupted" else 1
    return 0


def _videos(report: dict[str, Any]) -> list[str]:
    return [f"{name}.mp4" for name in ("accelerated", "dense") if name in report["runs"]]


def _is_done(job: Job) -> bool:
    """Whether this very job's results are there, so that a list of prompts goes on where it was stopped."""
    from ..documents import read_json
    from ..generate.command_line import command_line

    try:
        report = read_json(job.out / "report.json")
    except (OSError, ValueError):
        return False
    wanted = ("finished", command_line(job))
    return not job.force and isinstance(report, dict) and (report.get("state"), report.get("command")) == wanted
