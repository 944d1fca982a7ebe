"""Killed at any moment, a sweep goes on without loss or repetition and ends as if it had never been disturbed."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from sweep_support import killed, results_of, start, summary_of

from svg.cli import main


def journal(out):
    """Inode and time of every finished entry: a cell that ran again would have another."""
    entries = {}
    for path in Path(out, "journal").glob("*.json"):
        if path.name != "format.json" and json.loads(path.read_text())["record"]["status"] == "finished":
            entries[path.stem] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return entries


def assert_kept(before, out):
    after = journal(out)
    assert {name: after.get(name) for name in before} == before


def test_killed_at_random_moments(undisturbed, write_grid):
    grid = write_grid()
    moments = random.Random()
    kills, before = [], {}
    while len(kills) < 3:
        child = start([grid, "--out", "out"])
        while not Path("out/journal").exists():
            time.sleep(0.01)
        kills.append(moments.uniform(0.1, 1.5))
        if not killed(child, kills[-1]):
            break  # done before
        assert_kept(before, "out")
        before = journal("out")
    child = start([grid, "--out", "out"])
    child.join()
    assert child.exitcode == 0, kills
    assert_kept(before, "out")
    assert results_of("out") == results_of(undisturbed), kills
    assert not list(Path("out").rglob(".*.part"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_around_every_kind_of_file(undisturbed, write_grid, after):
    """Renames of a cell: video, frames, journal entry, sweep.json; two before the first cell."""
    grid, before = write_grid(), {}
    for count in (1, 2, 3, 4, 5, 6):
        child = start([grid, "--out", "out"], die_at_replace=count, after=after)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert_kept(before, "out")
        before = journal("out")
    assert len(before) == (1 if not after else 2)
    assert main(["sweep", grid, "--out", "out"]) == 0
    assert_kept(before, "out")
    assert results_of("out") == results_of(undisturbed)


def test_full_disk_leaves_finished_cells_intact(write_grid):
    small = write_grid("small.yaml", seeds=[0], methods=[{"method": "svg1", "density": 0.5, "block_size": 4}])
    assert main(["sweep", small, "--out", "out"]) == 0
    before, kept = journal("out"), results_of("out")
    child = start([write_grid(), "--out", "out"], file_limit=Path("out/sweep.json").stat().st_size + 2000)
    child.join()
    error = Path("child.log").read_text()
    assert child.exitcode == 2 and "out could not be written to" in error
    assert "finished cells in it are intact" in error and "Traceback" not in error
    assert_kept(before, "out")
    assert main(["sweep", small, "--out", "out"]) == 0
    assert results_of("out") == kept and not list(Path("out").rglob(".*.part"))


def test_damaged_files_are_not_trusted(undisturbed, write_grid, capsys):
    grid = write_grid()
    assert main(["sweep", grid, "--out", "out"]) == 0
    cells = summary_of("out")["cells"]
    half, forged, cut, gone = [cell for cell in cells if cell["role"] == "accelerated"][:4]
    path = Path("out/journal", f"{half['id']}.json")
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    path = Path("out/journal", f"{forged['id']}.json")
    path.write_text(path.read_text().replace('"status": "finished"', '"status": "failed"'))
    video = Path("out", cut["video"])
    video.write_bytes(video.read_bytes()[:-100])
    Path("out", gone["video"]).unlink()
    before = journal_without("out", {cell["id"] for cell in (half, forged, cut, gone)})
    capsys.readouterr()
    assert main(["sweep", grid, "--out", "out"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 cells to run, 6 are finished already" in out
    assert f"{half['id']}.json in the journal is not used: it is damaged" in out
    assert f"{gone['video']} is missing" in out and f"{cut['video']} is damaged" in out
    assert_kept(before, "out")
    assert results_of("out") == results_of(undisturbed)


def journal_without(out, names):
    whole = {}
    for path in Path(out, "journal").glob("*.json"):
        if path.stem not in names | {"format"}:
            whole[path.stem] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return whole


def test_two_sweeps_in_one_folder(write_grid, capsys):
    grid = write_grid()
    child = start([grid, "--out", "out"])
    while not Path("out/sweep.json").exists():
        time.sleep(0.01)
    assert main(["sweep", grid, "--out", "out"]) == 2
    assert "another sweep is writing to" in capsys.readouterr().err
    child.kill()
    child.join()


def test_interrupt(write_grid):
    child = start([write_grid(steps=3000, methods=["svg1"]), "--out", "out"])
    while not Path("out/sweep.json").exists():
        time.sleep(0.01)
    time.sleep(1)
    os.kill(child.pid, signal.SIGINT)
    child.join(30)
    assert child.exitcode == 130
    assert "interrupted: finished cells stay in out" in Path("child.log").read_text()
