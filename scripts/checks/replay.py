"""Checks captured attention calls on this machine's GPU: whole runs with CUDA graphs against the same runs without, bit for bit.

A run is some steps of some layers and both guidance branches, on tokens that move from step to step; captured calls must not wait
for the device. Timings: milliseconds that a call keeps the host busy while the GPU has nothing else to do, and that a run's attention
takes, with graphs and without, dense attention beside them.

    python scripts/checks/replay.py --out replay.json [--no-timing]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from harness import DEVICE, Check, begin, command_line, differences, finish, judge_all, no_waiting, saving

from svg.attend import attend
from svg.config import DenseConfig, MethodConfig, NearConfig, Sage2Config, SpargeConfig, SVG1Config, SVG2Config
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState

COLD = {"warmup_steps": 0.0, "warmup_layers": 0.0}
SVG2 = {"num_q_clusters": 100, "num_k_clusters": 400, "first_iterations": 5}
METHODS: dict[str, MethodConfig] = {
    "near": NearConfig(**COLD),
    "near 8 bits": NearConfig(precision="int8-fp8", **COLD),
    "near, branches apart": NearConfig(share_branches=False, query_order="hilbert", granule=32, **COLD),
    "near, kept for 3 calls": NearConfig(refresh=3, share_branches=False, **COLD),
    "near, with residual": NearConfig(residual=1.0, warmup_steps=0.2, warmup_layers=0.0),
    "near, rows of 32": NearConfig(rows=32, **COLD),
    "svg2": SVG2Config(**SVG2, **COLD),
    "svg2, 8 bits": SVG2Config(precision="int8-fp8", compensate=True, refresh=2, **SVG2, **COLD),
    "svg1": SVG1Config(density=0.3, **COLD),
    "sparge": SpargeConfig(topk=0.3, precision="int8-fp8", **COLD),
    "sage2": Sage2Config(),
}
TIMED = ("near", "near 8 bits", "svg2", "svg1", "sparge", "sage2")
SIZES = {
    "9,216 tokens, 6 heads": (TokenLayout(9, 32, 32), 6, 64),
    "32,760 tokens, 12 heads": (TokenLayout(21, 30, 52), 12, 128),
}
LAYERS, STEPS = 3, 8


class Tokens:
    """q, k, v of every layer [1, S, H, D] around a few hundred meanings, which move a little with the step."""

    def __init__(self, layout: TokenLayout, heads: int, dim: int):
        tokens = layout.total_tokens
        self.meaning = torch.randint(0, 300, (tokens,), device=DEVICE)
        self.meanings = 1.5 * torch.randn(LAYERS, 3, 300, heads, dim, device=DEVICE)
        self.noise = torch.randn(LAYERS, 3, tokens, heads, dim, device=DEVICE) * 0.5

    def at(self, step: int, layer: int, branch: str) -> list[torch.Tensor]:
        scale = 1 + 0.02 * step + (0.03 if branch == "uncond" else 0.0)
        return [
            (self.meanings[layer, i][self.meaning] * scale + self.noise[layer, i])[None].to(torch.bfloat16)
            for i in range(3)
        ]


def run(config: MethodConfig, layout: TokenLayout, tokens: Tokens, quiet_from: int | None = None):
    """Outputs of all calls, and the state; from a step on no call may wait."""
    state = RunState(config, LAYERS)
    state.timing = False
    outputs = []
    for step in range(STEPS):
        for branch in ("cond", "uncond"):
            state.begin_forward(step, STEPS, branch, layout)
            for layer in range(LAYERS):
                inputs = tokens.at(step, layer, branch)
                if quiet_from is not None and step >= quiet_from:
                    with no_waiting():
                        outputs.append(attend(*inputs, state, layer))
                else:
                    outputs.append(attend(*inputs, state, layer))
    return outputs, state


def check_runs() -> Iterator[Check]:
    layout = TokenLayout(5, 17, 23)
    tokens = Tokens(layout, 3, 64)
    for name, config in METHODS.items():
        plain, before = run(replace(config, cuda_graphs=False), layout, tokens)
        captured, state = run(replace(config, cuda_graphs=True), layout, tokens, quiet_from=4)
        graphs = sum(call is not None for call in state.replays._captured.values())
        yield f"{name}: bytes that differ", sum(map(differences, plain, captured)), 0
        density = [(a.density.cpu() != b.density.cpu()).sum() for a, b in zip(before.records, state.records)]
        yield f"{name}: densities that differ", sum(density), 0
        yield f"{name}: graphs are made (0: yes)", int(graphs == 0), 0
        print(f"     {graphs} graphs for {len(state.records)} calls", flush=True)
        again, _ = run(replace(config, cuda_graphs=True), layout, tokens)
        yield f"{name}: bytes that differ in a second run", sum(map(differences, captured, again)), 0


def check_heads() -> Iterator[Check]:
    """Budgets of single heads, text first and last."""
    table = ((0.2, 0.4, 1.0), (0.3, 0.3, 0.25), (0.5, 0.9, 0.2))
    for text in ((), (77, "last"), (77, "first")):
        layout = TokenLayout(5, 17, 23, *text)
        tokens = Tokens(layout, 3, 64)
        for config in (NearConfig(**COLD), NearConfig(head_budget=table, **COLD)):
            plain, _ = run(replace(config, cuda_graphs=False), layout, tokens)
            captured, _ = run(replace(config, cuda_graphs=True), layout, tokens)
            name = f"near{', budgets of heads' if config.head_budget else ''}, text {text or 'apart'}"
            yield f"{name}: bytes that differ", sum(map(differences, plain, captured)), 0


def timed(config: MethodConfig, size: tuple[TokenLayout, int, int]) -> dict[str, Any]:
    """Host milliseconds of a call of the last steps, GPU idle before each, and GPU milliseconds of all calls of the last steps."""
    layout, heads, dim = size
    tokens, found = Tokens(layout, heads, dim), {}
    inputs = {(layer, branch): tokens.at(0, layer, branch) for layer in range(LAYERS) for branch in ("cond", "uncond")}
    for graphs in (False, True):
        state = RunState(replace(config, cuda_graphs=graphs), LAYERS)
        host, whole = {"cond": [], "uncond": []}, []
        for step in range(3 * STEPS):
            idle = step < 2 * STEPS  # later steps run as a pipeline would: nobody waits inside
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for branch in ("cond", "uncond"):
                state.begin_forward(step, 3 * STEPS, branch, layout)
                for layer in range(LAYERS):
                    if idle:
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    attend(*inputs[layer, branch], state, layer)
                    if idle and step >= STEPS:
                        host[branch].append(1e3 * (time.perf_counter() - start))
            torch.cuda.synchronize()
            if not idle:
                whole.append(1e3 * (time.perf_counter() - begun) / (2 * LAYERS))
        name = "graphs" if graphs else "plain"
        found[name] = {f"host_{branch}": median(times) for branch, times in host.items()} | {"call": median(whole)}
    return found


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--no-checks", action="store_true", help="timings only")
    parser.add_argument("--methods", default=",".join(TIMED), help="which are timed [default: %(default)s]")
    args, machine = begin(parser)
    results: dict[str, Any] = {**machine, "checks": [], "milliseconds": {}}
    save = saving(args.out, results)
    judge_all([] if args.no_checks else [check_runs, check_heads], results["checks"], save)
    for size, shape in {} if args.no_timing else SIZES.items():
        for name in ("dense", *args.methods.split(",")):
            config = DenseConfig() if name == "dense" else METHODS[name]
            found = results["milliseconds"][f"{size}, {name}"] = timed(config, shape)
            shown = {kind: {key: round(ms, 3) for key, ms in times.items()} for kind, times in found.items()}
            print(f"{size}, {name}: {shown}", flush=True)
            save()
    finish(results["checks"])


if __name__ == "__main__":
    main()
