"""scripts/bench/first_call.py: both processes run, and report what they measured."""

import json
import subprocess
import sys

from scripts_support import SCRIPTS


def test_a_toy_on_a_cpu(tmp_path):
    toy = ["--device", "cpu", "--layers", "1", "--heads", "1", "--size", "17x128x128"]
    out = tmp_path / "first.json"
    command = [sys.executable, SCRIPTS / "bench" / "first_call.py", *toy, "--set", "budget=0.5", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    for name in ("clean", "cached"):
        assert result[name].keys() == {"first", "again", "kernels", "mib"}
        assert result[name]["first"] > 0 and result[name]["again"] > 0 and result[name]["kernels"] == 0
    assert "--set budget=0.5" in result["command"]
