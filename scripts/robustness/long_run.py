"""Hundreds of generations in one process, with changing sizes, methods and pipelines: nothing may grow, nothing may change.

    python scripts/robustness/long_run.py --runs 300 [--out long.json]

On a CPU, with tiny random pipelines. Memory, descriptors and threads are compared between the first third and the end; every
combination's result at the end must be bit-equal to its first. Then two pipelines run in two threads, which must give what
they give alone. Exit code 1 if something of this does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from world import save_model

import svg
from svg.config import METHODS
from svg.pipelines import GenerationRequest, generate, load_pipeline

PIPELINES = ("wan", "wan_2_2", "hunyuan", "cogvideox_2b")
SIZES = ((32, 48, 9), (48, 32, 17), (48, 48, 5))
GROWTH = 96 * 2**20  # bytes: allocators keep some; a leak of one run's tensors would be many times that


def combinations(folder: Path) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Pipelines, saved to a folder, x methods x sizes, in an order in which each changes often."""
    for name in PIPELINES:
        save_model(name, folder / name)
    sizes = {
        name: ((64, 96, 9),) if name == "cogvideox_2b" else SIZES for name in PIPELINES
    }  # its positions are learned
    every = itertools.product((*SIZES, (64, 96, 9)), METHODS, PIPELINES)
    # Beside text, or where a token stands for more, means are nearly all of so short a map: near refuses.
    fits = (one for one in every if one[0] in sizes[one[2]] and (one[1] != "near" or one[2] == "wan"))
    return [(name, method, size) for size, method, name in fits]


def run(pipe: Any, method: str, size: tuple[int, int, int]) -> str:
    """One generation, accelerated and given back: the hash of its frames."""
    height, width, frames = size
    request = GenerationRequest(
        prompt="a red ball", height=height, width=width, num_frames=frames, steps=2, guidance=3.0
    )
    budget = {"budget": 0.9} if method == "near" else {}  # means alone are much of so short a sequence
    svg.accelerate(pipe, METHODS[method](warmup_steps=0.0, warmup_layers=0.0, **budget))
    try:
        return hashlib.sha256(generate(pipe, request).frames.tobytes()).hexdigest()
    finally:
        svg.restore(pipe)


def used() -> dict[str, int]:
    """What this process holds."""
    process = psutil.Process()
    return {"bytes": process.memory_info().rss, "descriptors": process.num_fds(), "threads": process.num_threads()}


def together(pipes: dict[str, Any], rounds: int) -> list[str]:
    """Two pipelines in two threads against each alone: what differs."""
    work = {"wan": ("svg2", SIZES[0]), "hunyuan": ("svg1", SIZES[0])}
    alone = {name: run(pipes[name], *what) for name, what in work.items()}
    faults: list[str] = []

    def repeat(name: str) -> None:
        for _ in range(rounds):
            try:
                if run(pipes[name], *work[name]) != alone[name]:
                    faults.append(f"{name} beside another pipeline gives other frames")
            except Exception as error:
                faults.append(f"{name} beside another pipeline: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=repeat, args=(name,)) for name in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first: dict[tuple, str] = {}
    faults, history, began = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        todo = combinations(Path(folder))
        pipes = {name: load_pipeline(Path(folder, name), device="cpu") for name in PIPELINES}
        for index in range(options.runs):
            if time.monotonic() - began > options.seconds:
                break
            name, method, size = todo[index % len(todo)]
            if index % 50 == 49:  # a model that is loaded anew gives the same
                pipes[name] = load_pipeline(Path(folder, name), device="cpu")
            found = run(pipes[name], method, size)
            if first.setdefault((name, method, size), found) != found:
                faults.append(f"run {index}: {name}, {method}, {size} gives other frames than at first")
            history.append(used())
        faults += together(pipes, 3)
    start, end = history[len(history) // 3], history[-1]
    if end["bytes"] - start["bytes"] > GROWTH:
        faults.append(f"memory grew from {start['bytes'] / 2**20:.0f} to {end['bytes'] / 2**20:.0f} MiB")
    faults += [
        f"{key} grew from {start[key]} to {end[key]}" for key in ("descriptors", "threads") if end[key] > start[key]
    ]
    repeated = max(0, len(history) - len(todo))
    print(f"{len(history)} generations, {repeated} of them repeated; {start} -> {end}; {len(faults)} faults: {faults}")
    if options.out is not None:
        options.out.write_text(
            json.dumps({"runs": len(history), "start": start, "end": end, "faults": faults}, indent=1)
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
