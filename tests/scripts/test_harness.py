"""scripts/checks/harness.py: the verdicts, without a GPU."""

import json
import math

import pytest
import torch
from scripts_support import load_script


@pytest.fixture(scope="module")
def harness():
    return load_script("checks/harness.py")


def good():
    yield "equal", torch.tensor(2), 2
    yield "no number", float("nan"), 5


def bad():
    yield "first", 0, 0
    raise RuntimeError("broken")


def test_a_row_passes_up_to_its_limit_and_nan_never_does(harness):
    rows = list(harness.judge(good(), "good"))
    assert [row["ok"] for row in rows] == [True, False] and rows[1]["measured"] == math.inf


def test_a_check_that_raises_is_a_failed_row_and_the_rest_runs(harness, tmp_path, capsys):
    results = {"checks": []}
    harness.judge_all([bad, good], results["checks"], harness.saving(tmp_path / "out.json", results))
    assert [row["name"] for row in results["checks"]] == ["first", "bad raised", "equal", "no number"]
    assert [row["ok"] for row in results["checks"]] == [True, False, True, False]
    assert json.loads((tmp_path / "out.json").read_text()) == results
    with pytest.raises(SystemExit) as ended:
        harness.finish(results["checks"])
    assert ended.value.code == 1 and "2 checks passed, 2 failed" in capsys.readouterr().out


def test_all_good_ends_with_zero(harness):
    with pytest.raises(SystemExit) as ended:
        harness.finish([{"ok": True}])
    assert ended.value.code == 0


def test_differences_are_of_bits(harness):
    zero = torch.tensor([0.0, math.nan])
    assert harness.differences(zero, zero) == 0
    assert harness.differences(zero, torch.tensor([-0.0, math.nan])) == 1
