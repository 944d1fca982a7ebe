"""A tiny random model and a grid of ten cells on it."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

GRID = {
    "prompts": ["a red ball moves right"],
    "seeds": [0, 1],
    "methods": [
        {"method": "svg1", "density": [0.5], "block_size": 4},
        {"method": "svg2", "top_p": [0.4, 0.7], "num_q_clusters": 3, "num_k_clusters": 5},
    ],
    "height": 32,
    "width": 48,
    "frames": 9,
    "steps": 3,
    "lpips": "none",
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Directory of a tiny Wan pipeline."""
    path = Path(__file__).parents[1] / "pipelines" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "wan"
    tiny.BUILDERS["wan"]().save_pretrained(folder)
    return folder


@pytest.fixture
def write_grid(model, tmp_path, monkeypatch):
    """Write a YAML file of the grid with changes, in an empty working folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(name="grid.yaml", **changes):
        content = {"models": [str(model)], **GRID, **changes}
        Path(name).write_text(yaml.safe_dump(content, sort_keys=False))
        return name

    return write


@pytest.fixture(scope="session")
def undisturbed(model, tmp_path_factory):
    """Folder of the grid's sweep that nothing disturbed."""
    from svg.cli import main

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "grid.yaml").write_text(yaml.safe_dump({"models": [str(model)], **GRID}))
    assert main(["sweep", str(folder / "grid.yaml"), "--out", str(folder / "out")]) == 0
    return folder / "out"
