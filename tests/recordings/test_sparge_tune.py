"""`svg sparge-tune`: bounds hold on what was recorded, a killed run goes on, files add up."""

import json
from pathlib import Path

import pytest
import torch

from svg.attend import attend
from svg.cli import main
from svg.config import DenseConfig, SpargeConfig
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState
from svg.generate.job import resolve
from svg.methods.dense import dense_attention, key_mask
from svg.methods.sparge.thresholds_file import read_about, read_layers
from svg.recordings.record import Recorder, _save, open_recording
from svg.recordings.sparge_fit import MIN_SPARSITY, Sampling
from svg.recordings.sparge_tune import Bounds, tune

LAYOUT = TokenLayout(4, 9, 16, 5, "last")
BOUNDS, WHOLE = Bounds(l1=0.15, l2=0.2), Sampling(blocks=99, rows=128)
CPU = torch.device("cpu")


def structured(seed, heads=2, dim=16):
    """q, k, v [B, S, H, D]: the first head looks at what is near in time, the second everywhere alike."""
    generator = torch.Generator().manual_seed(seed)
    S = LAYOUT.total_tokens
    place = torch.linspace(0, 5, S)[:, None] * torch.arange(1, dim // 2 + 1) / 3
    waves = torch.cat([place.sin(), place.cos()], 1)[:, None] * torch.tensor([2.5, 0.0])[:, None]  # [S, H, D]
    noise = 0.3 * torch.randn(3, 2, S, heads, dim, generator=generator)
    return waves + noise[0], waves + noise[1], noise[2] + waves.roll(1, -1) + 0.5


def write(path, layers=(0, 1), model="m", steps=(0, 2)):
    """A recording of a run of three steps with padded prompts."""
    state, tensors, calls = RunState(DenseConfig(), 3), {}, []
    state.observer = Recorder(state, steps, layers, None, tensors, calls)
    mask = torch.arange(LAYOUT.text_tokens) < torch.tensor([[2], [5]])
    for step in range(3):
        state.begin_forward(step, 3, "cond", LAYOUT)
        for layer in range(3):
            attend(*structured(10 * step + layer), state, layer, mask)
    _save(path, tensors, calls, {"model": model})
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sparge") / "qkv.safetensors")


def run(recordings, out, bounds=BOUNDS, sampling=WHOLE, config=None, **options):
    recordings = recordings if isinstance(recordings, list) else [recordings]
    return tune(recordings, out, config or SpargeConfig(), bounds, sampling, CPU, **options)


def test_bounds_hold_when_the_file_is_used(recording, tmp_path):
    found = run(recording, tmp_path / "t")
    assert list(found) == [("transformer", 0), ("transformer", 1)]
    densities = [fit.density for fit in found.values()]
    assert all(1 - near >= MIN_SPARSITY for near, _ in densities) and any(
        limit < 50 for limit in limits(tmp_path / "t")
    )
    config = SpargeConfig(thresholds=str(tmp_path / "t"), warmup_steps=0, warmup_layers=0)
    state, seen = RunState(config, 3), open_recording(recording)
    for call in seen.calls:
        q, k, v, mask = seen.tensors(call)
        state.begin_forward(call.step, 3, "cond", LAYOUT)
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)), state, call.layer, mask).transpose(1, 2)
        exact = dense_attention(q, k, v, key_mask(LAYOUT, mask))
        video = LAYOUT.video_slice
        difference = (out - exact)[:, :, video].abs().sum((2, 3)) / exact[:, :, video].abs().sum((2, 3))  # [B, H]
        assert (difference < BOUNDS.l1 + 1e-4).all()
        density = state.records[-1].density.mean(0)
        for head, expected in enumerate(found["transformer", call.layer].density):
            if expected == 1:
                assert density[head] == 1


def limits(path):
    return [x for one in read_layers(path).values() for x in one.pv_threshold.tolist()]


def test_a_killed_run_goes_on_where_it_was(recording, tmp_path):
    whole = run(recording, tmp_path / "whole")

    def stop(key, fit):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recording, tmp_path / "t", on_layer=stop)
    assert list(read_layers(tmp_path / "t")) == [("transformer", 0)]
    looks = []
    again = run(recording, tmp_path / "t", on_call=lambda key, done, total: looks.append((key[1], done, total)))
    assert list(again) == [("transformer", 1)] and looks == [(1, i, 4) for i in range(1, 5)]
    for key, one in read_layers(tmp_path / "t").items():
        for name, x in vars(one).items():
            assert torch.equal(x, getattr(whole[key].thresholds, name))
    assert read_about(tmp_path / "t") == read_about(tmp_path / "whole")
    assert run(recording, tmp_path / "t") == {}


def test_recordings_of_other_layers_add_to_the_file(recording, tmp_path):
    run(recording, tmp_path / "t", sampling=Sampling(blocks=2, rows=2))
    third = write(tmp_path / "third.safetensors", layers=(2,))
    assert list(run([recording, third], tmp_path / "t", sampling=Sampling(blocks=2, rows=2))) == [("transformer", 2)]
    assert [layer for _, layer in read_layers(tmp_path / "t")] == [0, 1, 2]


def test_other_settings_need_another_file_or_force(recording, tmp_path):
    few = Sampling(blocks=2, rows=2)
    run(recording, tmp_path / "t", sampling=few)
    for change in (
        {"bounds": Bounds(l1=0.05, l2=0.2)},
        {"sampling": Sampling(blocks=3, rows=2)},
        {"config": SpargeConfig(order="rowmajor")},
    ):
        settings = {"sampling": few} | change
        with pytest.raises(ValueError, match="must be .* as in .* got .*: give another --out, or --force"):
            run(recording, tmp_path / "t", **settings)
    assert len(run(recording, tmp_path / "t", sampling=few, config=SpargeConfig(order="rowmajor"), force=True)) == 2
    with pytest.raises(
        ValueError, match="recordings must be of one model, got .*qkv.safetensors of m, .*o.safetensors of other"
    ):
        run([recording, write(tmp_path / "o.safetensors", model="other")], tmp_path / "u")


def test_impossible_bounds_are_named():
    with pytest.raises(ValueError, match=r"l1 must be in \(0, 1\), got 0"):
        Bounds(l1=0)
    with pytest.raises(ValueError, match=r"l2 must be in \[l1, 1\)"):
        Bounds(l1=0.1, l2=0.05)


def test_a_flag_drops_its_rivals_of_the_preset():
    rest = {"out": Path("o"), "force": False, "device": "cpu", "dtype": None, "offload": "none", "vae_tiling": False}
    rest |= {"dense": True, "control": False, "lpips": "none", "generation": {"prompt": "-"}, "model": None}

    def config(**settings):
        return resolve(preset="tiny-wan", method="sparge", settings=settings, **rest).config

    assert config().topk == 0.5 and config(topk=0.3).topk == 0.3
    assert config(cdf=0.9).topk is None and config(cdf=0.9).cdf == 0.9
    with pytest.raises(ValueError, match="got topk and cdf"):
        config(cdf=0.9, topk=0.2)


def test_command_line(model, tmp_path, monkeypatch, capsys):
    """Record, tune, go on, and generate with the file."""
    monkeypatch.chdir(tmp_path)
    size = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2"]
    assert main(["record", "a red ball", "--model", str(model), *size, "--record-steps", "1", "--out", "qkv"]) == 0
    assert main(["sparge-tune", "qkv", "--out", "t"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "transformer 2 density 1.000, 2 of 2 heads dense" in out and "3 layers in" in out
    assert main(["sparge-tune", "qkv", "--out", "t"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    run_it = ["generate", "a red ball", "--model", str(model), *size, "--method", "sparge", "--lpips", "none"]
    assert main([*run_it, "--thresholds", "t", "--warmup-steps", "0", "--out", "run", "--no-control"]) == 0
    report = json.loads(Path("run/report.json").read_text())
    assert report["method"]["thresholds"] == "t" and report["method"]["topk"] is None
    assert "--thresholds t" in report["command"] and report["quality"]["accelerated"]["psnr"]["mean"] != 0
    capsys.readouterr()
    assert main([*run_it, "--thresholds", "none", "--warmup-steps", "0", "--out", "run2"]) == 2
    assert "thresholds must be a file, got none" in capsys.readouterr().err
    assert main(["sparge-tune", "qkv", "--out", "t", "--l1", "0.5"]) == 2
    assert "l2 must be in [l1, 1)" in capsys.readouterr().err
