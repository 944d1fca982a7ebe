"""`svg generate --gpus`: two processes make the video that one makes; whoever stops, all stop, and one message says why."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from svg.eval.metrics import psnr
from svg.eval.video import read_video
from svg.generate import run_job, several_gpus

COMMAND = [
    *(
        "generate",
        "a large red circle moving right",
        "--frames",
        "5",
        "--height",
        "64",
        "--width",
        "64",
        "--steps",
        "3",
    ),
    *("--fast", "--lpips", "none"),
]


def svg(*arguments, folder):
    command = [sys.executable, "-P", "-m", "svg", *COMMAND, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["sequence", "branches"])
def test_two_processes_make_the_same_video(tmp_path, split):
    apart = ("--set", "share_branches=false") if split == "branches" else ()  # branches of two processes choose apart
    for out, flags in (("one", apart), ("two", ("--gpus", "2", "--split", split))):
        done = svg(*flags, "--out", out, folder=tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    one, two = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("one", "two"))
    frames = [read_video(tmp_path / out / "accelerated.mp4")[0] for out in ("one", "two")]
    assert min(psnr(*frames)) > 45
    assert two["method"]["share_branches"] == (split == "sequence")
    assert any("share_branches is off" in note for note in two["notes"]) == (split == "branches")
    assert (one["gpus"], two["gpus"]) == (1, 2) and "--gpus 2" in two["command"]
    assert two["density"]["sparse_calls"] == pytest.approx(one["density"]["sparse_calls"], abs=1e-3)
    calls = [run["runs"]["accelerated"]["transformers"]["transformer"]["calls"] for run in (one, two)]
    assert calls[0] == calls[1]
    per_head = [run["runs"]["accelerated"]["transformers"]["transformer"]["density"]["per_head"] for run in (one, two)]
    assert per_head[0].keys() == per_head[1].keys() and len(per_head[1]["0"]) == 6
    assert one["runs"]["accelerated"]["ranks"] is None and len(two["runs"]["accelerated"]["ranks"]) == 2


def test_what_every_process_refuses_is_said_once(tmp_path):
    done = svg("--gpus", "2", "--device", "cuda", "--out", "out", folder=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("svg: error: device must be present, got cuda with 0 GPUs visible to torch")


def test_a_device_of_ones_own_is_refused(tmp_path):
    done = svg("--gpus", "2", "--device", "cuda:1", "--out", "out", folder=tmp_path)
    assert done.returncode == 2 and "--device must be auto, cuda or cpu with --gpus, got cuda:1" in done.stderr


def test_a_process_that_follows_runs_all_and_needs_no_folder(monkeypatch):
    ran = []
    monkeypatch.setattr(run_job._Run, "_one", lambda self, name: ran.append(name))
    job = SimpleNamespace(config=SimpleNamespace(method="near"), control=True, dense=True)
    report = run_job._Follower(None, job, None, None).everything()
    assert ran == ["accelerated", "dense", "control"] and report["state"] == "finished" and report["stopped"] is None


def failure(folder, place, message=None, code=2):
    file = folder / f"{place}.json"
    data = {}
    if message is not None:
        data = {"message": message, "code": 2}
        file.write_text(json.dumps(data))
    return SimpleNamespace(exitcode=code, error_file=str(file), error_file_data=data, timestamp=place)


def test_the_words_of_whoever_stopped(tmp_path):
    said = several_gpus._why({1: failure(tmp_path, 1, "out of memory", -15), 0: failure(tmp_path, 0, code=-15)})
    assert said == (2, "GPU 1: out of memory")
    assert several_gpus._why({n: failure(tmp_path, n, "no budget") for n in (1, 0)}) == (2, "no budget")
    silent = {1: failure(tmp_path, 3, code=-9), 0: failure(tmp_path, 4, code=-15)}
    assert several_gpus._why(silent) == (1, "process 1 of 2 ended with exit code -9")


def test_last_words_are_where_the_launcher_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "words.json"))
    assert several_gpus.rank() is None
    monkeypatch.setenv("RANK", "1")
    several_gpus.last_words("too large", 2)
    assert several_gpus.rank() == 1 and json.loads((tmp_path / "words.json").read_text())["message"] == "too large"
