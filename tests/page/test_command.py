"""The command in a report, run again, is the same job."""

import shlex

import pytest

from svg.cli import cli
from svg.command import command_line
from svg.job import resolve

PRESETS = [
    ["--frames", "9", "--steps", "4", "--seed", "7"],
    ["--method", "svg1", "--density", "0.4", "--warmup-steps", "0", "--no-control", "--lpips", "none"],
    ["--preset", "wan2.1-t2v-480p", "--budget", "0.3", "--vae-tiling", "--offload", "model", "--dtype", "bf16"],
    ["--method", "dense", "--dense-backend", "math", "--negative-prompt=-blur; rm 'x' $HOME"],
    ["--no-dense", "--device", "cpu", "--num-q-clusters", "5", "--flow-shift", "3"],
]


@pytest.fixture
def job_of(monkeypatch):
    """Parse a command line as `svg generate` does, without running it."""
    caught = []

    def catch(*, no_dense, no_control, prompt, **options):
        names = ("density", "top_p", "budget", "num_q_clusters", "num_k_clusters")
        names += ("warmup_steps", "warmup_layers", "dense_backend")
        settings = {name: options.pop(name) for name in names}
        names = ("height", "width", "frames", "steps", "guidance", "true_cfg", "flow_shift", "seed")
        names += ("negative_prompt", "image", "fps")
        generation = {"prompt": prompt, **{name: options.pop(name) for name in names}}
        caught.append(
            resolve(settings=settings, generation=generation, dense=not no_dense, control=not no_control, **options)
        )

    monkeypatch.setattr(cli.commands["generate"], "callback", catch)

    def parse(arguments):
        cli.main(["generate", *arguments], standalone_mode=False)
        return caught[-1]

    return parse


@pytest.mark.parametrize("arguments", PRESETS)
@pytest.mark.parametrize("prompt", ["a red ball", "--out x; \"quoted\" 'twice' `id`\nnew line"])
def test_round_trip(job_of, arguments, prompt):
    job = job_of([*arguments, "--", prompt])
    words = shlex.split(command_line(job))
    assert words[:2] == ["svg", "generate"]
    assert job_of(words[2:]) == job
