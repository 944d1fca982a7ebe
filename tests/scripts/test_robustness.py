"""scripts/robustness: a small slice of each harness; the whole ones take minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripts_support import load_script

FOLDER = Path(__file__).parents[2] / "scripts" / "robustness"


@pytest.mark.parametrize(
    "words",
    [
        ["wrong_calls.py", "--sample", "400"],
        ["wrong_commands.py", "--only", "pictures", "--sample", "12"],
        ["kills.py", "--kills", "4", "--only", "adapt", "record"],
        ["long_run.py", "--runs", "6"],
    ],
    ids=lambda words: words[0],
)
def test_a_slice(tmp_path, words):
    run = subprocess.run([sys.executable, FOLDER / words[0], *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]


@pytest.fixture
def long_run(tmp_path, monkeypatch):
    """A long run of one combination, each generation a round."""
    monkeypatch.syspath_prepend(FOLDER)
    script = load_script("robustness/long_run.py")
    monkeypatch.setattr(script, "WIDE", {"wan": script.WIDE["wan"]})
    monkeypatch.setattr(script, "SETTINGS", {"near": script.SETTINGS["near"]})
    return script, script.LongRun(tmp_path, "cpu", tmp_path / "long.json")


def test_a_long_run_sees_what_grows_and_what_changes(long_run, tmp_path, monkeypatch):
    script, run = long_run
    assert run.todo == [("wan", "near", (32, 48, 9))]
    run.once(0)
    run.once(1)
    run.judge_growth()
    assert run.faults == []
    held = []
    real = script.run

    def leaks(*args):
        held.append((tmp_path / "long.json").open())
        return real(*args) + "changed"

    monkeypatch.setattr(script, "run", leaks)
    run.once(2)
    run.judge_growth()
    [file.close() for file in held]
    other, grown = run.faults
    assert "gives other frames" in other and grown.startswith("descriptors grew")


def test_a_long_run_goes_on_after_an_error_and_writes_as_it_goes(long_run, tmp_path, monkeypatch):
    script, run = long_run
    monkeypatch.setitem(script.SETTINGS, "near", {"method": "near", "linears": "no.json"})
    run.once(0)
    run.once(1)
    found = json.loads((tmp_path / "long.json").read_text())
    assert found["runs"] == 2 and len(found["rounds"]) == 2
    assert len(found["faults"]) == 1 and "no.json" in found["faults"][0]
