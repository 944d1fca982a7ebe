"""Tiny pipelines, saved once a session and loaded like any model's directory, and one way to run them."""

import diffusers
import pytest
import torch
from PIL import Image
from tiny_pipelines import PROMPT, saver

# 5 x 2 x 3 = 30 video tokens; CogVideoX 1.5 pads to 6 latent frames: 3 x 2 x 3 = 18.
SIZE = dict(height=32, width=48, num_frames=17)


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """Name of a tiny pipeline -> its directory."""
    return saver(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def load(directory):
    """Name of a tiny pipeline -> a fresh copy of it."""

    def fresh(name):
        pipe = diffusers.DiffusionPipeline.from_pretrained(directory(name), use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return fresh


@pytest.fixture(scope="session")
def image():
    return Image.linear_gradient("L").convert("RGB").resize((48, 32))


@pytest.fixture
def run(image):
    """Run a tiny pipeline to its latents, the same way for every family."""

    def call(pipe, prompt=PROMPT, seed=0, steps=5, **changes):
        arguments = dict(
            prompt=prompt,
            num_inference_steps=steps,
            output_type="latent",
            **SIZE,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        name = type(pipe).__name__
        if "ImageToVideo" in name:
            arguments["image"] = image
        if name.startswith("HunyuanVideo"):
            arguments.update(prompt_template={"template": "{}", "crop_start": 0}, max_sequence_length=16)
        else:
            arguments.update(guidance_scale=4.0)
        if name.startswith("CogVideoX"):
            arguments.update(max_sequence_length=16)
        elif name == "WanPipeline":
            arguments.update(max_sequence_length=32)
        return pipe(**{**arguments, **changes}).frames

    return call
