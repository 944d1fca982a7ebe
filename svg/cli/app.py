"""`svg`: generate, evaluate, sweep, tune, record, page, bench, presets, models, doctor.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from .. import __version__
from .adapt import adapt
from .generate import generate
from .models import models
from .signals import end_as_interrupted
from .sparge_tune import sparge_tune
from .sweep import record, sweep
from .tune import tune

LPIPS_NETS = ("alex", "vgg", "none")
_LONGEST = 1500  # characters of an error's line: what was given may be a megabyte
BENCHES = (
    "attention",
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
    "all",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="svg")
def cli() -> None:
    """Sparse attention for video diffusion transformers: the same video, faster, no retraining.

    Set SVG_TRACEBACK=1 to see where an error came from.
    """


@cli.command()
@click.argument("reference", type=click.Path())
@click.argument("output", type=click.Path())
@click.option("--lpips", type=click.Choice(LPIPS_NETS), default="alex", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<index>.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write every frame's numbers here.")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False), help="Write a table of them here, a row a frame.")
def evaluate(reference: str, output: str, lpips: str, device: str, json_path: str | None, csv_path: str | None) -> int:
    """Measure how close the video OUTPUT is to the video REFERENCE, frame by frame.

    Two folders are compared video by video, paired by name; exit code 1 if some could not be measured.
    """

    from svg.eval.files import check_outputs, write_json
    from svg.eval.pairs import evaluate_folders, evaluate_pair, find_pairs, write_csv
    from svg.pipelines.loading import resolve_device

    from .console import Terminal, print_comparison, print_comparisons

    console = Terminal()
    pairs = find_pairs(reference, output)
    chosen = resolve_device(device)
    check_outputs({"--json": json_path, "--csv": csv_path}, [path for _, *both in pairs for path in both])
    if os.path.isdir(reference):
        result = evaluate_folders(pairs, lpips, chosen, lambda name: console.print(f"{name} ...", style="dim"))
        rows = [pair for pair in result["pairs"] if "error" not in pair]
        print_comparisons(console, reference, output, result)
        result = {"reference": reference, "output": output, **result}
        code = 0 if len(rows) == len(pairs) else 1
    else:
        result = evaluate_pair(*pairs[0][1:], lpips, chosen)
        rows, code = [{"name": pairs[0][0], **result}], 0
        print_comparison(console, reference, output, result)
        for note in result["notes"]:
            console.print(f"note: {note}", highlight=False)
    if json_path:
        write_json(json_path, result)
    if csv_path:
        write_csv(csv_path, rows)
    return code


cli.add_command(generate)
cli.add_command(sweep)
cli.add_command(tune)
cli.add_command(record)
cli.add_command(sparge_tune)
cli.add_command(adapt)
cli.add_command(models)


@cli.command()
@click.argument("folder", type=click.Path())
@click.option("--plots", is_flag=True, help="Also write pareto.png and pareto.svg (needs matplotlib).")
@click.option(
    "--metric", default="psnr", show_default=True, help="Of the plots: psnr, ssim, lpips, temporal_psnr, vmaf."
)
def page(folder: str, plots: bool, metric: str) -> None:
    """Build report.html in FOLDER, the results of a run or a sweep, to look at in a browser, offline too.

    Players, plots, heat maps and a table, in one file beside the videos. A sweep may still be running.
    """
    from svg.eval.page import build_page
    from svg.eval.page.plots import write_plots

    paths = [build_page(folder), *(write_plots(folder, metric) if plots else [])]
    click.echo(f"written: {', '.join(map(str, paths))}")


@cli.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """List the presets, or show one."""
    import yaml

    from svg.configs import load_preset, preset_names

    if name is None:
        for preset in map(load_preset, preset_names()):
            size = preset.generation
            methods = ", ".join(method for method in preset.methods if method != "dense")
            video = f"{size.frames} x {size.height} x {size.width}, {size.steps} steps"
            click.echo(f"{preset.name:<20} {preset.model:<40} {video:<30} {methods}")
        return
    preset = load_preset(name)
    content = {"model": preset.model, "source": preset.source, "generation": vars(preset.generation)}
    methods = {method: config.to_dict() for method, config in preset.methods.items()}
    click.echo(yaml.safe_dump({**content, **methods}, sort_keys=False), nl=False)


@cli.command()
@click.argument("what", type=click.Choice(BENCHES), nargs=-1)
@click.option("--save", is_flag=True, help="Write docs/benchmarks/<gpu>.json and docs/benchmarks.md.")
@click.option("--docs", type=click.Path(file_okay=False), default="docs", show_default=True, help="Folder of --save.")
@click.option("--sweep", is_flag=True, help="Also time other tile sizes, which takes minutes.")
def bench(what: tuple[str, ...], save: bool, docs: str, sweep: bool) -> None:
    """Time this GPU's ceilings, our kernels, and peers that are installed: all of it, or the parts that are named."""

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


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Tell what is installed, what is missing and what to do, and try attention on every device.

    Exit code 1 if something must be done, else 0.

    \b
    Example:
      svg doctor
    """
    import json

    from .doctor import examine

    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 1 if found["problems"] else 0
    for name, version in found["versions"].items():
        click.echo(f"{name:<16} {version or 'missing'}")
    for device in found["devices"]:
        details = ", ".join(f"{key.replace('_', ' ')} {_plain(device[key])}" for key in device if key != "name")
        click.echo(f"{'device':<16} {device['name']}: {details}")
    for name, result in found["self_test"].items():
        said = result.get("failed") or f"passed in {result['seconds']} s, {result['error']:.4f} away from dense"
        click.echo(f"{'self-test':<16} {name}: {said}")
    for net, path in found["lpips"].items():
        click.echo(f"{'LPIPS ' + net:<16} {path or 'missing'}")
    click.echo(f"{'ffmpeg':<16} {found['ffmpeg'] or 'missing'}")
    hub = found["hub"]
    state = f"{'token' if hub['token'] else 'no token'}{', offline' if hub['offline'] else ''}"
    click.echo(f"{'hub':<16} {state}, cache {hub['cache']}")
    click.echo(f"{'free disk':<16} {found['disk_free_gib']} GiB")
    click.echo(f"{'tiny-wan':<16} {'bundled' if found['bundled_model'] else 'missing'}")
    click.echo(f"{'presets':<16} {', '.join(found['presets'])}")
    for kind in ("problems", "hints"):
        for line in found[kind]:
            click.echo(f"{kind[:-1]}: {line}")
    return 1 if found["problems"] else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; every error a user can cause is one line on stderr.

    Args:
        arguments: command-line arguments; None: those of the process.

    Returns:
        0, or 1 when something failed on this machine, 2 on bad input, 130 when interrupted.
    """
    logging.getLogger("svg").addHandler(logging.NullHandler())  # notes and tables say what the library would log
    try:
        with end_as_interrupted():
            code = cli.main(arguments, prog_name="svg", standalone_mode=False)
            sys.stdout.flush()  # a full disk or a closed pipe behind it shows here, not in the interpreter's last words
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message())
        return 2
    except click.ClickException as error:
        return _fail(error, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: nothing was written", err=True)
        return 130
    except (ValueError, TypeError, NotImplementedError, ArithmeticError, OSError) as error:
        return _fail(error, str(error))
    except Exception as error:
        if _is_out_of_memory(error):
            _fail(error, f"{error}. Use fewer frames, a smaller size, --offload model or --vae-tiling")
        else:
            text = f"{type(error).__name__}: {error}"
            _fail(error, f"unexpected {text}: this is a fault of svg, SVG_TRACEBACK=1 tells where, please report it")
        return 1


def _fail(error: Exception, message: str) -> int:
    from .console import visible

    if os.environ.get("SVG_TRACEBACK"):
        raise error
    text = visible(" ".join(message.split()))
    click.echo(f"svg: error: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}", err=True)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    # torch's classes and words, without importing torch
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
