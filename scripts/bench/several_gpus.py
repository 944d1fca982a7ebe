"""One video on several GPUs: that Ulysses gives what one GPU gives, how much sooner, and what the exchange costs.

    NCCL_NVLS_ENABLE=0 torchrun --standalone --nproc-per-node 2 scripts/bench/several_gpus.py --out OUT

Rank 0 runs alone first, in the same process, then all ranks together. OUT/several-gpus-N.json is written after every row.
`--tiny` rehearses on CPUs over gloo. `--parts` chooses: correct (narrow stacks, every method), speed (full width),
sweep (cells of `svg sweep` an hour, one process a GPU).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stacks import STACKS, Stack, forward
from sweep_cells import sweep_cells
from torch import Tensor, nn

import svg
from svg.config import DenseConfig, MethodConfig, NearConfig, Sage2Config, SpargeConfig, SVG1Config, SVG2Config
from svg.configs import load_preset
from svg.engine.records import Timer
from svg.environment import versions
from svg.pipelines.attach import attached
from svg.pipelines.parallel import Ulysses
from svg.pipelines.processes import join, split_sequence

FAMILIES = ("wan", "hunyuan_video", "minimax_h3")
FAST = {"wan": "wan2.1-t2v-720p", "hunyuan_video": "hunyuan-video-720p"}  # family -> preset
ALWAYS = {"warmup_steps": 0.0, "warmup_layers": 0.0}
DENSITY = 0.25
IN_ORDER = "near, heads in order"  # not dealt by their work
METHODS: dict[str, MethodConfig] = {
    "dense": DenseConfig(),
    "svg1": SVG1Config(density=0.5, **ALWAYS),
    "svg2": SVG2Config(top_p=0.8, num_q_clusters=16, num_k_clusters=48, first_iterations=10, **ALWAYS),
    "sparge": SpargeConfig(topk=0.5, **ALWAYS),
    "sage2": Sage2Config(**ALWAYS),
    "near": NearConfig(budget=0.5, early=0.0, **ALWAYS),
    "near, 8 bits": NearConfig(budget=0.5, early=0.0, precision="int8-fp8", **ALWAYS),
}
FLOOR = {torch.bfloat16: 0.01, torch.float32: 1e-4}  # an error that no control makes smaller
TINY_GRID, NARROW_GRID = (5, 9, 13), (9, 15, 23)  # odd numbers of tokens


class Bench:
    """Where results go, and who this process is."""

    def __init__(self, out: Path, tiny: bool):
        self.device = join("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.rank, self.ranks, self.tiny = dist.get_rank(), dist.get_world_size(), tiny
        self.path = out / f"several-gpus-{self.ranks}.json"
        self.began = time.perf_counter()
        name = "CPU" if tiny else torch.cuda.get_device_name()
        self.result: dict[str, Any] = {
            "command": " ".join(
                [
                    "torchrun",
                    "--standalone",
                    "--nproc-per-node",
                    str(self.ranks),
                    "scripts/bench/several_gpus.py",
                    *sys.argv[1:],
                ]
            ),
            "date": datetime.date.today().isoformat(),
            "device": f"{self.ranks} x {name}",
            "versions": versions() | {"cuda": torch.version.cuda},
            "environment": {key: os.environ[key] for key in sorted(os.environ) if key.startswith("NCCL_")},
        }

    def note(self, part: str, key: str, row: dict[str, Any]) -> None:
        """Keep a row; rank 0 writes all of them."""
        self.result.setdefault(part, {})[key] = row
        self.result["wall_seconds"] = round(time.perf_counter() - self.began, 1)
        if self.rank == 0:
            temporary = self.path.with_suffix(".partial")
            temporary.write_text(json.dumps(self.result, indent=1) + "\n")
            os.replace(temporary, self.path)
            shown = {name: value for name, value in row.items() if not isinstance(value, (list, dict))}
            print(f"{self.result['wall_seconds']:6.1f} s  {part} {key}: {shown}", flush=True)

    def gathered(self, value: Any) -> list[Any]:
        """A value of every rank."""
        found = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found

    def of_rank_0(self, make: Callable[[], Any]) -> Any:
        """What rank 0 alone computes, on every rank; the others wait."""
        box, error = [None], None
        if self.rank == 0:
            try:
                box = [make()]
            except Exception as problem:  # every rank must hear of it, or they wait for ever
                error = repr(problem)
        errors = self.gathered(error)
        if errors[0] is not None:
            raise RuntimeError(f"rank 0 alone: {errors[0]}")
        dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# Correctness


def check(bench: Bench, family: str) -> None:
    """Two steps of every method, on one GPU and on all, and on one with inputs rounded once more as a control."""
    stack = STACKS[family]
    heads, grid = (3, TINY_GRID) if bench.tiny else (6, NARROW_GRID)
    dim = 32 if bench.tiny else 128
    transformer = stack.make(str(bench.device), bench.dtype, heads, dim)
    arguments = stack.arguments(transformer, grid, str(bench.device), bench.dtype)
    steps = {name: config for name, config in METHODS.items() if not (bench.tiny and name == "near, 8 bits")}

    def both(config: MethodConfig) -> Tensor:
        svg.accelerate(transformer, config)
        return torch.stack([forward(transformer, arguments, step, 2) for step in range(2)]).cpu()

    def alone() -> dict[str, tuple[Tensor, Tensor]]:
        found = {name: both(config) for name, config in steps.items()}
        with rounded_once_more(transformer.get_submodule(stack.embed), bench.dtype):
            return {name: (out, both(steps[name])) for name, out in found.items()}

    expected = bench.of_rank_0(alone)
    split_sequence(svg.restore(transformer))
    for name, config in steps.items():
        out = both(config)
        one, control = expected[name]
        error, allowed = distance(out, one), max(2 * distance(control, one), FLOOR[bench.dtype])
        shares = bench.gathered([record.density.mean().item() for record in records(transformer)])
        row = {"relative_error": error, "control": distance(control, one), "equal": error <= allowed}
        bench.note("correct", f"{family}/{name}", row | {"density": statistics.mean(sum(shares, []))})


@contextmanager
def rounded_once_more(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Every output off by at most half a unit in the last place of its dtype."""
    half = torch.finfo(dtype).eps / 2

    def noise(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        generator = torch.Generator(out.device).manual_seed(2)
        change = torch.rand(out.shape, generator=generator, device=out.device) * 2 - 1
        return (out.float() * (1 + half * change)).to(out.dtype)

    handle = module.register_forward_hook(noise)
    try:
        yield
    finally:
        handle.remove()


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def records(transformer: nn.Module) -> list[Any]:
    return attached(transformer)["transformer"].state.records


# Speed


def fast_configs(family: str) -> dict[str, MethodConfig]:
    near = dataclasses.replace(load_preset(FAST[family]).config("near"), budget=DENSITY, early=0.0, **ALWAYS)
    return {
        "dense": DenseConfig(),
        "near": near,
        IN_ORDER: near,
        "near, 8 bits": dataclasses.replace(near, precision="int8-fp8"),
    }


def speed(bench: Bench, family: str, forwards: int, depth: int) -> None:
    """Seconds of a forward on one GPU and on all, with the exchange's share and how unlike the ranks' work is."""
    stack: Stack = STACKS[family]
    stack = dataclasses.replace(stack, layers={name: depth * number for name, number in stack.layers.items()})
    grid = TINY_GRID if bench.tiny else stack.grid
    transformer = stack.make(str(bench.device), bench.dtype, *((3, 32) if bench.tiny else ()))
    arguments = stack.arguments(transformer, grid, str(bench.device), bench.dtype)
    configs = fast_configs(family)
    if bench.tiny:
        configs = {name: dataclasses.replace(config, **_small(config)) for name, config in configs.items()}
        del configs["near, 8 bits"]

    def alone() -> dict[str, dict[str, Any]]:
        alike = {name: config for name, config in configs.items() if name != IN_ORDER}
        return {name: measured(bench, transformer, arguments, config, forwards) for name, config in alike.items()}

    single = bench.of_rank_0(alone)
    single[IN_ORDER] = single["near"]
    split_sequence(svg.restore(transformer))
    for name, config in configs.items():
        dist.barrier()
        ranks = bench.gathered(measured(bench, transformer, arguments, config, forwards, name != IN_ORDER))
        seconds = max(rank["seconds"] for rank in ranks)
        attention = [rank["attention"] for rank in ranks]
        row = {
            "seconds": seconds,
            "alone": single[name]["seconds"],
            "speedup": single[name]["seconds"] / seconds,
            "exchange_share": statistics.mean(rank["exchange"] for rank in ranks) / seconds,
            "exchange_seconds_least": min(rank["exchange"] for rank in ranks),  # of the rank that waits least
            "imbalance": max(attention) / statistics.mean(attention),
            "density": statistics.mean(rank["density"] for rank in ranks),
            "peak_gib": max(rank["peak_gib"] for rank in ranks),
            "attention_seconds": attention,
            "attention_alone": single[name]["attention"],
            "all_seconds": [rank["all"] for rank in ranks],
            "stack": stack.size,
            "layers": stack.layers,
        }
        bench.note("speed", f"{family}/{name}", row)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _small(config: MethodConfig) -> dict[str, Any]:
    return {"granule": 8, "rows": 64, "budget": 0.6} if isinstance(config, NearConfig) else {}


def measured(
    bench: Bench, transformer: nn.Module, arguments: dict, config: MethodConfig, forwards: int, deal: bool = True
) -> dict:
    """Medians of a method's forwards after two to warm up, this rank's."""
    svg.accelerate(transformer, config)
    if not deal:
        attached(transformer)["transformer"].state.note_work = lambda layer, work: None
    steps = 2 + forwards
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = []
    with timed_exchanges(bench.device) as exchanges:
        for step in range(steps):
            bench.wait()
            timer, calls = Timer(bench.device), len(exchanges)
            forward(transformer, arguments, step, steps)
            timer.stop()
            rows.append((timer.seconds(), sum(call.seconds() for call in exchanges[calls:])))
    layers = len(records(transformer)) // steps
    calls = [record.timer.seconds() for record in records(transformer)]
    attention = [sum(calls[first : first + layers]) for first in range(0, len(calls), layers)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else 0.0
    return {
        "seconds": statistics.median(seconds for seconds, _ in rows[2:]),
        "all": [seconds for seconds, _ in rows],
        "exchange": statistics.median(exchange for _, exchange in rows[2:]),
        "attention": statistics.median(attention[2:]),
        "density": statistics.mean(record.density.mean().item() for record in records(transformer)[-layers:]),
        "peak_gib": peak,
    }


@contextmanager
def timed_exchanges(device: torch.device) -> Iterator[list[Timer]]:
    """A timer for every exchange; what a rank waits for a later one counts."""
    timers: list[Timer] = []
    kept = {name: getattr(Ulysses, name) for name in ("heads_for_tokens", "tokens_for_heads")}

    def around(method: Callable) -> Callable:
        def call(self, *tensors):
            timer = Timer(device)
            out = method(self, *tensors)
            timer.stop()
            timers.append(timer)
            return out

        return call

    for name, method in kept.items():
        setattr(Ulysses, name, around(method))
    try:
        yield timers
    finally:
        for name, method in kept.items():
            setattr(Ulysses, name, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="correct,speed,sweep")
    parser.add_argument("--forwards", type=int, default=5)
    parser.add_argument(
        "--depth", type=int, default=1,
        help="times as many layers where speed is measured: what every rank does once a forward, embedding and the last layer, weighs less",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="small stacks on CPUs over gloo")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.out, args.tiny)
    parts = args.parts.split(",")
    for family in FAMILIES if "correct" in parts else ():
        check(bench, family)
    for family in FAST if "speed" in parts else ():
        speed(bench, family, args.forwards, args.depth)
    dist.barrier()
    rank, ranks = bench.rank, bench.ranks
    dist.destroy_process_group()
    if "sweep" in parts and rank == 0:
        sweep_cells(1, args.out / "sweep-first", args.tiny, prompts=1)  # compiles
        for count in [n for n in (1, 2, 4, 8) if n <= ranks]:
            bench.note("sweep", str(count), sweep_cells(count, args.out / f"sweep-{count}", args.tiny))


if __name__ == "__main__":
    main()
