"""scripts/robustness: a small slice of each harness; the whole ones take minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

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
