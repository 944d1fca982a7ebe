"""A tiny random model and a grid of ten cells on it."""

from pathlib import Path

import pytest
import yaml
from tiny_model import model  # noqa: F401

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


@pytest.fixture
def write_grid(model, tmp_path, monkeypatch):  # noqa: F811
    """Write a YAML file of the grid with changes, in an empty working folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(name="grid.yaml", **changes):
        content = {"models": [str(model)], **GRID, **changes}
        Path(name).write_text(yaml.safe_dump(content, sort_keys=False))
        return name

    return write


@pytest.fixture(scope="session")
def undisturbed(model, tmp_path_factory):  # noqa: F811
    """Folder of the grid's sweep that nothing disturbed."""
    from svg.cli import main

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "grid.yaml").write_text(yaml.safe_dump({"models": [str(model)], **GRID}))
    assert main(["sweep", str(folder / "grid.yaml"), "--out", str(folder / "out")]) == 0
    return folder / "out"
