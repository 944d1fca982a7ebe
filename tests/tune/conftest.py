"""A tiny random model to tune, and what to ask for."""

import pytest
from tiny_model import model  # noqa: F401

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
def unprompted(model):  # noqa: F811
    """Model and size as arguments of `svg tune`."""
    return ["--model", str(model), *SIZE]


@pytest.fixture(scope="session")
def arguments(model):  # noqa: F811
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
