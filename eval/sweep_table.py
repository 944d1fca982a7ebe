"""A sweep as tables: every cell's numbers, and what each setting gains over another on the same prompts and seeds."""

import csv
import math
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

from .files import atomic_path
from .names import METRICS

TIMES = ("attention", "transformer", "end_to_end")
CELL_FIELDS = (
    "label",
    "role",
    "status",
    "model",
    "prompt",
    "seed",
    "density",
    *METRICS,
    *(f"{time}_s" for time in TIMES),
)
PAIR_FIELDS = ("metric", "first", "second", "pairs", "mean_difference", "low", "high")
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond 30 the normal one is within 4 %.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
      2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def write_tables(sweep, folder):
    """Write sweep.csv, a row a cell, and paired.csv, a row a pair of settings and metric.

    Args:
        sweep: content of sweep.json.
        folder: where the tables go.

    Returns:
        Paths of the two files.
    """
    cells = [_cell(item) for item in sweep["cells"]]
    return [
        _write(Path(folder) / "sweep.csv", CELL_FIELDS, cells),
        _write(Path(folder) / "paired.csv", PAIR_FIELDS, paired(cells)),
    ]


def paired(cells):
    """Differences between settings over the prompts and seeds that both have.

    Args:
        cells: rows of `sweep.csv`.

    Returns:
        Rows of PAIR_FIELDS: mean of first minus second, and the ends of its 95 % confidence interval (Student's t); both
        ends are None for a single pair, which says nothing of the spread.
    """
    values = {}
    for cell in cells:
        if cell["role"] == "accelerated" and cell["status"] == "finished":
            values.setdefault(cell["label"], {})[cell["model"], cell["prompt"], cell["seed"]] = cell
    rows = []
    for (first, ours), (second, theirs) in combinations(values.items(), 2):
        for metric in METRICS:
            differences = [
                ours[key][metric] - theirs[key][metric]
                for key in ours.keys() & theirs.keys()
                if _is_number(ours[key][metric]) and _is_number(theirs[key][metric])
            ]
            if differences:
                rows.append(dict(zip(PAIR_FIELDS, (metric, first, second, len(differences), *_interval(differences)))))
    return rows


def _interval(differences):
    mean, count = fmean(differences), len(differences)
    if count == 1:
        return mean, None, None
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.96
    half = quantile * stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _cell(item):
    quality, seconds = item.get("quality") or {}, item.get("seconds") or {}
    generation, density = item["generation"], item.get("density") or {}
    return {
        "label": item["label"],
        "role": item["role"],
        "status": item["status"],
        "model": item["model"]["name"],
        "prompt": generation["prompt"],
        "seed": generation["seed"],
        "density": density.get("all_calls"),
        **{metric: (quality.get(metric) or {}).get("mean") for metric in METRICS},
        **{f"{time}_s": seconds.get(time) for time in TIMES},
    }


def _write(path, fields, rows):
    with atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fields)
        table.writeheader()
        table.writerows(rows)
    return path
