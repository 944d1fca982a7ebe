"""Every example runs, on tiny random pipelines, and stays short enough to be read."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipelines import saver

from svg.eval.video import read_video

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZE = ["--size", "9", "32", "48", "--steps", "3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name of a tiny random pipeline -> its folder."""
    save = saver(tmp_path_factory.mktemp("models"))
    return lambda name: str(save(name))


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder and give what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def lora(folder, model):
    """Save a LoRA of a tiny Wan as a folder."""
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = diffusers.WanPipeline.from_pretrained(model)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    diffusers.WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return str(folder)


def test_all_are_short_and_tested():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    listed = (EXAMPLES / "README.md").read_text()
    tests = Path(__file__).read_text()
    for name in names:
        assert len((EXAMPLES / name).read_text().splitlines()) < 60
        assert f"({name})" in listed and f'"{name}"' in tests
    assert len(names) == 8


def test_wan(example, models):
    out = example("wan.py", "--model", models("wan"), *SIZE)
    assert "computed, all calls" in out and len(read_video("wan.mp4")[0]) == 9


def test_image_to_video(example, models):
    Image.new("RGB", (60, 40), "red").save("first.png")
    assert "near" in example("image_to_video.py", "--model", models("wan_i2v"), "--image", "first.png", *SIZE)
    assert len(read_video("image_to_video.mp4")[0]) == 9


def test_offload_lora(example, models, tmp_path):
    arguments = ["--model", models("wan"), "--lora", lora(tmp_path / "lora", models("wan")), "--offload", "none"]
    assert "near" in example("offload_lora.py", *arguments, "--prompt", "a red ball", *SIZE)
    assert len(read_video("offload_lora.mp4")[0]) == 9


def test_cache_too(example, models):
    out = example("cache_too.py", "--model", models("wan"), *SIZE)
    assert "calls of attention ran" in out and len(read_video("cache_too.mp4")[0]) == 9


def test_own_dit(example):
    assert "near" in example("own_dit.py")


def test_drop_in(example):
    out = example("drop_in.py")
    assert 0 < float(out.split("relative error ")[1]) < 0.05


def test_sweep(example, models):
    out = example("sweep.py", "--model", models("wan"), *SIZE, "--budgets", "0.5", "1.0")
    rows = [line for line in out.splitlines() if line.startswith("near")]
    assert len(rows) == 2 and all("dB" in row for row in rows)


def test_hunyuan(example, models, monkeypatch):
    from diffusers import HunyuanVideoPipeline

    original = HunyuanVideoPipeline.__call__

    def small_text(self, *args, **kwargs):  # the tiny text encoder knows no chat template of hundreds of words
        short = {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 16}
        return original(self, *args, **{**kwargs, **short})

    small_text.__signature__ = __import__("inspect").signature(original)
    monkeypatch.setattr(HunyuanVideoPipeline, "__call__", small_text)
    out = example("hunyuan.py", "--model", models("hunyuan"), "--prompt", "a cat", *SIZE)
    assert "in attention" in out and len(read_video("hunyuan.mp4")[0]) == 9


def test_notebook(models, tmp_path):
    """Every cell of the notebook runs, as somebody runs it who has a small model of his own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (path,) = EXAMPLES.glob("*.ipynb")
    assert f"({path.name})" in (EXAMPLES / "README.md").read_text()
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert all(not cell.get("outputs") for cell in book.cells), "outputs are not committed"
    settings = 'MODEL, SIZE, STEPS = "tiny-wan", (17, 128, 160), 20'
    (cell,) = (cell for cell in book.cells if settings in cell.source)
    cell.source = cell.source.replace(settings, f"MODEL, SIZE, STEPS = {models('wan')!r}, (9, 96, 96), 3")
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    texts = "".join(output.get("text", "") for output in outputs)
    assert " dB, SSIM 0." in texts or " dB, SSIM 1.0" in texts
    assert re.search(r"layer \d: 0\.\d{3}", texts), texts
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("near" in output.get("data", {}).get("text/html", "") for output in outputs)
