"""Loading: what is accepted, what is refused with one line, where parts end up."""

import json
import shutil

import diffusers
import pytest
import torch

from svg.pipelines import load_pipeline
from svg.pipelines.loading import resolve_device


@pytest.fixture
def copy(directory, tmp_path):
    """A copy of a tiny pipeline's directory that a test may spoil."""

    def make(name="wan"):
        return shutil.copytree(directory(name), tmp_path / name)

    return make


def edit_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "name, kind",
    [
        ("wan", diffusers.WanPipeline),
        ("wan_2_2", diffusers.WanPipeline),
        ("wan_i2v", diffusers.WanImageToVideoPipeline),
        ("hunyuan", diffusers.HunyuanVideoPipeline),
        ("cogvideox_1_5", diffusers.CogVideoXPipeline),
        ("cogvideox_i2v", diffusers.CogVideoXImageToVideoPipeline),
    ],
)
def test_directory(directory, name, kind):
    pipe = load_pipeline(directory(name), device="cpu")
    assert type(pipe) is kind
    assert {pipe.transformer.dtype, pipe.vae.dtype} == {torch.float32}


def test_wan_keeps_its_vae_in_fp32(directory):
    pipe = load_pipeline(str(directory("wan_i2v")), device="cpu", dtype="bf16")
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == pipe.image_encoder.dtype == torch.float32
    hunyuan = load_pipeline(directory("hunyuan"), device="cpu", dtype=torch.float16)
    assert hunyuan.vae.dtype == torch.float16


PLAIN = {"flow_shift": dict(prediction_type="flow_prediction", use_flow_sigmas=True), "shift": {}}


@pytest.mark.parametrize("name, key", [("wan", "flow_shift"), ("wan_euler", "shift")])
def test_flow_shift(directory, name, key):
    assert load_pipeline(directory(name), device="cpu").scheduler.config[key] == 3.0
    pipe = load_pipeline(directory(name), device="cpu", flow_shift=5.0)
    assert pipe.scheduler.config[key] == 5.0
    expected = type(pipe.scheduler)(**{**PLAIN[key], key: 5.0})
    for scheduler in (pipe.scheduler, expected):
        scheduler.set_timesteps(4)
    assert torch.equal(pipe.scheduler.timesteps, expected.timesteps)


def test_flow_shift_of_another_scheduler(directory):
    with pytest.raises(ValueError, match="flow_shift must be left out for CogVideoXDDIMScheduler.* got 5.0"):
        load_pipeline(directory("cogvideox_2b"), device="cpu", flow_shift=5.0)


def test_vae_tiling(directory):
    assert not load_pipeline(directory("wan"), device="cpu").vae.use_tiling
    assert load_pipeline(directory("wan"), device="cpu", vae_tiling=True).vae.use_tiling


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(device="cuda:99"), "device must be present, got cuda:99 with .* GPUs visible"),
        (dict(device="tpu"), "device must be auto, cpu, cuda or cuda:<index>, got 'tpu'"),
        (dict(device="cpu", dtype="int4"), "dtype must be one of bf16, fp16, fp32, got .int4"),
        (dict(device="cpu", dtype=torch.float64), "dtype must be one of bf16, fp16, fp32, got torch.float64"),
        (dict(device="cpu", offload="disk"), "offload must be one of none, model, group, sequential, got 'disk'"),
        (dict(device="cpu", offload="model"), "offload must be none on device cpu, got 'model'"),
        (dict(device="cpu", flow_shift=0.0), "flow_shift must be in .0, 1000., got 0.0"),
    ],
)
def test_bad_settings(directory, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_pipeline(directory("wan"), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, message",
    [
        ("./nowhere", "model must be an existing directory, got the path './nowhere', which does not exist"),
        ("nowhere", "model must be a pipeline's directory, a hub id .* got 'nowhere'"),
        ("owner/name/more", "model must be an existing directory, got the path"),
        ("svg-video-tests/not-there", "reachable hub id with a model_index.json, got 'svg-video-tests/not-there'"),
    ],
)
def test_not_a_model(model, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as caught:
        load_pipeline(model, device="cpu")
    assert "\n" not in str(caught.value)


def spoil_index(folder):
    (folder / "model_index.json").unlink()


def spoil_json(folder):
    (folder / "model_index.json").write_text("{")


def spoil_list(folder):
    (folder / "model_index.json").write_text("[1, 2]")


def spoil_weights(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def pickled_weights(folder):
    transformer = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    spoil_weights(folder)
    transformer.save_pretrained(folder / "transformer", safe_serialization=False)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_index, "without model_index.json"),
        (spoil_json, "model_index.json with one JSON object"),
        (spoil_list, "model_index.json with one JSON object"),
        (spoil_weights, "model must be complete and in safetensors"),
        (pickled_weights, "model must be complete and in safetensors"),
        (lambda f: edit_index(f, _class_name="FluxPipeline"), "model must be one of WanPipeline, .*, got FluxPipeline"),
        (lambda f: edit_index(f, _class_name="HunyuanVideo15Pipeline"), "got HunyuanVideo15Pipeline"),
        (lambda f: edit_index(f, _class_name=["pipeline", "Mine"]), "model must be one of WanPipeline"),
        (
            lambda f: edit_index(f, transformer=["diffusers", "WanVACETransformer3DModel"]),
            "transformer must be one of .*, got WanVACETransformer3DModel",
        ),
    ],
)
def test_spoiled_directory(copy, spoil, message):
    folder = copy()
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_pipeline(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_models_own_code_is_never_run(copy, tmp_path):
    folder = edit_index(copy(), text_encoder=["evil", "Evil"])
    for place in (folder / "text_encoder" / "evil.py", folder / "pipeline.py", folder / "evil.py"):
        place.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError):
        load_pipeline(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_auto_device():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
