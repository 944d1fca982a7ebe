"""The command in a report, run again, is the same job."""

import shlex

import pytest

from svg.cli import cli
from svg.generate.command_line import command_line

PRESETS = [
    ["--frames", "9", "--steps", "4", "--seed", "7"],
    ["--method", "svg1", "--density", "0.4", "--warmup-steps", "0", "--no-control", "--lpips", "none"],
    ["--preset", "wan2.1-t2v-480p", "--budget", "0.3", "--vae-tiling", "--offload", "model", "--dtype", "bf16"],
    ["--method", "dense", "--dense-backend", "math", "--negative-prompt=-blur; rm 'x' $HOME"],
    ["--no-dense", "--device", "cpu", "--method", "svg2", "--num-q-clusters", "5", "--flow-shift", "3"],
    [
        "--fast",
        "--lora",
        "a.safetensors=0.5",
        "--lora",
        "owner/name",
        "--compile",
        "--cache",
        "first-block=0.1",
        "--yes",
    ],
    ["--preset", "wan2.1-t2v-720p", "--revision", "main", "--variant", "bf16"],
]


class Caught(Exception):
    """Raised in place of running a job, which is its only argument."""


@pytest.fixture
def job_of(monkeypatch):
    """The job that `svg generate` would run for these arguments."""

    def catch(job):
        raise Caught(job)

    monkeypatch.setattr("svg.generate.preflight.preflight", catch)

    def parse(arguments):
        with pytest.raises(Caught) as caught:
            cli.main(["generate", *arguments], standalone_mode=False)
        return caught.value.args[0]

    return parse


@pytest.mark.parametrize("arguments", PRESETS)
@pytest.mark.parametrize("prompt", ["a red ball", "--out x; \"quoted\" 'twice' `id`\nnew line"])
def test_round_trip(job_of, arguments, prompt):
    job = job_of([*arguments, "--", prompt])
    words = shlex.split(command_line(job))
    assert words[:2] == ["svg", "generate"]
    assert job_of(words[2:]) == job
