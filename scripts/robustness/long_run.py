"""Hundreds of generations in one process, with changing sizes, methods and pipelines: nothing may grow, nothing may change.

    python scripts/robustness/long_run.py --runs 300 [--out long.json]
    python scripts/robustness/long_run.py --runs 116 --device cuda --seconds 240 --out long.json

With tiny random pipelines. What the process and the GPU hold is compared between the end of the first round of all
combinations and that of the last; every combination's result must always be bit-equal to its first. Then two pipelines run in
two threads, which must give what they give alone. Exit code 1 if something of this does not hold.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import psutil
import torch
from world import builders

import svg
from svg.config import METHODS, config_from_dict
from svg.pipelines import GenerationRequest, generate, load_pipeline

# Heads of 64, for which every kernel has a launch row, and sides that linears in 8 bits can have.
WIDE = {
    "wan": dict(attention_head_dim=64, ffn_dim=256),
    "wan_2_2": dict(attention_head_dim=64, ffn_dim=256),
    "hunyuan": dict(attention_head_dim=64, rope_axes_dim=(16, 24, 24)),
    "cogvideox_2b": dict(attention_head_dim=64),
}
# Height, width, frames. Those of a GPU are of as many tokens as one compilation serves: most of the first round compiles.
SIZES = {
    "cpu": ((32, 48, 9), (48, 32, 17), (48, 48, 5)),
    "cuda": ((128, 192, 17), (192, 128, 17), (128, 208, 13)),
}
LEARNED = {
    "cpu": dict(sample_height=8, sample_width=12),
    "cuda": dict(sample_height=16, sample_width=24, sample_frames=17),
}
FIXED = {"cpu": (64, 96, 9), "cuda": (128, 192, 17)}  # where positions are learned
OF_EVERY_FAMILY = {"cpu": tuple(METHODS), "cuda": ("near", "svg1", "sage2")}
SETTINGS = {
    **{method: {"method": method} for method in METHODS},
    "sage3": {"method": "sage3", "edge_steps": 0},
    "near in 8 bits": {"method": "near", "precision": "int8-fp8"},
    "near, kept for two steps": {"method": "near", "refresh": 2, "max_drift": 0.5},
    "near, branches apart": {"method": "near", "share_branches": False},
    "near with a residual": {"method": "near", "warmup_steps": 0.5, "residual": 0.5},
    "near after much noise": {"method": "near", "few_steps_noise": 0.9},
    "near, linears in 8 bits": {"method": "near", "linears": "all", "fused": True},
    "near, linears in 8 bits after the warm-up": {"method": "near", "warmup_steps": 0.5, "linears": "feed_forward"},
    "near, not captured": {"method": "near", "cuda_graphs": False},
    "near, rows in INT8": {"method": "near", "linears": "all", "linear_precision": "int8-rows"},
    "dense, blocks in INT8": {"method": "dense", "linears": "feed_forward", "linear_precision": "int8"},
    "dense, not fused": {"method": "dense", "fused": False},
    "svg2 in 8 bits": {
        "method": "svg2",
        "num_q_clusters": 16,
        "num_k_clusters": 32,
        "top_p": 0.7,
        "precision": "int8-fp8",
        "compensate": True,
        "refresh": 2,
    },
}
TOGETHER = ((("wan", "near"), ("hunyuan", "svg1")), (("wan_2_2", "svg2"), ("cogvideox_2b", "sage2")))
MOST = {  # bytes, and numbers, that may come on top
    "memory": 96 * 2**20,  # allocators keep some; a leak of one run's tensors would be many times that
    "descriptors": 0,
    "threads": 0,
    "gpu_memory": 2**20,  # of tensors: what one run leaves behind is added up by all
    "gpu_reserved": 96 * 2**20,
}

Combination = tuple[str, str, tuple[int, int, int]]


def save_wide(name: str, folder: Path, device: str) -> None:
    """Save a tiny random pipeline whose transformers are wide enough for a GPU's kernels."""
    torch.manual_seed(0)
    pipe = builders()[name]()
    changes = WIDE[name] | (LEARNED[device] if name == "cogvideox_2b" else {})
    for part in ("transformer", "transformer_2"):
        if (old := getattr(pipe, part, None)) is not None:
            pipe.register_modules(**{part: type(old).from_config({**old.config, **changes})})
    pipe.save_pretrained(folder / name, safe_serialization=True)


def combinations(device: str) -> list[Combination]:
    """Pipelines, settings and sizes, in an order in which each changes often."""
    every = [("wan", settings) for settings in SETTINGS]
    others = [(name, method) for method in OF_EVERY_FAMILY[device] for name in WIDE if name != "wan"]
    # On a CPU's short maps means are nearly all beside text, or where a token stands for more: near refuses.
    others = [one for one in others if device == "cuda" or one[1] != "near"]
    mixed = [one for pair in zip(every, others) for one in pair] + every[len(others) :] + others[len(every) :]
    sizes = SIZES[device]
    return [
        (name, settings, FIXED[device] if name == "cogvideox_2b" else sizes[index % len(sizes)])
        for index, (name, settings) in enumerate(mixed)
    ]


def run(pipe: Any, settings: str, size: tuple[int, int, int]) -> str:
    """One generation, accelerated and given back: the hash of its frames."""
    height, width, frames = size
    request = GenerationRequest(
        prompt="a red ball", height=height, width=width, num_frames=frames, steps=2, guidance=3.0
    )
    chosen = {"warmup_steps": 0.0, "warmup_layers": 0.0, **SETTINGS[settings]}
    if chosen["method"] == "near":
        chosen["budget"] = 0.9  # means alone are much of so short a sequence
    svg.accelerate(pipe, config_from_dict(chosen))
    try:
        return hashlib.sha256(generate(pipe, request).frames.tobytes()).hexdigest()
    finally:
        svg.restore(pipe)


def used(device: str) -> dict[str, int]:
    """What this process holds, once what nobody can reach is gone."""
    gc.collect()
    process = psutil.Process()
    found = {
        "memory": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }
    if device == "cuda":
        torch.cuda.synchronize()
        found |= {"gpu_memory": torch.cuda.memory_allocated(), "gpu_reserved": torch.cuda.memory_reserved()}
    return found


class LongRun:
    """Generations one after the other, and what was seen of them.

    Args:
        folder: where the pipelines are saved.
        device: "cpu" or "cuda".
        out: a file that holds what is known so far, as JSON, or None.
    """

    def __init__(self, folder: Path, device: str, out: Path | None):
        self.folder, self.device, self.out = folder, device, out
        for name in WIDE:
            save_wide(name, folder, device)
        self.todo = combinations(device)
        self.pipes = {name: self.load(name) for name in WIDE}
        self.first: dict[Combination, str] = {}
        self.broken: set[Combination] = set()
        self.rounds: list[dict[str, int]] = []
        self.seconds: list[float] = []
        self.faults: list[str] = []

    def load(self, name: str) -> Any:
        pipe = load_pipeline(self.folder / name, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def once(self, index: int) -> None:
        """The generation of an index, and after the last one of a round what is held then."""
        place = index % len(self.todo)
        combination, began = self.todo[place], time.monotonic()
        name, settings, size = combination
        if index % 50 == 49:  # a model that is loaded anew gives the same
            self.pipes[name] = self.load(name)
        if combination not in self.broken:
            try:
                found = run(self.pipes[name], settings, size)
                if self.first.setdefault(combination, found) != found:
                    self.faults.append(f"run {index}: {name}, {settings}, {size} gives other frames than at first")
            except Exception:
                self.broken.add(combination)
                self.faults.append(f"run {index}: {name}, {settings}, {size}: {traceback.format_exc(limit=-4)}")
        self.seconds.append(round(time.monotonic() - began, 2))
        if place == len(self.todo) - 1:
            self.rounds.append(used(self.device))
        self.write()

    def judge_growth(self) -> None:
        """Compare the first round's end with the last one's."""
        if not self.rounds:
            return
        start, end = self.rounds[0], self.rounds[-1]
        self.faults += [
            f"{key} grew from {start[key]} to {end[key]}" for key in start if end[key] - start[key] > MOST[key]
        ]

    def together(self, pair: tuple[tuple[str, str], ...], times: int = 3) -> None:
        """Two pipelines in two threads against each alone."""
        sizes = {name: FIXED[self.device] if name == "cogvideox_2b" else SIZES[self.device][0] for name, _ in pair}
        alone = {name: run(self.pipes[name], settings, sizes[name]) for name, settings in pair}

        def repeat(name: str, settings: str) -> None:
            for _ in range(times):
                try:
                    if run(self.pipes[name], settings, sizes[name]) != alone[name]:
                        self.faults.append(f"{name}, {settings} beside another pipeline gives other frames")
                except Exception:
                    self.faults.append(f"{name}, {settings} beside another: {traceback.format_exc(limit=-4)}")

        threads = [threading.Thread(target=repeat, args=one) for one in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def write(self, **more: Any) -> None:
        """Put what is known so far into the file, whole."""
        if self.out is None:
            return
        packages = {"torch": torch.__version__, "diffusers": diffusers.__version__, "svg": svg.__version__}
        text = json.dumps(
            {
                "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
                "versions": packages,
                "combinations": len(self.todo),
                "runs": len(self.seconds),
                "seconds": self.seconds,
                "rounds": self.rounds,
                "faults": self.faults,
                **more,
            },
            indent=1,
        )
        part = self.out.with_name(f".{self.out.name}.part")
        part.write_text(text)
        part.replace(self.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--out", type=Path, help="write the numbers here as they come, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    began, out = time.monotonic(), options.out and options.out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        long = LongRun(Path(folder), options.device, out)
        for index in range(options.runs):
            if time.monotonic() - began > options.seconds:
                break
            long.once(index)
            if index % 10 == 9:
                print(f"{index + 1} generations, {time.monotonic() - began:.0f} s", flush=True)
        long.judge_growth()
        long.write()
        for pair in TOGETHER:
            long.together(pair)
            long.write()
        long.write(whole=True)
    repeated, rounds = max(0, len(long.seconds) - len(long.todo)), len(long.rounds)
    print(f"{len(long.seconds)} generations, {repeated} of them repeated; {time.monotonic() - began:.0f} s")
    if rounds > 1:
        print(f"held after the first of {rounds} rounds {long.rounds[0]}, after the last {long.rounds[-1]}")
    else:
        print(f"growth is not judged: that takes two rounds of {len(long.todo)} generations")
    print(f"{len(long.faults)} faults:", *long.faults, sep="\n")
    return 1 if long.faults else 0


if __name__ == "__main__":
    sys.exit(main())
