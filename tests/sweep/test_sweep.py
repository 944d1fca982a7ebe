"""What a sweep does besides going on after a kill: its files, failures, other versions, missing ffmpeg, one process or many."""

import json
import shlex
import shutil
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from sweep_support import results_of, summary_of

from svg.cli import main
from svg.cli.sweep_display import TimeLeft, clock
from svg.eval.compare import compare
from svg.eval.files import to_json
from svg.eval.video import read_video
from svg.sweep.grid import cells_of, read_grid
from svg.sweep.journal import Journal, JournalError
from svg.sweep.run import ATTEMPTS, Results, read_frames, run_sweep

DONE = {"quality": None, "seconds": {"end_to_end": 2.0, "attention": 1.0}, "density": {"all_calls": 1.0}}


def test_summary(undisturbed):
    summary = summary_of(undisturbed)
    assert (summary["format"], summary["version"], summary["state"]) == ("svg-sweep", 1, "finished")
    assert summary["counts"] == {"total": 10, "finished": 10, "failed": 0, "pending": 0}
    cells = {cell["id"]: cell for cell in summary["cells"]}
    assert Counter(cell["role"] for cell in cells.values()) == {"dense": 2, "control": 2, "accelerated": 6}
    for cell in cells.values():
        assert cell["status"] == "finished" and cell["error"] is None and cell["attempts"] == 1
        assert (undisturbed / cell["video"]).is_file() and min(cell["seconds"].values()) > 0
        if cell["role"] == "dense":
            assert cell["reference"] is None and cell["quality"] is None and cell["speedup"] is None
        else:
            before = cells[cell["reference"]]["seconds"]
            assert cell["speedup"] == {key: pytest.approx(before[key] / cell["seconds"][key]) for key in before}
        if cell["role"] != "accelerated":
            assert cell["density"] == {"all_calls": 1, "sparse_calls": None}
            assert (undisturbed / cell["frames"]).is_file()
    (dense, control) = list(cells.values())[:2]
    assert dense["method"]["dense_backend"] == "auto" and control["method"]["dense_backend"] == "math"


def test_maps_and_kinds(undisturbed):
    cells = summary_of(undisturbed)["cells"]
    svg1 = next(cell for cell in cells if cell["label"] == "svg1")["transformers"]["transformer"]
    svg2 = next(cell for cell in cells if cell["label"] == "svg2 top_p=0.4")
    table = svg2["transformers"]["transformer"]["density"]["map"]
    values = np.array(table["values"])
    assert values.shape == (len(table["steps"]), len(table["layers"]), table["heads"]) == (3, 3, 2)
    assert (values[0] == 1).all() and (values[1:, 1:] < 1).any()
    assert values.mean() == pytest.approx(svg2["density"]["all_calls"], abs=1e-4)
    assert svg2["transformers"]["transformer"]["head_kinds"] is None and svg1["head_kinds_map"]["heads"] == 2


def test_quality_is_measured_on_raw_frames(write_grid):
    grid = write_grid(seeds=[0], control=False)
    assert main(["sweep", grid, "--out", "out", "--keep-frames"]) == 0
    dense, *others = summary_of("out")["cells"]
    reference, fps = read_frames(Path("out", dense["frames"]))
    assert reference.shape == (9, 32, 48, 3) and reference.dtype == np.uint8 and fps == 16
    for cell in others:
        frames, _ = read_frames(Path("out", cell["frames"]))
        assert to_json(compare(reference, frames, "none")) == cell["quality"]
        assert read_video(Path("out", cell["video"]))[0].shape == frames.shape


def test_reproduce(undisturbed, tmp_path, monkeypatch):
    """The command of a cell gives its video, byte for byte."""
    monkeypatch.chdir(tmp_path)
    cells = summary_of(undisturbed)["cells"]
    for cell, name in ((cells[0], "dense"), (cells[2], "accelerated"), (cells[4], "accelerated")):
        words = shlex.split(cell["reproduce"])
        assert words[:2] == ["svg", "generate"]
        assert main([words[1], "--out", cell["id"], *words[2:]]) == 0
        assert Path(cell["id"], f"{name}.mp4").read_bytes() == (undisturbed / cell["video"]).read_bytes()


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(write_grid, capsys):
    """cuDNN attention cannot run on a CPU, which shows in the first warm-up."""
    methods = [{"method": "svg1", "density": 0.5, "dense_backend": ["auto", "cudnn"]}, {"method": "svg2", "top_p": 0.5}]
    grid = write_grid(methods=methods, seeds=[0], control=False)
    assert main(["sweep", grid, "--out", "out"]) == 1
    out = capsys.readouterr().out
    cells = {cell["label"]: cell for cell in summary_of("out")["cells"]}
    failed = cells.pop("svg1 dense_backend=cudnn")
    assert failed["status"] == "failed" and failed["error"]["type"] == "ValueError" and failed["video"] is None
    assert "cannot run" in failed["error"]["message"] and "Traceback" in failed["error"]["traceback"]
    assert "failed: svg1 dense_backend=cudnn" in out
    assert {cell["status"] for cell in cells.values()} == {"finished"} and len(cells) == 3
    # It is tried again, alone.
    assert main(["sweep", grid, "--out", "out"]) == 1
    assert "1 cells to run, 3 are finished already" in capsys.readouterr().out


def test_a_larger_grid_adds_to_the_folder(undisturbed, write_grid, capsys):
    assert main(["sweep", write_grid(seeds=[0]), "--out", "out"]) == 0
    assert summary_of("out")["counts"]["total"] == 5
    capsys.readouterr()
    assert main(["sweep", write_grid(), "--out", "out"]) == 0
    assert "5 cells to run, 5 are finished already" in capsys.readouterr().out
    assert results_of("out") == results_of(undisturbed)


def test_journal_of_another_version(write_grid, capsys):
    Path("out/journal").mkdir(parents=True)
    Path("out/journal/format.json").write_text('{"format": "svg-sweep-journal", "version": 99}')
    Path("out/journal/a.json").write_text("{}")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert main(["sweep", write_grid(), "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert "must have version 1, got 99" in error and "choose another folder" in error
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_journal_alone(tmp_path):
    journal = Journal(tmp_path, 1)
    (tmp_path / "a.bin").write_bytes(b"abc")
    with journal.locked():
        journal.write("one", {"value": float("inf")}, ["a.bin"])
        journal.write("two", {"value": 2}, [])
        assert journal.read() == ({"one": {"value": "inf"}, "two": {"value": 2}}, [])
        with pytest.raises(JournalError, match="another sweep is writing"), Journal(tmp_path, 1).locked():
            pass
        with pytest.raises(ValueError, match="NaN"):
            journal.write("two", {"value": float("nan")}, [])
        (tmp_path / "journal" / "three.json").write_bytes((tmp_path / "journal" / "two.json").read_bytes())
        (tmp_path / "a.bin").write_bytes(b"abd")
        records, notes = journal.read()
    assert records == {"two": {"value": 2}} and len(notes) == 2
    assert "a.bin is damaged" in notes[0] and "another version or name" in notes[1]
    with pytest.raises(JournalError, match="got 1"):
        Journal(tmp_path, 2).check_version()


def test_without_ffmpeg_frames_are_kept_and_videos_follow(undisturbed, write_grid, monkeypatch, capsys):
    with monkeypatch.context() as without:
        for module in ("run", "finish"):
            without.setattr(f"svg.sweep.{module}.ffmpeg_is_there", lambda: False)
        assert main(["sweep", write_grid(), "--out", "out"]) == 0
        assert "ffmpeg is missing" in capsys.readouterr().out
        summary = summary_of("out")
        assert not list(Path("out/videos").iterdir()) and all(cell["frames"] for cell in summary["cells"])
        assert main(["sweep", "--no-run", "--out", "out"]) == 2
    assert main(["sweep", "--no-run", "--out", "out"]) == 0
    for cell in summary_of("out")["cells"]:
        assert Path("out", cell["video"]).read_bytes() == (undisturbed / "videos" / f"{cell['id']}.mp4").read_bytes()
    records, notes = Journal("out", 1).read()
    assert len(records) == 10 and not notes and not summary_of("out")["notes"]


def test_metrics_that_were_missing_are_taken_from_the_frames(write_grid):
    grid = write_grid(seeds=[0], control=False)
    assert main(["sweep", grid, "--out", "out", "--keep-frames"]) == 0
    before = {cell["id"]: cell["quality"] for cell in summary_of("out")["cells"]}
    assert main(["sweep", "--no-run", "--out", "out", "--lpips", "alex"]) == 0
    after = {cell["id"]: cell["quality"] for cell in summary_of("out")["cells"]}
    for name, quality in before.items():
        if quality is not None:
            assert quality["lpips"]["mean"] is None and after[name].pop("lpips")["mean"] > 0
            assert after[name] == {key: value for key, value in quality.items() if key != "lpips"}
    assert {record["status"] for record in Journal("out", 1).read()[0].values()} == {"finished"}


class FakePool:
    """Answers at once: errors by label, losses by label, else a small grey video."""

    def __init__(self, size=1, errors=None, losses=None):
        self.size, self.errors, self.losses = size, errors or {}, Counter(losses or {})
        self.ran, self.closed = [], False

    def submit(self, slot, cell, reference):
        self.ran.append((slot, cell, reference))
        future = Future()
        if self.losses[cell.label]:
            self.losses[cell.label] -= 1
            future.set_exception(ConnectionError("gone"))
        elif cell.label in self.errors:
            future.set_exception(self.errors[cell.label])
        else:
            future.set_result((dict(DONE), np.full((5, 32, 48, 3), cell.generation["seed"], np.uint8)))
        return future

    def lost(self, slot, error):
        return isinstance(error, ConnectionError)

    def close(self):
        self.closed = True


class Silent:
    def __init__(self):
        self.ended = []

    def start(self, cells, finished, workers):
        pass

    def begin(self, cell):
        pass

    def end(self, cell, record):
        self.ended.append(cell.label)

    def note(self, text):
        pass


def fake_sweep(grid, pool):
    display = Silent()
    results = Results("out", cells_of(read_grid(grid, {}), "cpu"), {"command": "svg sweep", "lpips": "none"})
    return run_sweep(results, lambda: pool, display), display


def test_reference_comes_first_and_reaches_every_worker(write_grid):
    pool = FakePool(size=3)
    summary, _ = fake_sweep(write_grid(), pool)
    assert summary["counts"]["finished"] == 10 and pool.closed
    assert [cell.label for _, cell, _ in pool.ran[:2]] == ["dense", "dense"]
    for _, cell, reference in pool.ran:
        if cell.role == "dense":
            assert reference is None
        else:
            assert (reference == cell.generation["seed"]).all()


def test_failed_reference_fails_what_needs_it(write_grid):
    pool = FakePool(errors={"dense": FloatingPointError("q must be finite")})
    summary, display = fake_sweep(write_grid(), pool)
    assert summary["counts"] == {"total": 10, "finished": 0, "failed": 10, "pending": 0} and len(pool.ran) == 2
    messages = {cell["error"]["message"] for cell in summary["cells"] if cell["role"] != "dense"}
    assert all("dense reference" in text and "q must be finite" in text for text in messages)
    assert len(display.ended) == 10


def test_lost_workers_are_tried_again_but_not_for_ever(write_grid):
    pool = FakePool(losses={"control": 1, "svg1": ATTEMPTS * 2})
    summary, _ = fake_sweep(write_grid(), pool)
    by_label = {(cell["label"], cell["generation"]["seed"]): cell for cell in summary["cells"]}
    assert by_label["control", 0]["attempts"] == 2 and by_label["control", 0]["status"] == "finished"
    assert by_label["svg1", 0]["status"] == by_label["svg1", 1]["status"] == "failed"
    assert f"lost {ATTEMPTS} times" in by_label["svg1", 0]["error"]["message"]
    assert summary["counts"]["finished"] == 8


def test_a_worker_keeps_its_model(write_grid, model, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    pool = FakePool(size=2)
    fake_sweep(write_grid(models=[str(model), str(tmp_path / "other")], seeds=[0], prompts=["a cat"]), pool)
    loads = [0, 0]
    for slot in (0, 1):
        names = [cell.model["name"] for s, cell, _ in pool.ran if s == slot]
        loads[slot] = 1 + sum(a != b for a, b in zip(names, names[1:]))
    assert loads == [1, 1]


def test_time_left(write_grid):
    cells = cells_of(read_grid(write_grid(seeds=[0]), {}), "cpu")
    left = TimeLeft(workers=2)
    assert left.seconds(cells) is None
    left.took(cells[0], 4.0)
    left.took(cells[3], 10.0)
    assert left.seconds(cells[3:4]) == 5.0 and left.seconds(cells[2:3]) == 3.5
    assert clock(59.6) == "1:00" and clock(3661) == "1:01:01"


def test_sweep_json_is_valid_while_it_runs(write_grid):
    seen = []

    class Looking(FakePool):
        def submit(self, slot, cell, reference):
            seen.append(json.loads(Path("out/sweep.json").read_text()))
            return super().submit(slot, cell, reference)

    fake_sweep(write_grid(), Looking())
    assert [summary["counts"]["pending"] for summary in seen] == list(range(10, 0, -1))
    assert {summary["state"] for summary in seen} == {"running"} and summary_of("out")["state"] == "finished"
    assert {cell["status"] for cell in seen[0]["cells"]} == {"pending"} and seen[0]["cells"][3]["reproduce"]
