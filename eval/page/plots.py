"""The page's Pareto plot as a picture, PNG or SVG, for papers and READMEs."""

import math
from pathlib import Path

from ..files import atomic_path
from .build import load_page_data

_AXES = {  # metric -> label; larger is better except for LPIPS
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
    "lpips": "LPIPS to dense (axis reversed)",
    "temporal_psnr": "temporal PSNR to dense, dB",
    "vmaf": "VMAF to dense",
}
_STYLES = {"svg1": ("#0072b2", "s"), "svg2": ("#c2410c", "o"), "sparge": ("#7c3aed", "^")}
_OTHERS = [("#00805f", "v"), ("#a8327d", "P"), ("#8a6d00", "D"), ("#4a5bd0", "<")]
_GREY = "#6b7785"


def write_plots(folder, metric="psnr"):
    """Draw quality against attention time and against density, means over prompts and seeds.

    Args:
        folder: of a run or a sweep; pareto.png and pareto.svg are written into it, a pair a model and size.
        metric: "psnr", "ssim", "lpips", "temporal_psnr" or "vmaf".

    Returns:
        Paths of the pictures.

    Raises:
        ValueError: unknown metric, nothing to draw, no results in the folder, or no matplotlib.
    """
    check_metric(metric)
    data = load_page_data(folder)
    paths = []
    for index, group in enumerate(dict.fromkeys(item["group"] for item in data["cells"])):
        cells = [item for item in data["cells"] if item["group"] == group and item["status"] == "finished"]
        figure = _figure(cells, group, metric)
        for kind in ("png", "svg"):
            path = Path(folder) / f"pareto{f'-{index + 1}' if index else ''}.{kind}"
            with atomic_path(path) as partial:
                figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            paths.append(path)
    return paths


def check_metric(metric):
    """Raise ValueError unless plots have an axis for a metric."""
    if metric not in _AXES:
        raise ValueError(f"metric must be one of {', '.join(_AXES)}, got {metric!r}")


def _figure(cells, title, metric):
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ImportError as error:
        raise ValueError("plots need the extra `plots`: pip install 'svg-video[plots]'") from error
    settings = _settings(cells, metric)
    if not any(row["role"] == "accelerated" for row in settings):
        raise ValueError(f"metric must have been measured on a sparse cell, got none for {metric}: {title}")
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, settings, "time")
    _draw(right, settings, "density")
    left.set_xlabel("attention, s")
    right.set_xlabel("density")
    left.set_ylabel(_AXES[metric])
    if metric == "lpips":
        left.invert_yaxis()
    left.legend(frameon=False, fontsize=9)
    return figure


def _draw(axes, settings, key):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e9edf1")
    axes.set_axisbelow(True)
    sparse = [row for row in settings if row["role"] == "accelerated" and math.isfinite(row["quality"])]
    methods = list(dict.fromkeys(row["method"] for row in sparse))
    unknown = [method for method in methods if method not in _STYLES]
    for method in methods:
        colour, shape = _STYLES.get(method) or _OTHERS[unknown.index(method) % len(_OTHERS)]
        rows = sorted((row for row in sparse if row["method"] == method), key=lambda row: row["density"])
        points = [row[key] for row in rows], [row["quality"] for row in rows]
        axes.plot(*points, color=colour, marker=shape, lw=1.4, ms=6, label=method)
    low, high = axes.get_ylim()
    for row in settings:
        if row["role"] == "dense":
            axes.axvline(row[key], color="#1f2a37", lw=1.2, ls=":", label=f"dense (identical), {row['time']:.3g} s")
        elif row["role"] == "control":
            _draw_control(axes, row["quality"], low, high)
    axes.set_xlim(left=0)


def _draw_control(axes, quality, low, high):
    """A line where it is in reach of the axis, else its number in the legend: the axis belongs to the methods."""
    if low - (high - low) <= quality <= high + (high - low):
        axes.axhline(quality, color=_GREY, lw=1.2, ls="--", label=f"control (noise floor), {quality:.4g}")
    else:
        axes.plot([], [], color=_GREY, lw=1.2, ls="--", label=f"control (noise floor), {quality:.4g}, off the axis")


def _settings(cells, metric):
    """One row a label: means over its cells of time, density and quality; rows without one of them are left out."""
    rows = []
    for label in dict.fromkeys(item["label"] for item in cells):
        members = [item for item in cells if item["label"] == label]
        row = {
            "role": members[0]["role"],
            "method": members[0]["method"],
            "time": _mean(item["seconds"]["attention"] for item in members),
            "density": _mean(item["density"]["all_calls"] for item in members),
            "quality": _mean(item["quality"][metric] for item in members),
        }
        if row["role"] == "dense" or row["quality"] is not None:
            rows.append(row)
    return rows


def _mean(values):
    """Mean of the finite ones; infinity if all are infinite; None if there are none."""
    known = [float(value) for value in values if value is not None]
    finite = [value for value in known if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else (known[0] if known else None)
