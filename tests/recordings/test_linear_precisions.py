"""Which linears run in 8 bits, by the error of each on what a run gives it."""

import json

import pytest
import torch
from tiny_model import model  # noqa: F401
from tiny_pipelines import saver

import svg
from svg.cli import main
from svg.config import DenseConfig
from svg.pipelines import GenerationRequest, load_pipeline
from svg.pipelines.linears import QuantizedLinear, find_linears
from svg.pipelines.linears_file import read_linears
from svg.pipelines.registry import find_spec
from svg.recordings.linear_precisions import adapt_linears

REQUEST = GenerationRequest(prompt="a red ball", height=32, width=48, num_frames=9, steps=2)
SIZE = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2"]


def test_command_and_use(model, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "linears.json"
    assert (
        main(["adapt-linears", "a ball", "--model", str(model), *SIZE, "--max-error", "0.04", "--out", str(out)]) == 0
    )
    assert "linears in 8 bits" in capsys.readouterr().out
    content = json.loads(out.read_text())
    linears = content["transformers"]["transformer"]
    pipe = load_pipeline(model, device="cpu")
    assert list(linears) == find_linears(pipe.transformer, find_spec(pipe.transformer), "all")
    assert all(0.005 < one["error"] < 0.1 for one in linears.values())
    spread = sorted(one["error"] for one in linears.values())
    for choice in linears.values():
        choice["precision"] = "fp8" if choice["error"] <= spread[3] else "native"
    out.write_text(json.dumps(content))
    svg.accelerate(pipe, DenseConfig(linears=str(out)))
    found = [name for name, one in pipe.transformer.named_modules() if isinstance(one, QuantizedLinear)]
    assert set(found) == set(read_linears(str(out), "transformer")) and len(found) == 4


def test_a_linear_that_8_bits_would_spoil_stays(model):  # noqa: F811
    pipe = load_pipeline(model, device="cpu")
    spoilt = pipe.transformer.blocks[1].ffn.net[2]
    with torch.no_grad():
        spoilt.weight[:, :8] *= 1e6  # the rest of a row is below half a step of its scale
        spoilt.weight[:, 8:] *= 1e-3
        spoilt.bias.zero_()
        pipe.transformer.blocks[1].ffn.net[0].proj.weight[:8] = 0
        pipe.transformer.blocks[1].ffn.net[0].proj.bias[:8] = 0
    found = adapt_linears(pipe, REQUEST, 0.06)["transformer"]
    assert [name for name, one in found.items() if one["precision"] == "native"] == ["blocks.1.ffn.net.2"]
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    int8 = adapt_linears(pipe, REQUEST, 0.06, precision="int8")["transformer"]
    assert {one["precision"] for one in int8.values()} == {"int8", "native"}


def test_files_of_another_kind_are_named(model, tmp_path):  # noqa: F811
    pipe = load_pipeline(model, device="cpu")
    with pytest.raises(ValueError, match="which is not there; make one with `svg adapt-linears`"):
        svg.accelerate(pipe, DenseConfig(linears=str(tmp_path / "none.json")))
    path = tmp_path / "linears.json"
    for content, message in (
        ([], "must say which linears"),
        ({"format": "svg-linears", "version": 1, "transformers": {}}, "a precision for every linear of transformer"),
        (
            {"format": "svg-linears", "version": 1, "transformers": {"transformer": {"x": {"precision": "fp8"}}}},
            "must be of this model, got x",
        ),
        (
            {"format": "svg-linears", "version": 1, "transformers": {"transformer": {"x": {"precision": "fp2"}}}},
            "precision must be one of fp8, int8-rows, int8, native, got 'fp2'",
        ),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            svg.accelerate(pipe, DenseConfig(linears=str(path)))
    with pytest.raises(ValueError, match="max_error must be > 0 and finite"):
        adapt_linears(pipe, REQUEST, 0.0)
    with pytest.raises(ValueError, match="precision must be one of auto, fp8, int8-rows, int8, got 'x'"):
        adapt_linears(pipe, REQUEST, 0.1, precision="x")


def test_a_transformer_that_runs_in_no_step_looked_at_stays(tmp_path, capsys):
    folder, out = saver(tmp_path)("wan_2_2"), tmp_path / "linears.json"
    words = ["adapt-linears", "a ball", "--model", str(folder), *SIZE[:-1], "1", "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    assert (
        "transformer_2: 0 of 18 linears in 8 bits\n  it ran in none of the steps looked at" in capsys.readouterr().out
    )
    second = json.loads(out.read_text())["transformers"]["transformer_2"]
    assert len(second) == 18 and all(one == {"precision": "native", "error": None} for one in second.values())
    pipe = svg.accelerate(load_pipeline(folder, device="cpu"), DenseConfig(linears=str(out)))
    assert not [one for one in pipe.transformer_2.modules() if isinstance(one, QuantizedLinear)]
