"""`svg evaluate` on files and folders, good and bad."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from svg.cli import main
from svg.eval.video import write_video


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of three pairs: one differs, one is identical, one has another length."""
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3)).astype(np.uint8)
    for folder in ("ref", "out"):
        Path(folder).mkdir()
        Path(folder, "notes.txt").write_text("not a video")
        write_video(f"{folder}/same.mp4", frames, fps=8)
    write_video("ref/moved.mp4", frames, fps=8)
    write_video("out/moved.mp4", np.roll(frames, 1, axis=2), fps=8)


def fail(capsys, *arguments):
    assert main(["evaluate", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("svg: error: ")
    return line


def test_folders(folders, capsys):
    assert main(["evaluate", "ref", "out", "--json", "all.json", "--csv", "all.csv", "--lpips", "none"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "moved" in out and "VMAF" in out and "inf" in out
    result = json.loads(Path("all.json").read_text())
    moved, same = result["pairs"]
    assert (moved["name"], same["name"]) == ("moved", "same") and same["psnr"]["mean"] == "inf"
    assert result["mean"]["psnr"] == moved["psnr"]["mean"]
    assert result["mean"]["ssim"] == pytest.approx((moved["ssim"]["mean"] + 1) / 2)
    assert result["mean"]["lpips"] is None
    rows = list(csv.DictReader(Path("all.csv").open()))
    assert [(row["video"], row["frame"]) for row in rows] == [(n, str(i)) for n in ("moved", "same") for i in range(4)]
    assert [float(row["ssim"]) for row in rows[:4]] == moved["ssim"]["per_frame"]
    assert rows[0]["temporal_psnr"] == "" and float(rows[1]["temporal_psnr"]) > 0 and rows[4]["psnr"] == "inf"


def test_one_bad_pair_is_named_and_the_rest_goes_on(folders, capsys):
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    write_video("ref/short.mp4", frames, fps=8)
    write_video("out/short.mp4", frames[:2], fps=8)
    Path("ref/broken.mp4").write_text("nothing")
    write_video("out/broken.mp4", frames, fps=8)
    assert main(["evaluate", "ref", "out", "--json", "all.json", "--csv", "all.csv", "--lpips", "none"]) == 1
    pairs = {pair["name"]: pair for pair in json.loads(Path("all.json").read_text())["pairs"]}
    assert "output ends after 2 frames" in pairs["short"]["error"] and "not a video" in pairs["broken"]["error"]
    assert pairs["same"]["ssim"]["mean"] == pytest.approx(1)
    assert {row["video"] for row in csv.DictReader(Path("all.csv").open())} == {"moved", "same"}
    assert "not measured: short" in capsys.readouterr().out


def test_pairs_must_be_complete(folders, capsys):
    Path("out/moved.mp4").rename("out/other.mp4")
    line = fail(capsys, "ref", "out")
    assert "counterpart" in line and "moved" in line
    Path("ref/moved.mp4").rename("ref/other.mkv")
    assert main(["evaluate", "ref", "out", "--lpips", "none"]) == 0
    (Path("ref") / "other.mov").write_bytes(Path("ref/other.mkv").read_bytes())
    assert "unique" in fail(capsys, "ref", "out")


def test_a_folder_and_a_file(folders, capsys):
    assert "two videos or two folders" in fail(capsys, "ref", "out/same.mp4")
    Path("empty").mkdir()
    assert "must hold videos" in fail(capsys, "ref", "empty")


def test_csv_of_one_pair(folders):
    assert main(["evaluate", "ref/moved.mp4", "out/moved.mp4", "--lpips", "none", "--csv", "one.csv"]) == 0
    rows = list(csv.DictReader(Path("one.csv").open()))
    assert len(rows) == 4 and {row["video"] for row in rows} == {"moved.mp4"} and {row["lpips"] for row in rows} == {""}
