"""`svg generate` in an empty folder, on tiny random pipelines."""

import pytest
from tiny_pipelines import saver

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


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Name of a tiny random pipeline -> its folder."""
    return saver(tmp_path_factory.mktemp("models"))


@pytest.fixture
def generate(models, tmp_path, monkeypatch):
    """Run `svg generate` with these arguments, and give its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, prompt=("a red ball",), model="wan"):
        return main(["generate", *prompt, "--model", str(models(model)), *SIZE, *map(str, arguments)])

    return run
