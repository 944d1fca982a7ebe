"""`svg generate` on the bundled tiny-wan with a LoRA, compiled blocks and caches, as somebody types it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from svg.cli import main
from svg.eval.video import read_video
from svg.pipelines import load_pipeline

pytestmark = pytest.mark.slow
SMALL = ("--height", "32", "--width", "48", "--frames", "9", "--steps", "4", "--no-control", "--lpips", "none")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of tiny-wan's attention, large enough to change a video."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe = load_pipeline(device="cpu")
    settings = LoraConfig(r=2, lora_alpha=32, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(settings)
    folder = tmp_path_factory.mktemp("lora")
    type(pipe).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """Run it, and give the report and the frames of each video."""
    monkeypatch.chdir(tmp_path)

    def run(out, *arguments):
        assert main(["generate", "a red ball", *SMALL, "--out", out, *map(str, arguments)]) == 0
        report = json.loads(Path(out, "report.json").read_text())
        return report, {name: read_video(f"{out}/{name}.mp4")[0].astype(int) for name in report["runs"]}

    return run


def far(a, b):
    return np.abs(a - b).mean()


def calls(report, run="accelerated"):
    return report["runs"][run]["transformers"]["transformer"]["calls"]


def test_lora_with_its_scale(generate, lora):
    _, plain = generate("plain")
    report, styled = generate("styled", "--lora", lora)
    assert all(far(plain[name], styled[name]) > 1 for name in ("dense", "accelerated"))  # both runs have it
    file = next(Path(lora).glob("*.safetensors"))
    _, off = generate("off", "--fast", "--lora", f"{file}=0")
    assert far(plain["accelerated"], off["accelerated"]) == 0
    assert report["loras"] == [{"source": str(lora), "scale": 1.0}] and "--lora" in report["command"]
    assert calls(report)["sparse"] > 0


def test_compiled_blocks(generate):
    """With a method whose choice does not hang on the last bit, as that of 36 tokens by clusters does."""
    svg1 = ("--fast", "--method", "svg1", "--density", "0.6")
    _, plain = generate("plain", *svg1)
    report, compiled = generate("compiled", *svg1, "--compile")
    assert report["model"]["compiled"] and "--compile" in report["command"] and calls(report)["sparse"] > 0
    assert far(plain["accelerated"], compiled["accelerated"]) < 1


@pytest.mark.parametrize("cache", ["first-block=0.5", "taylorseer=3", "seacache=10"])
def test_a_cache_is_of_the_accelerated_run_alone(generate, cache):
    report, _ = generate("cached", "--steps", "8", "--cache", cache)
    assert calls(report)["total"] < calls(report, "dense")["total"] == 8 * 2 * 7  # steps, branches, layers
    assert calls(report)["sparse"] > 0
    assert report["cache"] == cache and f"--cache {cache}" in report["command"]
