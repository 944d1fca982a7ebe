"""A tiny random model to tune, and what to ask for."""

import importlib.util
from pathlib import Path

import pytest
import torch

SIZE = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "3", "--lpips", "none", "--device", "cpu"]
SETTINGS = [
    "--set",
    "num_q_clusters=3",
    "--set",
    "num_k_clusters=6",
    "--set",
    "min_k_ratio=0",
    "--set",
    "first_iterations=3",
]
PROMPTS = ["--prompt", "a red ball moves right", "--held-out", "a blue box moves up"]


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


@pytest.fixture(scope="session")
def unprompted(model):
    """Model and size as arguments of `svg tune`."""
    return ["--model", str(model), *SIZE]


@pytest.fixture(scope="session")
def arguments(model):
    """Arguments of `svg tune` for the tiny model; a target and --out are still to be given."""
    return [
        "--model",
        str(model),
        *SIZE,
        *SETTINGS,
        *PROMPTS,
        "--rounds",
        "3",
        "--probe",
        "heads",
        "--tune-steps",
        "1,2",
    ]
