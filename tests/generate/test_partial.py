"""Whatever stops a run, the videos that were finished are there and whole, with a report that says what is missing."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from svg.eval.video import read_video
from svg.generate import run_job

QUICK = ("--lpips", "none")


def report_of(folder="svg-out"):
    return json.loads(Path(folder, "report.json").read_text())


@pytest.fixture
def fail_in(monkeypatch):
    """Let the timed run of a name raise an error."""

    def install(name, error):
        original, config_of = run_job.generate, {}

        def accelerate(pipe, config):
            config_of["now"] = config
            return run_job_accelerate(pipe, config)

        def generate(pipe, request, on_step=None):
            config = config_of["now"]
            run = (
                "accelerated" if config.method != "dense" else "control" if config.dense_backend == "math" else "dense"
            )
            if run == name:
                raise error
            return original(pipe, request, on_step)

        run_job_accelerate = run_job.accelerate
        monkeypatch.setattr(run_job, "accelerate", accelerate)
        monkeypatch.setattr(run_job, "generate", generate)

    return install


def test_the_accelerated_video_is_there_before_dense_runs(generate, monkeypatch):
    seen, original = [], run_job.generate

    def watched(pipe, request, on_step=None):
        seen.append(sorted(os.listdir("svg-out")) if os.path.isdir("svg-out") else [])
        return original(pipe, request, on_step)

    monkeypatch.setattr(run_job, "generate", watched)
    assert generate(*QUICK) == 0
    first = [".svg-unfinished", "accelerated.mp4", "report.html", "report.json"]
    assert seen == [[], first, sorted([*first, "dense.mp4", "side_by_side.mp4"])]
    report = report_of()
    assert report["state"] == "finished" and list(report["runs"]) == ["dense", "accelerated", "control"]


@pytest.mark.parametrize(
    "error, code, state, words",
    [
        (KeyboardInterrupt(), 130, "interrupted", "interrupted in the dense run"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            1,
            "failed",
            "the dense run failed: OutOfMemoryError: CUDA out of memory",
        ),
        (OSError(28, "No space left on device"), 1, "failed", "No space left on device"),
    ],
)
def test_what_stops_the_dense_run_keeps_the_accelerated_video(generate, fail_in, capsys, error, code, state, words):
    fail_in("dense", error)
    assert generate(*QUICK) == code
    assert sorted(os.listdir("svg-out")) == [".svg-unfinished", "accelerated.mp4", "report.html", "report.json"]
    assert sorted(os.listdir()) == ["svg-out"]
    assert len(read_video("svg-out/accelerated.mp4")[0]) == 9
    report = report_of()
    assert report["state"] == state and words in report["stopped"] and list(report["runs"]) == ["accelerated"]
    err = capsys.readouterr().err
    assert words in err and "kept in svg-out: accelerated.mp4" in err


def test_a_failing_control_is_a_note(generate, fail_in):
    fail_in("control", torch.OutOfMemoryError("no memory"))
    assert generate(*QUICK) == 0
    report = report_of()
    assert report["state"] == "finished" and set(report["runs"]) == {"dense", "accelerated"}
    assert any("no control: OutOfMemoryError: no memory" in note for note in report["notes"])


def test_a_failing_metric_is_a_note(generate, monkeypatch):
    def broken(*args):
        raise RuntimeError("no metric today")

    monkeypatch.setattr(run_job, "compare", broken)
    assert generate(*QUICK, "--no-control") == 0
    report = report_of()
    assert report["state"] == "finished" and report["quality"] == {}
    assert any("could not be measured: RuntimeError: no metric today" in note for note in report["notes"])


def test_an_earlier_result_stays_until_the_first_video_is_finished(generate, fail_in):
    assert generate(*QUICK, "--fast") == 0
    before = Path("svg-out/accelerated.mp4").read_bytes()
    fail_in("accelerated", KeyboardInterrupt())
    assert generate(*QUICK, "--seed", 3, "--force") == 130
    assert Path("svg-out/accelerated.mp4").read_bytes() == before and report_of()["seeds"]["noise"] == 0


def test_fast_makes_one_video(generate):
    assert generate("--fast") == 0
    assert sorted(os.listdir("svg-out")) == ["accelerated.mp4", "report.html", "report.json"]


def test_prompts_from_a_file_load_once_and_go_on(generate, monkeypatch, capsys):
    Path("prompts.txt").write_text("# two prompts\na red ball\n\na blue cat moves left\n")
    loads, original = [], run_job.load
    monkeypatch.setattr(run_job, "load", lambda job: loads.append(job) or original(job))
    arguments = ("--prompts", "prompts.txt", "--fast", "--out", "many")
    assert generate(*arguments, prompt=()) == 0
    assert sorted(os.listdir("many")) == ["001-a-red-ball", "002-a-blue-cat-moves-left"] and len(loads) == 1
    assert report_of("many/002-a-blue-cat-moves-left")["generation"]["prompt"] == "a blue cat moves left"
    Path("many/002-a-blue-cat-moves-left/report.json").unlink()
    for path in Path("many/002-a-blue-cat-moves-left").iterdir():
        path.unlink()
    assert generate(*arguments, prompt=()) == 0
    assert "1 of 2 prompts are done already" in capsys.readouterr().out and len(loads) == 2
    assert generate(*arguments, prompt=()) == 0 and len(loads) == 2
    assert generate(*arguments) == 2 and "one of them" in capsys.readouterr().err


def test_an_interrupt_after_everything_is_written_says_so(generate, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("svg.cli.console.print_report", interrupted)
    assert generate(*QUICK, "--no-control") == 130 and report_of()["state"] == "finished"
    said = capsys.readouterr().err
    assert "interrupted; finished: svg-out" in said and "nothing was written" not in said


@pytest.mark.slow
def test_ten_interrupts_at_random_moments_lose_no_finished_video(generate, monkeypatch):
    """SIGALRM stands for Ctrl-C: its handler raises the same KeyboardInterrupt wherever the run is."""
    start = time.monotonic()
    assert generate(*QUICK, "--no-control", "--out", "whole") == 0
    whole = time.monotonic() - start
    finished, original = [], run_job.generate

    def watched(pipe, request, on_step=None):
        result = original(pipe, request, on_step)
        finished.append(result)
        return result

    monkeypatch.setattr(run_job, "generate", watched)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    chance = random.Random(1)
    states = []
    try:
        for index in range(10):
            out = Path(f"out{index}")
            finished.clear()
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.1, 1) * whole)
            code = generate(*QUICK, "--no-control", "--out", out)
            signal.setitimer(signal.ITIMER_REAL, 0)
            videos = [name for name in ("accelerated", "dense") if (out / f"{name}.mp4").exists()]
            assert len(videos) >= min(len(finished) - 1, 2), "at most the run that was just ending may be missing"
            for name in videos:
                assert len(read_video(out / f"{name}.mp4")[0]) == 9
            if videos:
                report = report_of(out)
                assert set(videos) <= set(report["runs"])
                # One that comes while the table is printed finds everything written.
                assert report["state"] == "finished" if code == 0 else report["state"] in ("interrupted", "finished")
            states.append(code)
            assert not [name for name in os.listdir() if name.endswith(".part")]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert set(states) <= {0, 130} and 130 in states
