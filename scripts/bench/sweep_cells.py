"""How many cells `svg sweep` makes an hour on some GPUs of one machine: the bundled model, one process a GPU."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = [
    f"a large red {shape} moving {way} over a gray and navy checkered background, the camera is still"
    for shape in ("circle", "square")
    for way in ("right", "left")
]
GPU = {"frames": 33, "height": 256, "width": 256, "steps": 10}
TINY = {"frames": 5, "height": 64, "width": 64, "steps": 2}


def sweep_cells(workers: int, out: Path, tiny: bool, prompts: int = 4) -> dict[str, Any]:
    """Run one sweep from an empty folder.

    Args:
        workers: processes, each on a GPU of its own.
        out: the sweep's folder; what is there is removed.
        tiny: small cells on the CPU.
        prompts: at most 4; five cells each.

    Returns:
        Cells, seconds of the whole command and of the cells alone, and cells an hour by the latter.
    """
    out = out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    size = TINY if tiny else GPU
    command = [sys.executable, "-m", "svg", "sweep", "--methods", "near,svg1", "--budgets", "0.3,0.5", "--no-control"]
    command += ["--device", "cpu" if tiny else "cuda", "--lpips", "none", "--workers", str(workers), "--out", str(out)]
    command += [part for name, value in size.items() for part in (f"--{name}", str(value))]
    command += [part for prompt in PROMPTS[: min(2, prompts) if tiny else prompts] for part in ("--prompt", prompt)]
    environment = {key: value for key, value in os.environ.items() if "RANK" not in key and key != "WORLD_SIZE"}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"svg sweep on {workers} workers: {done.stderr[-2000:]}")
    cells = json.loads((out / "sweep.json").read_text())["cells"]
    start = min(datetime.datetime.fromisoformat(cell["started"]) for cell in cells)
    end = max(datetime.datetime.fromisoformat(cell["finished"]) for cell in cells)
    seconds = (end - start).total_seconds()
    return {
        "cells": len(cells), "cells_per_hour": 3600 * len(cells) / max(seconds, 1), "seconds": seconds,
        "wall_seconds": wall, "size": size, "command": " ".join(command[1:]),
    }  # fmt: skip
