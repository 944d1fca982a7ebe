"""Seconds and memory of full-width stacks of two or three layers at their families' default sizes: stock Diffusers against svg.

    python scripts/bench/families.py --out OUT [--families wan,ltx2_3]

Before it is timed, a stack is run dense through svg, which must give what stock Diffusers gives. OUT/families.json is
written after every row. `--tiny` rehearses on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from stacks import STACKS, forward
from torch import Tensor

import svg
from svg.config import DenseConfig, MethodConfig, NearConfig
from svg.engine.records import Timer
from svg.environment import versions
from svg.pipelines.attach import attached

DENSITY = 0.25
NEAR = {"budget": DENSITY, "early": 0.0, "granule": 32, "warmup_steps": 0.0, "warmup_layers": 0.0}
ALLOWED = {torch.bfloat16: 0.02, torch.float32: 1e-5}  # relative distance of svg's dense output from the stock one
TINY_GRID = (5, 9, 13)


def variants(tiny: bool) -> dict[str, MethodConfig]:
    if tiny:
        return {"near": NearConfig(**NEAR | {"granule": 8, "rows": 64, "budget": 0.6})}
    return {"near": NearConfig(**NEAR), "near, 8 bits": NearConfig(**NEAR, precision="int8-fp8")}


def measured(transformer: Any, arguments: dict[str, Any], device: torch.device, forwards: int) -> dict[str, Any]:
    """Median seconds of a forward after two, the most memory in it, and the last output."""
    seconds, out = [], torch.empty(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(2 + forwards):
        del out
        timer = Timer(device)
        out = forward(transformer, arguments, step, 2 + forwards)
        timer.stop()
        seconds.append(timer.seconds())
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"seconds": median(seconds[2:]), "all_seconds": seconds, "peak_gib": peak, "out": out}


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def bench(family: str, device: torch.device, tiny: bool, forwards: int, note: Callable[[str, dict], None]) -> None:
    """All rows of a family."""
    stack, dtype = STACKS[family], torch.float32 if tiny else torch.bfloat16
    transformer = stack.make(str(device), dtype, *((3, 32) if tiny else ()))
    arguments = stack.arguments(transformer, TINY_GRID if tiny else stack.grid, str(device), dtype)
    weights = sum(x.numel() * x.element_size() for x in transformer.parameters()) / 2**30
    stock = measured(transformer, arguments, device, forwards)
    expected = stock.pop("out")
    note(f"{family}/stock", stock | {"weights_gib": weights, "stack": stack.size})
    svg.accelerate(transformer, DenseConfig())
    error = distance(forward(transformer, arguments), expected)
    if not error <= ALLOWED[dtype]:
        raise RuntimeError(
            f"{family}: svg's dense output is {error:.3g} from the stock one, {ALLOWED[dtype]} is allowed"
        )
    for name, config in variants(tiny).items():
        svg.accelerate(transformer, config)
        row = measured(transformer, arguments, device, forwards)
        records = attached(transformer)["transformer"].state.records
        layers = len(records) // (2 + forwards)
        row |= {
            "dense_error": error,
            "error": distance(row.pop("out"), expected),  # of random weights: what it is worth is measured elsewhere
            "density": sum(record.density.mean().item() for record in records[-layers:]) / layers,
            "attention_seconds": sum(record.seconds for record in records[-layers:]),
            "speedup": stock["seconds"] / row["seconds"],
        }
        note(f"{family}/{name}", row)
    svg.restore(transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", default=",".join(STACKS))
    parser.add_argument("--forwards", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="narrow stacks on a CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, began = torch.device("cpu" if args.tiny else "cuda"), time.perf_counter()
    result = {
        "command": " ".join(["python", "scripts/bench/families.py", *sys.argv[1:]]), "date": datetime.date.today().isoformat(),
        "device": "CPU" if args.tiny else torch.cuda.get_device_name(), "versions": versions(), "rows": {},
    }  # fmt: skip

    def note(key: str, row: dict[str, Any]) -> None:
        result["rows"][key] = row
        result["wall_seconds"] = round(time.perf_counter() - began, 1)
        temporary = args.out / "families.partial"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, args.out / "families.json")
        print(
            f"{result['wall_seconds']:6.1f} s  {key}: { {k: v for k, v in row.items() if k != 'all_seconds'} }",
            flush=True,
        )

    for family in args.families.split(","):
        try:
            bench(family, device, args.tiny, args.forwards, note)
        except Exception as error:  # the other families are still worth their time
            note(f"{family}/failed", {"error": repr(error)})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if any(key.endswith("/failed") for key in result["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
