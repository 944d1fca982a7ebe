"""Kills commands at random moments, again and again; then the same command must go on to the same results.

    python scripts/robustness/kills.py --kills 500 [--seconds 1200] [--only sweep] [--out kills.json]

A process with everything imported and the model loaded forks a child for each command; videos are not enlarged to be
watched and VMAF is left out, which takes most of the time and writes nothing. After each kill what can be seen must be whole; after the
last run results must equal those of a run that nobody killed, what was finished before a kill must be kept as it was, and
nothing temporary may be left. Exit code 1 if something of this does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from world import PROMPT, SIZE, save_model

import svg.eval.compare
import svg.generate.run_job
import svg.recordings.layer_precisions
import svg.recordings.linear_precisions
import svg.recordings.record
import svg.recordings.sparge_tune
import svg.sweep.pool
import svg.sweep.worker
import svg.tune.run
from svg.cli import main as run_svg
from svg.eval.video import read_video
from svg.pipelines import load_pipeline

COMMON = ("--model", "model", *SIZE, "--device", "cpu")
COMMANDS = {
    "generate": ("generate", PROMPT, *COMMON, "--method", "svg1", "--lpips", "none", "--out", "out"),
    "sweep": ("sweep", "--prompt", PROMPT, *COMMON, "--methods", "svg1,sparge", "--no-control", "--lpips", "none", "--out", "out"),
    "tune": ("tune", "--min-psnr", "5", "--prompt", "a cat", "--held-out", "a dog", *COMMON, "--rounds", "1", "--probe", "none",
             "--lpips", "none", "--no-control", "--set", "num_q_clusters=2", "--set", "num_k_clusters=4", "--out", "out"),
    "record": ("record", PROMPT, *COMMON, "--out", "out/q.safetensors"),
    "adapt-linears": ("adapt-linears", PROMPT, *COMMON, "--out", "out/linears.json"),
    "sparge-tune": ("sparge-tune", "q.safetensors", "--device", "cpu", "--out", "out/thresholds.safetensors"),
    "adapt": ("adapt", "q.safetensors", "--device", "cpu", "--min-cosine", "0.5", "--out", "out/layers.json"),
    "evaluate": ("evaluate", "videos", "others", "--device", "cpu", "--lpips", "none", "--json", "out/e.json", "--csv", "out/e.csv"),
}  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FINISHED, INTERRUPTED = 0, 130
# What differs from run to run: times, and what follows from them.
_VOLATILE = (
    "seconds",
    "started",
    "finished",
    "created",
    "updated",
    "speedup",
    "attempts",
    "saved",
    "dense_cost",
    "source",
    "command",
)


def start(arguments: tuple[str, ...], folder: Path) -> int:
    """Fork a child that runs a command in a folder; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        sys.argv = ["svg", *arguments]  # what reports name as their command
        with open(folder / "log", "ab", buffering=0) as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run_svg(list(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(child: int) -> int:
    """Wait for a child: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Trials:
    """All trials of one command.

    Args:
        name: the command.
        root: a folder with its inputs, in `inputs`.
        rng: says when to kill and how.
    """

    def __init__(self, name: str, root: Path, rng: random.Random):
        self.name, self.arguments, self._root, self._rng = name, COMMANDS[name], root, rng
        self.kills: Counter[str] = Counter()
        self.faults: list[str] = []
        folder = self._fresh("reference")
        began = time.perf_counter()
        code = end(start(self.arguments, folder))
        self._seconds = time.perf_counter() - began
        if code != FINISHED:
            raise RuntimeError(f"svg {name} must work, got {code}: {(folder / 'log').read_text()[-2000:]}")
        self._wanted = contents(folder / "out")

    def once(self) -> None:
        """Kill the command one to three times, then let it end, and look at what there is."""
        folder = self._fresh("trial")
        kept: dict[str, Any] = {}
        for attempt in range(self._rng.choice((1, 1, 1, 2, 3))):
            number = self._rng.choice(SIGNALS)
            child, began = start(self.arguments, folder), time.perf_counter()
            time.sleep(self._rng.uniform(0, 1.02 * self._seconds))
            os.kill(child, number)
            code = end(child)
            killed = code in (-number, INTERRUPTED)
            self.kills[number.name if killed else "ended before"] += 1
            if not (killed or attempt):  # it takes less than it did: the next kill comes earlier
                self._seconds = min(self._seconds, 0.9 * (time.perf_counter() - began))
            self._expect(code in (-number, INTERRUPTED, FINISHED, 2), f"{number.name} ended in {code}", folder)
            before = kept
            kept = self._look(folder)
            self._expect(
                all(kept.get(name) == value for name, value in before.items()), "a kill lost what was finished", folder
            )
        code = end(start(self.arguments, folder))
        log = (folder / "log").read_text(errors="replace")
        done = self.name == "generate" and code == 2 and "must hold no earlier results" in log.splitlines()[-1]
        self._expect(code == FINISHED or done, f"the same command ended in {code}", folder)
        self._expect("Traceback" not in log and "fault of svg" not in log, "a traceback", folder)
        found = contents(folder / "out")
        differing = sorted(
            name for name in self._wanted.keys() | found.keys() if self._wanted.get(name) != found.get(name)
        )
        self._expect(not differing, f"other results: {differing}", folder)
        after = finished(folder / "out", self.name)
        self._expect(
            all(after.get(name) == value for name, value in kept.items()), "finished work was done again", folder
        )
        left = [str(path.relative_to(folder)) for path in folder.rglob(".svg-*")]
        self._expect(not left, f"left {left}", folder)

    def _look(self, folder: Path) -> dict[str, Any]:
        """What is finished after a kill; what cannot be read is a fault."""
        try:
            contents(folder / "out")
            return finished(folder / "out", self.name)
        except Exception as error:
            self._expect(False, f"half a file after a kill: {type(error).__name__}: {error}", folder)
            return {}

    def _expect(self, holds: bool, what: str, folder: Path) -> None:
        if not holds:
            self.faults.append(f"{self.name}: {what}")
            tail = (folder / "log").read_text(errors="replace")[-600:]
            print(ascii(f"{self.name}: {what} | {tail}"), flush=True)

    def _fresh(self, name: str) -> Path:
        folder = self._root / f"{self.name}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._root / "inputs", folder, copy_function=os.link)
        if self.name not in ("generate", "sweep", "tune"):
            (folder / "out").mkdir()
        return folder


def contents(out: Path) -> dict[str, Any]:
    """What results say, by file, without what differs from run to run; every file must be readable whole."""
    found = {}
    for path in sorted(out.rglob("*")) if out.exists() else ():
        name = str(path.relative_to(out))
        if not path.is_file() or any(part.startswith(".") for part in path.parts) or path.name == "lock":
            continue
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            if path.parent.name != "journal":  # its entries stand in sweep.json or tune.json
                found[name] = _stable(content)
        elif path.suffix == ".mp4":
            found[name] = hashlib.sha256(read_video(path)[0].tobytes()).hexdigest()
        elif path.suffix == ".safetensors":
            found[name] = _tensors(path)
        elif path.suffix not in (".html", ".npz", ".csv", ".yaml"):
            found[name] = path.read_bytes()
        elif not path.read_bytes():
            raise ValueError(f"{name} is empty")
    return found


def _tensors(path: Path) -> dict[str, str]:
    from safetensors.torch import load_file

    return {
        name: hashlib.sha256(x.contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, x in load_file(path).items()
    }


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if not any(word in key for word in _VOLATILE)}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def finished(out: Path, command: str) -> dict[str, Any]:
    """What must never be done again, by name: entries of journals, and layers of a file of thresholds."""
    entries = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("journal/*.json")
        if path.name != "format.json"
    }
    if command == "sparge-tune" and (file := out / "thresholds.safetensors").exists():
        from svg.methods.sparge.thresholds_file import read_about

        entries |= {**read_about(file)["layers"], **_tensors(file)}
    if command in ("record", "adapt", "adapt-linears", "evaluate"):
        return {}  # one file, made at once
    return entries


def quicken(model: Path) -> None:
    """Leave out what takes long and has no place in the question: loading, enlarging, VMAF."""
    pipe = load_pipeline(model, device="cpu")
    for module in (svg.generate.run_job, svg.recordings.record, svg.recordings.linear_precisions, svg.sweep.worker):
        module.load_pipeline = lambda *args, **kwargs: pipe
    svg.generate.run_job.to_watch = lambda frames, fps: frames
    svg.eval.compare.vmaf = lambda reference, output: np.full(sum(1 for _ in reference), 100.0)


def make_inputs(folder: Path) -> None:
    """A model, a recording and two folders of videos, made by the commands themselves."""
    folder.mkdir()
    save_model("wan", folder / "model")
    for arguments in (
        ("record", PROMPT, *COMMON, "--record-steps", "1", "--out", "q.safetensors"),
        ("generate", PROMPT, *COMMON, "--lpips", "none", "--no-control", "--method", "svg1", "--out", "run"),
    ):
        if end(start(arguments, folder)) != FINISHED:
            raise RuntimeError((folder / "log").read_text()[-2000:])
    for name, source in (("videos", "dense.mp4"), ("others", "accelerated.mp4")):
        (folder / name).mkdir()
        for index in range(3):
            shutil.copy(folder / "run" / source, folder / name / f"{index}.mp4")
    shutil.rmtree(folder / "run")
    (folder / "log").unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, began = random.Random(options.seed), time.monotonic()
    out = options.out and options.out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.path.realpath(folder))
        make_inputs(root / "inputs")
        quicken(root / "inputs" / "model")
        trials = [Trials(name, root, rng) for name in options.only]
        turn = 0

        def total() -> int:
            return sum(sum(one.kills.values()) - one.kills["ended before"] for one in trials)

        while total() < options.kills and time.monotonic() - began < options.seconds:
            trials[turn % len(trials)].once()
            turn += 1
            if turn % 20 == 0:
                print(f"{total()} kills, {sum(len(one.faults) for one in trials)} faults", flush=True)
    faults = [fault for one in trials for fault in one.faults]
    kills = {one.name: dict(one.kills) for one in trials}
    print(f"{total()} kills: {kills}; {len(faults)} faults: {dict(Counter(faults))}")
    if out is not None:
        out.write_text(json.dumps({"kills": kills, "faults": faults}, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
