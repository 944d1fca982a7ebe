"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from svg.eval.names import LPIPS_NETS

from ..config.run import DTYPES, OFFLOADS
from ..documents import MEBIBYTE, read_text, shown
from ..methods.registry import method_flags

device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<index>.")
lpips_option = click.option(
    "--lpips", type=click.Choice(LPIPS_NETS), default="alex", show_default=True, help="Network of LPIPS."
)
model_option = click.option(
    "--model", help="Hub id or directory of a Diffusers pipeline [default: the bundled tiny-wan]."
)


def _presets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What a shell completes after --preset."""
    from svg.configs import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


preset_option = click.option(
    "--preset", shell_complete=_presets, help="Name (see `svg presets`) or YAML file; flags win over it."
)
seed_option = click.option("--seed", type=int, help="Seed of the noise [default: 0].")
settings_option = click.option(
    "--set", "assignments", multiple=True, help="Any setting of the method as NAME=VALUE; several times for several."
)


def method_options(command: Callable) -> Callable:
    """A flag for every setting that has one of its own."""
    for name, (kind, text) in reversed(method_flags().items()):
        read = click.Path() if kind is Path else kind
        command = click.option(f"--{name.replace('_', '-')}", type=read, help=text)(command)
    return command


class Numbers(click.ParamType):
    """Numbers with commas between them.

    Args:
        kind: int or float.
    """

    name = "numbers"

    def __init__(self, kind: type):
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        try:
            return [self._kind(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{shown(value)} must be numbers with commas between them, such as 0.2,0.3", param, ctx)


def size_options(command: Callable) -> Callable:
    """Options of a video's size and steps."""
    for option in (
        click.option("--fps", type=int, help="Frames per second of the written videos."),
        click.option(
            "--flow-shift", type=float, help="Shift of a flow-matching scheduler (Wan: 3 at 480p, 5 at 720p)."
        ),
        click.option("--true-cfg", type=float, help="HunyuanVideo: guidance with the negative prompt, > 1."),
        click.option("--guidance", type=float, help="Classifier-free guidance scale."),
        click.option("--steps", type=int, help="Denoising steps."),
        click.option("--frames", "--num-frames", "frames", type=int, help="Video frames, 4k + 1."),
        click.option("--width", type=int, help="Pixels."),
        click.option("--height", type=int, help="Pixels."),
    ):
        command = option(command)
    return command


def run_options(command: Callable) -> Callable:
    """Options of where and how a model runs."""
    for option in (
        click.option("--vae-tiling", is_flag=True, default=None, help="Decode in tiles."),
        click.option("--offload", type=click.Choice(OFFLOADS), help="[default: none]"),
        click.option("--dtype", type=click.Choice(DTYPES), help="[default: bf16 on a GPU, fp32 on a CPU]"),
        click.option("--device", help="auto, cpu, cuda or cuda:<index> [default: auto]."),
    ):
        command = option(command)
    return command


def dense_run_options(command: Callable) -> Callable:
    """Options of what `dense_job` makes: a model, its preset and sizes, and where it runs."""
    negative = click.option("--negative-prompt", help="What the videos must not show.")
    for option in (run_options, seed_option, negative, size_options, preset_option, model_option):
        command = option(command)
    return command


def pop_run_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `run_options` added out of a command's options, with defaults in place."""
    device, dtype, offload, tiling = (options.pop(name) for name in ("device", "dtype", "offload", "vae_tiling"))
    return {
        "device": "auto" if device is None else device,
        "dtype": dtype,
        "offload": offload or "none",
        "vae_tiling": bool(tiling),
    }


def dense_job(prompt: str, options: dict[str, Any]) -> Any:
    """The `svg.generate.job.Job` of one dense run whose videos nobody keeps, of a command's remaining options.

    Args:
        prompt: of the run.
        options: "out", a model, its preset, sizes and what `run_options` added; nothing is left in it.

    Raises:
        ValueError: as `svg.generate.job.resolve`.
    """
    from ..generate.job import resolve

    out, run = Path(options.pop("out")), pop_run_options(options)
    source = {name: options.pop(name) for name in ("preset", "model")}
    generation = {"prompt": prompt, **options}
    options.clear()
    return resolve(
        **source, method="dense", settings={}, generation=generation, **run, out=out, force=True, dense=True,
        control=False, lpips="none",
    )  # fmt: skip


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file, one a line; empty lines and those that begin with # are left out.

    Args:
        path: the file.

    Returns:
        At least one prompt.

    Raises:
        ValueError: it is no text in UTF-8, or holds no prompt.
    """
    try:
        lines = [line.strip() for line in read_text(path, MEBIBYTE).splitlines()]
    except ValueError as error:
        raise ValueError(f"--prompts must be a file with a prompt a line: {error}") from error
    texts = [line for line in lines if line and not line.startswith("#")]
    if not texts:
        raise ValueError(f"--prompts must hold at least one prompt, got {path} without any")
    return texts
