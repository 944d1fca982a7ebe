"""`svg evaluate`: two videos or two folders of them, measured frame by frame."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .clip import Clip
from .compare import compare, failures
from .files import atomic_path, to_json
from .names import METRICS
from .video import open_video

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".y4m", ".gif")
_COLUMNS = ("psnr", "ssim", "lpips", "vmaf", "temporal_psnr")  # of the file


def find_pairs(reference: str | Path, output: str | Path) -> list[tuple[str, Path, Path]]:
    """Which video is to be compared with which.

    Args:
        reference, output: two videos, or two folders whose videos have the same names (their suffixes may differ).

    Returns:
        (name, reference, output), sorted by name.

    Raises:
        ValueError: one is a folder and the other is not, a folder holds no video, or a video has no counterpart.
    """
    reference, output = Path(reference), Path(output)
    if os.path.isdir(reference) != os.path.isdir(output):
        folder, file = (reference, output) if os.path.isdir(reference) else (output, reference)
        raise ValueError(
            f"REFERENCE and OUTPUT must be two videos or two folders, got the folder {folder} and {file}: "
            f"give two of a kind"
        )
    if not os.path.isdir(reference):
        return [(output.name, reference, output)]
    found = _videos(reference), _videos(output)
    for (here, there), folder in zip((found, found[::-1]), (output, reference)):
        if missing := sorted(here.keys() - there.keys()):
            raise ValueError(
                f"every video must have a counterpart of its name, got none in {folder} for {', '.join(missing)}: "
                f"add it there or remove it here"
            )
    return [(name, path, found[1][name]) for name, path in sorted(found[0].items())]


def evaluate_pair(reference: Path, output: Path, lpips: str, device: Any) -> dict[str, Any]:
    """Measure one pair of files.

    Args:
        reference, output: the files.
        lpips: "alex", "vgg" or "none".
        device: where to compute.

    Returns:
        {"reference", "output", everything `compare` returns, "notes": what to know about the numbers}.

    Raises:
        VideoError, OSError: a file cannot be used, or sizes or lengths differ.
    """
    a, b = open_video(reference), open_video(output)
    result = compare(a, b, lpips, device)
    notes = ["the numbers include what encoding lost: `svg generate` measures raw frames"]
    if a.fps != b.fps:
        notes.append(f"the frame rates differ ({a.fps:g} and {b.fps:g} a second): frame i was compared with frame i")
    if os.path.samefile(reference, output):
        notes.append(f"{reference} and {output} are one file: the numbers compare a video with itself")
    for video in (a, b):
        if video.variable:
            notes.append(
                f"{video.path} has a variable frame rate: frame i was compared with frame i, whatever its time stamp"
            )
    notes += failures(result)
    return {"reference": str(reference), "output": str(output), **result, "notes": notes}


def add_clip(result: dict[str, Any], measure: Clip, prompt: str | None) -> dict[str, Any]:
    """Add how good both videos of a pair are by themselves.

    Args:
        result: of `evaluate_pair`.
        measure: a CLIP model.
        prompt: what the videos should show, or None.

    Returns:
        The result with "clip": {"reference", "output"}, what the model gives.
    """
    return {**result, "clip": {name: measure(open_video(result[name]), prompt) for name in ("reference", "output")}}


def evaluate_folders(
    pairs: list[tuple[str, Path, Path]], lpips: str, device: Any, on_pair: Callable[[str], None]
) -> dict[str, Any]:
    """Measure many pairs; one that cannot be measured is named and the rest goes on.

    Args:
        pairs: as `find_pairs` gives.
        lpips: "alex", "vgg" or "none".
        device: where to compute.
        on_pair: called with a pair's name before it is measured.

    Returns:
        {"pairs": [{"name", what `evaluate_pair` returns} or {"name", "error"}], "mean": {metric: mean over the pairs}}.
        A mean PSNR is over the pairs that differ, as it is over frames.
    """
    results = []
    for name, reference, output in pairs:
        on_pair(name)
        try:
            results.append({"name": name, **evaluate_pair(reference, output, lpips, device)})
        except (ValueError, OSError) as error:
            results.append({"name": name, "error": str(error)})
    measured = [result for result in results if "error" not in result]
    return {"pairs": results, "mean": {metric: _mean_of(measured, metric) for metric in METRICS}}


def write_csv(path: str | Path, results: list[dict[str, Any]]) -> None:
    """Write one row a frame: video, frame and every metric; the temporal one is of the change into that frame.

    Args:
        path: the file, which appears whole or not at all.
        results: with "name" and what `evaluate_pair` returns.
    """
    with atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "frame", *_COLUMNS])
        for result in results:
            columns = [_column(result, metric) for metric in _COLUMNS]
            for frame, values in enumerate(zip(*columns)):
                writer.writerow([_as_text(result["name"]), frame, *(to_json(value) for value in values)])


def _as_text(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def _videos(folder: Path) -> dict[str, Path]:
    videos: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES:
            continue
        if path.stem in videos:
            raise ValueError(f"names must be unique, got {videos[path.stem].name} and {path.name} in {folder}")
        videos[path.stem] = path
    if not videos:
        raise ValueError(f"{folder} must hold videos ({', '.join(SUFFIXES)}), got none")
    return videos


def _column(result: dict[str, Any], metric: str) -> list[Any]:
    values = result[metric].get("per_frame")
    if values is None:
        return [None] * result["frames"]
    return [None, *values] if metric == "temporal_psnr" else values


def _mean_of(results: list[dict[str, Any]], metric: str) -> float | None:
    means = [result[metric]["mean"] for result in results if result[metric]["mean"] is not None]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return means[0] if means else None
    return sum(finite) / len(finite)
