"""One generation: checks first, raw frames, times that add up."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import svg
from svg.config import DenseConfig, SVG2Config
from svg.pipelines import GenerationRequest, generate, report, reset, validate_request
from svg.pipelines.loading import place

SPARSE = SVG2Config(
    top_p=0.5, num_q_clusters=4, num_k_clusters=6, first_iterations=5, warmup_steps=0.3, warmup_layers=0.0
)
REQUEST = GenerationRequest(
    prompt="a red ball moves right", height=32, width=48, num_frames=9, steps=3, guidance=4.0, seed=7
)


def request_for(pipe, image, **changes):
    if "ImageToVideo" in type(pipe).__name__:
        changes = {"image": image, **changes}
    return dataclasses.replace(REQUEST, **changes)


@pytest.mark.parametrize(
    "name", ["wan", "wan_2_2", "wan_i2v", "wan_5b_i2v", "hunyuan", "cogvideox_2b", "cogvideox_1_5", "cogvideox_i2v"]
)
def test_accelerated_generation(load, image, name):
    pipe = load(name)
    if name == "hunyuan":
        pipe.vae.enable_tiling()
    request = request_for(pipe, image)
    plain = generate(pipe, request)
    assert plain.attention_seconds is None and plain.report is None
    assert plain.frames.shape == (9, 32, 48, 3) and plain.frames.dtype == np.float32
    assert plain.frames.min() >= 0 and plain.frames.max() <= 1 and plain.frames.std() > 1e-4

    svg.accelerate(pipe, SPARSE)
    progress = []
    result = generate(pipe, request, lambda p: progress.append((p.step, p.steps, p.seconds, p.density())))
    assert [entry[:2] for entry in progress] == [(1, 3), (2, 3), (3, 3)]
    assert progress[0][3] == 1.0 and 0 < progress[2][3] < 1
    assert progress[0][2] < progress[1][2] < progress[2][2] < result.seconds
    assert 0 < result.attention_seconds < result.transformer_seconds < result.seconds
    assert 0 < result.vae_seconds < result.seconds
    assert result.transformer_seconds + result.vae_seconds < result.seconds
    parts = result.report["transformers"].values()
    assert sum(part["transformer_seconds"] for part in parts) == pytest.approx(result.transformer_seconds, rel=0.5)
    attention = sum(part["attention_seconds"]["total"] for part in parts if part["attention_seconds"])
    assert attention == pytest.approx(result.attention_seconds)
    assert np.array_equal(generate(pipe, request).frames, result.frames)
    assert np.array_equal(generate(svg.restore(pipe), request).frames, plain.frames)


@pytest.mark.parametrize("offload", ["model", "group"])
@pytest.mark.parametrize("name", ["wan", "wan_i2v", "hunyuan", "cogvideox_1_5"])
def test_offloaded_generation(load, image, name, offload):
    """Whole pipelines, VAE included; sequential offloading needs a GPU (Accelerate fails on a CPU)."""
    request = request_for(load(name), image)
    resident = generate(svg.accelerate(load(name), DenseConfig()), request)
    pipe = svg.accelerate(place(load(name), torch.device("cpu"), offload), DenseConfig())
    for _ in range(2):
        result = generate(pipe, request)
        assert np.abs(result.frames - resident.frames).max() < 1e-5
        assert (
            result.report["transformers"]["transformer"]["calls"]
            == resident.report["transformers"]["transformer"]["calls"]
        )


def test_frames_are_those_of_the_pipeline(load):
    pipe = load("wan")
    direct = pipe(
        prompt=REQUEST.prompt, height=32, width=48, num_frames=9, num_inference_steps=3, guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(7), output_type="np",
    ).frames[0]  # fmt: skip
    assert np.array_equal(generate(pipe, REQUEST).frames, direct)


def test_nothing_is_left_on_the_pipeline(load):
    pipe = load("wan")
    generate(pipe, REQUEST)
    attributes = set(vars(pipe)), set(vars(pipe.transformer)), dict(pipe._progress_bar_config)
    generate(pipe, REQUEST, lambda progress: None)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, REQUEST, lambda progress: 1 / 0)
    assert (set(vars(pipe)), set(vars(pipe.transformer)), dict(pipe._progress_bar_config)) == attributes
    assert not pipe.transformer._forward_pre_hooks and not pipe.vae.decoder._forward_hooks


def test_an_earlier_runs_transformer_does_not_count(load):
    pipe = svg.accelerate(load("wan_2_2"), SPARSE)
    generate(pipe, dataclasses.replace(REQUEST, steps=6))
    pipe.register_to_config(boundary_ratio=0.0)
    result = generate(pipe, REQUEST)
    assert result.report["transformers"]["transformer_2"]["calls"]["total"] == 0


def test_report_and_reset_need_an_accelerated_pipe(load):
    pipe = load("wan")
    for function in (report, reset):
        with pytest.raises(ValueError, match="pipe must be accelerated.* call svg.accelerate"):
            function(pipe)
    generate(svg.accelerate(pipe, SPARSE), REQUEST)
    assert report(reset(pipe))["transformers"]["transformer"]["calls"]["total"] == 0


BAD = [
    ("wan", dict(prompt=" "), ValueError, "prompt must not be empty"),
    ("wan", dict(prompt=7), TypeError, "prompt must be text, got 7"),
    ("wan", dict(negative_prompt=7), TypeError, "negative_prompt must be text"),
    ("wan", dict(height=40), ValueError, "height must be a multiple of 16 for this model, got 40; try 32 or 48"),
    ("wan", dict(width=8), ValueError, "width must be a multiple of 16 for this model, got 8; try 16 or"),
    ("wan", dict(height=0), ValueError, "height must be in .1, 16384., got 0"),
    ("wan", dict(width=48.0), TypeError, "width must be an integer, got 48.0"),
    ("wan", dict(num_frames=16), ValueError, "num_frames must be 4k \\+ 1 for this model, got 16; try 13 or 17"),
    ("wan", dict(num_frames=15), ValueError, "num_frames must be 4k \\+ 1 for this model, got 15; try 13 or 17"),
    ("wan", dict(steps=0), ValueError, "steps must be in .1, 10000., got 0"),
    ("wan", dict(steps=True), TypeError, "steps must be an integer, got True"),
    ("wan", dict(seed=-1), ValueError, "seed must be in"),
    ("wan", dict(guidance=float("nan")), ValueError, "guidance must be in .0, 1000., got nan"),
    ("wan", dict(guidance="high"), TypeError, "guidance must be a number"),
    ("wan", dict(fps=0), ValueError, "fps must be in .1, 1000., got 0"),
    ("wan", dict(image=Image.new("RGB", (8, 8))), ValueError, "image must be left out for WanPipeline"),
    ("wan", dict(image="dog.png"), TypeError, "image must be a PIL image, got str"),
    ("wan", dict(max_sequence_length=0), ValueError, "max_sequence_length must be in .1, 65536., got 0"),
    ("wan", dict(true_cfg=2.0), ValueError, "true_cfg must be left out on WanPipeline, got 2.0"),
    ("wan_i2v", dict(), ValueError, "image must be given for WanImageToVideoPipeline, got none"),
    ("wan_i2v", dict(image=True, max_sequence_length=64), ValueError, "max_sequence_length must be 512 for this model"),
    ("hunyuan", dict(negative_prompt="a dog"), ValueError, "negative_prompt must be left out without true_cfg"),
    (
        "hunyuan",
        dict(true_cfg=2.0),
        ValueError,
        "true_cfg must be in .1, 1000. and come with a negative_prompt, got 2.0",
    ),
    ("hunyuan", dict(num_frames=8), ValueError, "num_frames must be 4k"),
    ("cogvideox_2b", dict(max_sequence_length=226), ValueError, "max_sequence_length must be 16 for this model"),
    ("cogvideox_i2v", dict(), ValueError, "image must be given for CogVideoXImageToVideoPipeline"),
    ("cogvideox_2b", dict(width=40), ValueError, "width must be a multiple of 16"),
]


@pytest.mark.parametrize("name, changes, error, message", BAD)
def test_bad_requests(load, image, name, changes, error, message, monkeypatch):
    pipe = load(name)
    if changes.get("image") is True:
        changes = {**changes, "image": image}
    request = dataclasses.replace(REQUEST, **changes)
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("something heavy ran"))
    with pytest.raises(error, match=message) as caught:
        generate(pipe, request)
    assert "\n" not in str(caught.value)


def test_learned_positions_fix_the_size(load, image):
    pipe = load("cogvideox_i2v")
    pipe.transformer.register_to_config(use_learned_positional_embeddings=True, sample_height=8, sample_width=12)
    with pytest.raises(ValueError, match="height must be 64 for this model, got 32"):
        validate_request(pipe, dataclasses.replace(REQUEST, image=image))


def test_an_unknown_pipeline_class(load):
    class Other:
        transformer = load("wan").transformer

    with pytest.raises(ValueError, match="pipe must be one of WanPipeline, .*, got Other"):
        validate_request(Other(), REQUEST)
