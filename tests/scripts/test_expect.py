"""scripts/expect.py: the page is what the measured files say."""

import json

import pytest
from scripts_support import load_script


@pytest.fixture
def script():
    return load_script("expect.py")


def test_the_page_is_of_these_files(script):
    assert script.PAGE.read_text() == script.page(), "run `python scripts/expect.py`"


def test_minutes_follow_the_measured_layer(script, tmp_path, monkeypatch):
    for path in script.BENCHMARKS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    found = json.loads((tmp_path / "nvidia-h200.json").read_text())
    found["layer/wan14b_720p/bf16/speedup"] |= {
        "value": 2.0,
        "baseline": "stock Diffusers on cuDNN 300.0 ms, this 150.0 ms",
    }
    found["layer/wan14b_720p/bf16/speedup_fused_only"]["value"] = 1.25
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(found))
    monkeypatch.setattr(script, "BENCHMARKS", tmp_path)
    row = next(line for line in script.page().splitlines() if line.startswith("| Wan 14B"))
    sparse = 0.8 * 0.97
    minutes = 0.3 * 40 * 100 / 60
    ours = minutes * (sparse / 2 + (1 - sparse) / 1.25)
    assert f"| {minutes:.1f} | {ours:.1f} ({minutes / ours:.1f}x) |" in row
