"""`svg sweep` and `svg tune` in child processes that are killed or kept from writing, and what its results must be."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

PRELOAD = [
    "svg.cli",
    "svg.sweep.run",
    "svg.sweep.grid",
    "svg.cli.sweep_display",
    "svg.tune.run",
    "svg.cli.tune_display",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.schedulers.scheduling_unipc_multistep",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.auto.modeling_auto",
    "sweep_support",
]


def start(arguments, *, command="sweep", die_at_replace=None, after=False, file_limit=None):
    """Start `svg sweep` in a child, forked from a server that has imported all of it.

    Args:
        arguments: command-line arguments after the command.
        command: which one, "sweep" or "tune".
        die_at_replace: SIGKILL itself at this many renames (every file appears by one), or None.
        after: die after that rename, not before it.
        file_limit: largest file in bytes it may write, or None.

    Returns:
        multiprocessing.Process; its exit code is svg's, what it prints is added to child.log.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run, args=([command, *map(str, arguments)], die_at_replace, after, file_limit))
    process.start()
    return process


def killed(child, seconds):
    """Kill a child after so many seconds; False where it had ended well before."""
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def _run(arguments, die_at_replace, after, file_limit):
    from svg.cli import main

    log = os.open("child.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if die_at_replace is not None:
        _die_at_replace(die_at_replace, after)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(main(arguments))


def _die_at_replace(count, after):
    original, done = Path.replace, []

    def replace(self, target):
        done.append(target)
        if len(done) == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(self, target)
        if len(done) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace


def summary_of(out):
    return json.loads(Path(out, "sweep.json").read_text())


def results_of(out):
    """What of a sweep must be the same whenever and wherever it runs: all but times."""
    timed = ("seconds", "speedup", "started", "finished", "attempts", "device")
    cells = {}
    for cell in summary_of(out)["cells"]:
        kept = {key: value for key, value in cell.items() if key not in timed}
        kept["transformers"] = {
            name: {key: value for key, value in part.items() if "seconds" not in key}
            for name, part in (cell["transformers"] or {}).items()
        }
        files = [Path(out, cell[key]) for key in ("video", "frames") if cell[key]]
        # An npz holds the time of its writing.
        kept["files"] = [path.read_bytes() if path.suffix == ".mp4" else frames_of(path) for path in files]
        cells[cell["id"]] = kept
    return cells


def frames_of(path):
    from svg.sweep.run import read_frames

    return read_frames(path)[0].tobytes()
