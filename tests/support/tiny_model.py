"""A fixture: the directory of a tiny random Wan pipeline, saved once a session."""

import importlib.util
from pathlib import Path

import pytest
import torch


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
