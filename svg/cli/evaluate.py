"""`svg evaluate`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import os
from typing import Any

import click

from .options import device_option, lpips_option
from .panels import Command


@click.command(cls=Command)
@click.argument("reference", type=click.Path())
@click.argument("output", type=click.Path())
@lpips_option
@click.option("--clip", help="Also measure each video by itself with this CLIP model: hub id or directory.")
@click.option("--prompt", help="With --clip: what the videos should show.")
@device_option
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write every frame's numbers here.")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False), help="Write a table of them here, a row a frame.")
def evaluate(reference: str, output: str, **options: Any) -> int:
    """Measure how close the video OUTPUT is to the video REFERENCE, frame by frame.

    With --clip also how good each is by itself: whether it shows its prompt, and stays the same place from frame to frame.
    Two folders are compared video by video, paired by name; exit code 1 if some could not be measured.

    \b
    Example:
      svg evaluate dense.mp4 accelerated.mp4 --csv frames.csv
    """
    from svg.eval.clip import Clip
    from svg.eval.files import check_outputs, write_json
    from svg.eval.pairs import add_clip, evaluate_folders, evaluate_pair, find_pairs, write_csv
    from svg.pipelines.clip import load_clip
    from svg.pipelines.loading import resolve_device

    from .console import Terminal, print_comparison, print_comparisons

    console = Terminal()
    lpips, json_path, csv_path = (options[name] for name in ("lpips", "json_path", "csv_path"))
    if options["prompt"] is not None and options["clip"] is None:
        raise ValueError("--prompt is for --clip, got it alone: add --clip MODEL")
    if options["clip"] is not None and os.path.isdir(reference):
        raise ValueError("--clip must come with two videos, got two folders: measure them pair by pair")
    pairs = find_pairs(reference, output)
    chosen = resolve_device(options["device"])
    check_outputs({"--json": json_path, "--csv": csv_path}, [path for _, *both in pairs for path in both])
    if os.path.isdir(reference):
        result = evaluate_folders(pairs, lpips, chosen, lambda name: console.print(f"{name} ...", style="dim"))
        rows = [pair for pair in result["pairs"] if "error" not in pair]
        print_comparisons(console, reference, output, result)
        result = {"reference": reference, "output": output, **result}
        code = 0 if len(rows) == len(pairs) else 1
    else:
        result = evaluate_pair(*pairs[0][1:], lpips, chosen)
        if options["clip"] is not None:
            try:
                result = add_clip(result, Clip(options["clip"], *load_clip(options["clip"], chosen)), options["prompt"])
            except (ValueError, RuntimeError) as error:  # the other numbers stay
                result = {**result, "clip": None, "notes": [*result["notes"], " ".join(str(error).split())]}
        rows, code = [{"name": pairs[0][0], **result}], 0
        print_comparison(console, reference, output, result)
        for note in result["notes"]:
            console.print(f"note: {note}", highlight=False)
    if json_path:
        write_json(json_path, result)
    if csv_path:
        write_csv(csv_path, rows)
    return code
