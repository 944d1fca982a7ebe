"""What no run could do is refused before a model is loaded, a process is started or a folder is made."""

import json
import os
from pathlib import Path

import pytest
import torch

from svg.cli import main
from svg.generate.several_gpus import check_gpus

SIZE = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2", "--device", "cpu"]
TUNE = ["tune", "--min-psnr", "9", "--prompt", "a cat", "--held-out", "a dog", "--method", "near"]
GENERATE = ["generate", "a cat"]
LINEARS = {"format": "svg-linears", "version": 1, "about": {}, "transformers": {"other": {}}}


@pytest.fixture
def refused(model, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder, in which nothing may be loaded, started or left: its one line."""

    def late(*args, **kwargs):
        raise AssertionError("refused too late")

    monkeypatch.chdir(tmp_path)
    for name in ("recordings.linear_precisions", "generate.run_job", "sweep.worker"):
        monkeypatch.setattr(f"svg.{name}.load_pipeline", late)
    monkeypatch.setattr("svg.cli.generate.start", late)

    def run(*words, size=SIZE):
        before = sorted(Path().rglob("*"))
        assert main([*words, "--model", str(model), *size]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sorted(Path().rglob("*")) == before
        return line

    return run


@pytest.mark.parametrize("value", ["nan", "0", "-1", "inf"])
def test_errors_of_linears(refused, value):
    assert "max_error must be > 0 and finite" in refused("adapt-linears", "a", "--max-error", value)


def test_prompts_and_sizes_of_adapt_linears(refused):
    assert "prompt must not be empty" in refused("adapt-linears", " ")
    assert "height must be a multiple of 16" in refused("adapt-linears", "a", "--height", "33", size=SIZE[2:])


def test_files_of_linears(refused):
    Path("other.json").write_text(json.dumps(LINEARS))
    assert "precision for every linear of transformer" in refused(*GENERATE, "--linears", "other.json")
    assert "make one with `svg adapt-linears`" in refused(*GENERATE, "--linears", "none.json")


@pytest.mark.parametrize("text", ["[1e400]", f"[1{'0' * 400}]", "[-1, 2]", "[0]", '["a"]', "[]"])
def test_ratios_of_magcache(refused, text):
    Path("ratios.json").write_text(text)
    assert "a JSON list of ratios above 0" in refused(*GENERATE, "--cache", "magcache=ratios.json")


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 6000])
def test_settings_that_cannot_be_read(refused, value):
    line = refused(*GENERATE, "--set", f"budget={value}")
    assert "--set must have a value that can be read, got 'budget=" in line and len(line) < 400


def test_deep_json_is_named(refused):
    Path("deep.json").write_text("[" * 100_000)
    assert "deep.json: JSON must not be nested" in refused(*GENERATE, "--cache", "magcache=deep.json")


def test_more_processes_than_heads(refused):
    assert "--gpus must be at most 2, the attention heads of" in refused(*GENERATE, "--gpus", "3")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2, "auto")
    check_gpus(9, "cpu")
    with pytest.raises(ValueError, match="--gpus must be at most 2, the GPUs visible to torch, got 3"):
        check_gpus(3, "cuda")


def test_budgets_that_a_short_video_cannot_keep(refused):
    short = ["--height", "16", "--width", "16", "--frames", "5", "--steps", "2", "--lpips", "none", "--device", "cpu"]
    assert "budget must be 1 at 2 tokens" in refused(*GENERATE, "--method", "near", size=short)
    assert "budget must be 1 at 2 tokens" in refused(*TUNE, size=short)
    line = refused(*TUNE, "--set", "budget=1.0", size=short)
    assert "frames, height and width must give near more to tune, got 5 x 16 x 16" in line


def test_nothing_left_to_tune(refused):
    line = refused(*TUNE, "--set", "warmup_layers=1.0")
    assert "warmup_layers must leave a layer of 3 sparse, got 1.0" in line


@pytest.mark.parametrize("there, command", [("report.json", TUNE), ("sweep.json", TUNE), ("report.json", ["sweep"]), ("curves", ["sweep"])])  # fmt: skip
def test_results_of_another_command_stay(refused, there, command):
    os.makedirs("out")
    Path("out", there).touch()
    prompt = ["--prompt", "a"] if command == ["sweep"] else []
    assert f"with {there}: choose another folder" in refused(*command, *prompt, "--out", "out")


def test_a_model_of_a_grid_without_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text(json.dumps({"models": [{}], "prompts": ["a"]}))
    assert main(["sweep", "g.yaml", "--out", "new"]) == 2
    assert "an entry of models must have 'model' or 'preset'" in capsys.readouterr().err and not Path("new").exists()


@pytest.mark.parametrize(
    "words", [["page", "x" * 300], ["evaluate", "x" * 300, "a.mp4"], ["evaluate", "a.mp4", "x" * 300]]
)
def test_names_that_are_too_long(capsys, words):
    assert main(words) == 2
    line = capsys.readouterr().err
    assert ("no folder at" in line or "no video at" in line) and "Errno" not in line


def test_a_page_is_not_made_for_a_wrong_metric(tmp_path, capsys):
    assert main(["page", str(tmp_path), "--metric", "x"]) == 2
    assert "metric must be one of" in capsys.readouterr().err


def test_reports_of_another_shape(model, tmp_path, capsys):
    folder = tmp_path / "run"
    size = ["--model", str(model), *SIZE, "--method", "svg1", "--lpips", "none", "--fast"]
    assert main([*GENERATE, *size, "--out", str(folder)]) == 0
    os.remove(folder / "report.html")
    content = json.loads((folder / "report.json").read_text())
    for name, value in (("runs", [1]), ("device", None), ("command", None), ("versions", []), ("notes", {})):
        (folder / "report.json").write_text(json.dumps({**content, name: value}))
        capsys.readouterr()
        assert main(["page", str(folder)]) == 2
        assert f"{name} must be a" in capsys.readouterr().err and not (folder / "report.html").exists()
