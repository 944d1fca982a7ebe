"""A precision for every layer, measured on a recording; and the papers' accuracy on what tiny-wan's attention sees."""

import json

import pytest
import torch

from svg.attend import attend
from svg.cli import main
from svg.config import Sage2Config
from svg.engine.state import RunState
from svg.kernels import fp4_attention, quantised_attention
from svg.pipelines import GenerationRequest, load_pipeline
from svg.recordings.layer_precisions import adapt, choose
from svg.recordings.record import open_recording, record
from svg.recordings.sweep import dense_rows

REQUEST = GenerationRequest(prompt="a red ball", height=32, width=48, num_frames=9, steps=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recording(model, tmp_path_factory):
    """All layers of one step, both branches."""
    path = tmp_path_factory.mktemp("recorded") / "qkv.safetensors"
    record(load_pipeline(model, device="cpu"), REQUEST, path, steps=[1])
    return path


def test_command_and_use(recording, tmp_path, capsys):
    out = tmp_path / "layers.json"
    assert main(["adapt", str(recording), "--method", "sage3", "--min-cosine", "0.99995", "--out", str(out)]) == 0
    assert "transformer 2" in capsys.readouterr().out
    content = json.loads(out.read_text())
    layers = content["transformers"]["transformer"]
    assert list(layers) == ["0", "1", "2"] and content["about"]["min_cosine"] == 0.99995
    for choice in layers.values():
        assert list(choice["cosine"]) == ["nvfp4", "int8-fp16"]
        assert choice["cosine"]["nvfp4"] < 0.99995 and choice["precision"] in ("int8-fp16", "native")
    state = RunState(Sage2Config(layers=str(out)), 3)
    call = open_recording(recording).calls[0]
    state.begin_forward(0, 2, "cond", call.layout)
    attend(*(x.transpose(1, 2) for x in open_recording(recording).tensors(call)[:3]), state, 0)
    assert state.records[0].precision == layers["0"]["precision"]


def test_the_fastest_that_is_close_enough_in_every_call():
    calls = [{"nvfp4": 0.999, "int8-fp16": 0.9999}, {"nvfp4": 0.99, "int8-fp16": 0.9998}]
    for least, chosen in ((0.98, "nvfp4"), (0.995, "int8-fp16"), (0.99985, "native")):
        assert choose(calls, least) == {"precision": chosen, "cosine": {"nvfp4": 0.99, "int8-fp16": 0.9998}}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "svg2"}, "method must be one of sage2, sage2\\+\\+, sage3, got 'svg2'"),
        ({"min_cosine": 0}, r"min_cosine must be in \(0, 1\], got 0"),
        ({"settings": {"precision": "int2"}}, "precision must be one of auto"),
    ],
)
def test_wrong_arguments_are_named(recording, tmp_path, change, match):
    arguments = {"method": "sage2", "settings": {}, "min_cosine": 0.99, "device": CPU, "out": tmp_path / "x"}
    with pytest.raises(ValueError, match=match):
        adapt(recording, **arguments | change)
    assert not (tmp_path / "x").exists()


def test_every_layer_must_be_recorded(model, tmp_path):
    record(load_pipeline(model, device="cpu"), REQUEST, tmp_path / "some", steps=[1], layers=[0, 2])
    with pytest.raises(ValueError, match=r"must hold every layer, transformer lacks \[1\]"):
        adapt(tmp_path / "some", "sage2", {}, 0.99, CPU, tmp_path / "x")


def test_accuracy_on_what_tiny_wan_sees(tmp_path):
    """The papers' bars on the bundled model's tensors; smoothing Q matters there, K has no outliers to smooth."""
    request = GenerationRequest(
        prompt="a large red circle moving right over a gray and navy checkered background, the camera is still",
        height=64, width=96, num_frames=17, steps=4,
    )  # fmt: skip
    record(load_pipeline("tiny-wan", device="cpu"), request, tmp_path / "qkv", steps=[2], branches=["cond"])
    opened = open_recording(tmp_path / "qkv")
    found = {name: [] for name in ("int8-fp8", "int8-fp8-acc16", "int8-fp16", "int4-fp16", "rough int4", "nvfp4")}
    for call in opened.calls:
        q, k, v, _ = opened.tensors(call)
        exact = dense_rows(q, k, v, None)[0].flatten()
        for name, cosines in found.items():
            if name == "nvfp4":
                out = fp4_attention(q, k, v)
            elif name == "rough int4":
                out = quantised_attention(q, k, v, precision="int4-fp16", smooth_q=False, smooth_k=False)
            else:
                out = quantised_attention(q, k, v, precision=name)
            cosines.append(torch.nn.functional.cosine_similarity(out.float().flatten(), exact, dim=0).item())
    mean = {name: sum(cosines) / len(cosines) for name, cosines in found.items()}
    assert min(mean[name] for name in ("int8-fp8", "int8-fp8-acc16", "int8-fp16")) >= 0.9999
    assert min(found["int4-fp16"]) >= 0.994 and min(found["nvfp4"]) >= 0.995
    assert 1 - mean["int4-fp16"] < 0.8 * (1 - mean["rough int4"])
