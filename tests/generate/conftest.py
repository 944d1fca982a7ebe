"""`svg generate` in an empty folder, on tiny random pipelines."""

import importlib.util
from pathlib import Path

import pytest
import torch

from svg.cli import main

SIZE = [
    "--height",
    "32",
    "--width",
    "48",
    "--frames",
    "9",
    "--steps",
    "3",
    "--fps",
    "8",
    "--method",
    "svg2",
    "--num-q-clusters",
    "3",
    "--num-k-clusters",
    "5",
]


def builders():
    path = Path(__file__).parents[1] / "pipelines" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BUILDERS


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Name of a tiny random pipeline -> its folder."""
    root = tmp_path_factory.mktemp("models")

    def build(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            builders()[name]().save_pretrained(root / name)
        return root / name

    return build


@pytest.fixture
def generate(models, tmp_path, monkeypatch):
    """Run `svg generate` with these arguments, and give its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, prompt=("a red ball",), model="wan"):
        return main(["generate", *prompt, "--model", str(models(model)), *SIZE, *map(str, arguments)])

    return run
