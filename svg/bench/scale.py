"""Time and memory of a whole SVG2 call from 7,200 to 302,400 tokens at one budget, dense cuDNN beside it.

Time is quadratic for both, at a fixed share of the map. Memory is what a call takes beyond its inputs, output included;
with a fixed number of clusters it grows as the tokens do, with equal stretches of tokens ("tiles") the map grows faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attend import attend
from ..config import SELECTIONS, SVG2Config
from ..engine.layout import TokenLayout
from ..engine.state import LayerState, RunState
from ..methods.dense import dense_attention
from ..methods.svg2 import plan as svg2
from .inputs import Inputs
from .timing import median_ms

GRID = (45, 80)  # rows and columns of a frame in tokens: 720p
FRAMES = (2, 5, 9, 18, 36, 84)


def bench_scale(bench, config: Callable[[str], SVG2Config], heads: int, dim: int) -> None:
    """Time calls of growing size.

    Args:
        bench: collects the results.
        config: selection -> the settings, at a fixed budget.
        heads, dim: of the inputs.
    """
    used: dict[str, list[tuple[int, int]]] = {selection: [] for selection in SELECTIONS}
    for frames in FRAMES:
        inputs = bench.inputs(TokenLayout(frames, *GRID), heads, dim)
        tokens, shape = inputs.layout.total_tokens, f"B=1 H={heads} S={inputs.layout.total_tokens} D={dim}"
        dense = median_ms(partial(dense_attention, *inputs.heads_first(), backend="cudnn"), 3, 1)
        about = {"inputs": inputs.description}
        bench.note(f"scale/dense/cudnn/bf16/S{tokens}/ms", dense, "ms", shape, density=1, **about)
        about["baseline"] = f"cuDNN dense {dense:.2f} ms"
        for selection in SELECTIONS:
            call = Call(inputs, config(selection))
            ms = median_ms(call, 5, 2)
            bytes_used = peak_bytes(call)
            used[selection].append((tokens, bytes_used))
            about["density"] = call.density()
            prefix = f"scale/svg2/bf16/S{tokens}" + ("/clusters" if selection == "clusters" else "")
            bench.note(f"{prefix}/ms", ms, "ms", shape, **about)
            bench.note(f"{prefix}/speedup_vs_cudnn", dense / ms, "x", shape, **about)
            bench.note(f"{prefix}/plan_ms", median_ms(call.plan, 5, 2), "ms", shape, **about)
            bench.note(f"{prefix}/memory_mib", bytes_used / 2**20, "MiB beyond q, k, v", shape, **about)
            bench.note(f"{prefix}/bytes_per_token", bytes_used / tokens, "B", shape, **about)
    for selection, points in used.items():
        name = "/clusters" if selection == "clusters" else ""
        shape = f"B=1 H={heads} S={points[0][0]} to {points[-1][0]} D={dim}"
        bench.note(f"scale/svg2/bf16{name}/memory_exponent", exponent(points), "power of S", shape)


class Call:
    """A whole call in the middle of a run: clusters start from those of the call before.

    Args:
        inputs: what to attend with.
        config: the method's settings.
    """

    def __init__(self, inputs: Inputs, config: SVG2Config):
        self._inputs, self._config, self._memory = inputs, config, LayerState(0, "cond", 0)
        self._state = RunState(config, num_layers=1)
        self._state.begin_forward(0, 1, "cond", inputs.layout)

    def __call__(self) -> Tensor:
        del self._state.records[:-1]
        return attend(self._inputs.q, self._inputs.k, self._inputs.v, self._state, 0)

    def plan(self) -> Any:
        """What is not attention, moves excepted."""
        return svg2.plan(*self._inputs.heads_first(), self._config, self._memory, self._inputs.layout)

    def density(self) -> float:
        """Of the last call."""
        return self._state.records[-1].density.mean().item()


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most device memory a call holds at a time beyond what was there, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def exponent(points: list[tuple[int, int]]) -> float:
    """Growth from the middle size on, as a power: slope of the least-squares line in logarithms; 1 is linear."""
    points = points[len(points) // 2 - 1 :]
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
