"""sweep.csv holds every cell; paired.csv compares settings on the same prompts and seeds."""

import csv

import pytest

from svg.eval.sweep_table import paired, write_tables


def cell(label, prompt, psnr, role="accelerated", status="finished"):
    return {
        "label": label, "role": role, "status": status, "model": {"name": "tiny"},
        "generation": {"prompt": prompt, "seed": 0}, "density": {"all_calls": 0.3},
        "quality": {"psnr": {"mean": psnr}}, "seconds": {"attention": 1.0, "transformer": 2.0, "end_to_end": 3.0},
    }  # fmt: skip


CELLS = [
    cell("a", "one", 30.0),
    cell("a", "two", 40.0),
    cell("b", "one", 28.0),
    cell("b", "two", 39.0),
    cell("c", "one", 20.0),
]


def test_tables(tmp_path):
    write_tables({"cells": [*CELLS, cell("a", "three", "inf"), cell("d", "one", None, status="failed")]}, tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "sweep.csv")))
    assert len(rows) == 7 and rows[0]["psnr"] == "30.0" and rows[0]["attention_s"] == "1.0" and rows[6]["psnr"] == ""
    pairs = {(row["first"], row["second"]): row for row in csv.DictReader(open(tmp_path / "paired.csv"))}
    assert set(pairs) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert pairs["a", "c"]["pairs"] == "1" and pairs["a", "c"]["low"] == ""


def test_the_interval_is_of_the_differences_not_of_the_values():
    """Differences 2 and 1: mean 1.5, standard deviation 0.7071, 12.706 * 0.7071 / sqrt(2) = 6.353 to either side."""
    cells = [
        {"label": c["label"], "role": c["role"], "status": c["status"], "model": "tiny", "prompt": c["generation"]["prompt"],
         "seed": 0, "psnr": c["quality"]["psnr"]["mean"], "ssim": None, "lpips": None, "temporal_psnr": None, "vmaf": None}
        for c in CELLS
    ]  # fmt: skip
    row = next(row for row in paired(cells) if (row["first"], row["second"]) == ("a", "b"))
    assert row["pairs"] == 2 and row["mean_difference"] == 1.5
    assert (row["low"], row["high"]) == (pytest.approx(1.5 - 6.353, abs=1e-3), pytest.approx(1.5 + 6.353, abs=1e-3))
