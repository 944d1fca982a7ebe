"""Error against density of every head or layer: measured call by call on q, k, v, averaged into curves."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attend import attend
from ..config import MethodConfig
from ..engine.state import RunState
from ..methods.dense import key_mask
from ..recordings.record import RecordedCall
from ..recordings.sweep import dense_rows

BUSY_CYCLES = 8_000_000  # about 4 ms: more than the host takes to queue a call
MEASURED = 4  # how: what a journal has of another number is measured again
LEAST_ERROR = 1e-12  # in averages of logarithms: what rounding leaves
HANDED_BYTES = 4 << 30  # of what a step's first branch hands on, all layers and levels together
# Settings of a whole run, of which one call knows nothing, and what they are in it.
_OF_A_RUN = {
    "warmup_steps": 0.0,
    "warmup_noise": None,
    "few_steps_noise": None,
    "warmup_layers": 0.0,
    "early": 0.0,
    "residual": 0.0,
    "max_drift": None,
    "cuda_graphs": False,
    "tuned_for": None,
}


@dataclass(frozen=True)
class Curves:
    """What every unit loses and computes at every level, means over the measured calls.

    A unit is a head, or a whole layer (U = 1) whose heads share a budget.

    Args:
        levels: values of the method's budget, ascending, the last one 1.
        error: float64 [L, U, n], squared error of the unit's output / squared output of its layer; 0 at the last level.
        density: float64 [L, U, n]; 1 at the last level.
        measured: bool [L], layers that were measured; the others' errors are 0.
        heads: of a unit.
    """

    levels: tuple[float, ...]
    error: np.ndarray
    density: np.ndarray
    measured: np.ndarray
    heads: int = 1

    def __len__(self) -> int:
        return len(self.error)  # layers


class Handed:
    """What guidance branches of a step leave to each other, for every layer and level, within `HANDED_BYTES`.

    Where it would take more, the layers that come last measure each branch by itself: too pessimistic, not wrong.
    """

    def __init__(self) -> None:
        self._at: tuple | None = None
        self._left: dict[tuple, dict[str, Any]] = {}
        self._bytes = 0

    def begin(self, step: int, transformer: str) -> None:
        """Another step or transformer forgets what was handed on."""
        if self._at != (step, transformer):
            self._at, self._left, self._bytes = (step, transformer), {}, 0

    def give(self, layer: int, level: float, step: dict[str, Any]) -> None:
        """Put into `LayerState.step` what an earlier branch has left."""
        step.clear()
        step.update(self._left.get((layer, level), {}))

    def take(self, layer: int, level: float, step: dict[str, Any]) -> None:
        """Keep what a branch leaves."""
        size = 0 if (layer, level) in self._left else _bytes_of(step)
        if self._bytes + size <= HANDED_BYTES:
            self._bytes += size
            self._left[layer, level] = dict(step)


def measure_call(
    call: RecordedCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_mask: Tensor | None,
    config: MethodConfig,
    levels: tuple,
    handed: Handed | None = None,
    budgets: str = "heads",
) -> dict[str, Any]:
    """Measure one call at every level but the last.

    Clusters are made once from these very tensors; every level then starts from them, as in a run that is under way.

    Args:
        call: which it is.
        q, k, v: float [B, H, S, D].
        text_mask: bool [B, text_tokens], or None.
        config: the method's settings; its warm-up and per-head budgets play no part.
        levels: values of the method's budget, the last one 1.
        handed: what branches of a step leave to each other; None: every call is measured by itself.
        budgets: "heads" where each head spends a budget of its own, else the layer's is one.

    Returns:
        step, layer, branch, transformer; density and error [n - 1][H] as in Curves; seconds [n - 1] of the call, where
        several share a map their mean; kept_seconds, where `refresh` is 1 and could be more: of a call that takes
        an earlier one's map, and its density, the sum over heads.
    """
    exact, _ = dense_rows(q, k, v, key_mask(call.layout, text_mask))
    scale = exact.square().sum()
    state = RunState(bare(config), call.num_layers, call.transformer)
    state.told = True  # of a slow path: once a call would be too often
    state.begin_forward(call.step, call.num_steps, call.branch, call.layout)
    q_in, k_in, v_in = (x.transpose(1, 2) for x in (q, k, v))
    settings = state.config

    def spend(level: float) -> None:
        table = (row_of(level, q.shape[1], budgets),) * call.num_layers
        state.config = dataclasses.replace(settings, **{str(config.head_field): table})

    spend(levels[0])
    attend(q_in, k_in, v_in, state, call.layer, text_mask)  # also compiles

    def timed() -> tuple[Tensor, float]:
        """The output of a call, and what it takes where the GPU is busy while the host queues it."""
        if q.is_cuda:
            torch.cuda._sleep(BUSY_CYCLES)
        out = attend(q_in, k_in, v_in, state, call.layer, text_mask)
        return out.transpose(1, 2), state.records[-1].seconds or 0.0

    handed = Handed() if handed is None else handed
    handed.begin(call.step, call.transformer)
    memory = state.layer(call.layer)
    assert memory.step is not None, "a run that has just begun does not know that it has one branch"
    start = {name: value for name, value in memory.cache.items() if name != "kept"}  # a map is of one level
    refresh = getattr(config, "refresh", 1)
    rows: dict[str, list] = {"density": [], "error": [], "seconds": []}
    for level in levels[:-1]:
        spend(level)
        memory.cache = dict(start)
        memory.head_budgets(state.config, q.device)  # copied to the device before the call is timed
        handed.give(call.layer, level, memory.step)
        out, seconds = timed()
        handed.take(call.layer, level, memory.step)
        rows["density"].append(state.records[-1].density.double().mean(0).tolist())
        rows["error"].append(((out.float() - exact).square().sum((0, 2, 3)) / scale).tolist())
        if refresh > 1:  # the calls that follow plan nothing
            seconds = (seconds + (refresh - 1) * timed()[1]) / refresh
        rows["seconds"].append(seconds)
    if refresh == 1 and hasattr(config, "refresh"):  # what a call would take that plans nothing
        state.config = dataclasses.replace(state.config, refresh=2)
        memory.step.clear()
        timed()
        rows["kept_seconds"] = [timed()[1], sum(rows["density"][-1])]
    state.end_run()
    return {"step": call.step, "layer": call.layer, "branch": call.branch, "transformer": call.transformer, **rows}


def curves_of(rows: list[dict[str, Any]], levels: tuple[float, ...], num_layers: int, budgets: str = "heads") -> Curves:
    """Average measured calls.

    Args:
        rows: of `measure_call`, all at the same levels.
        levels: these levels.
        num_layers: L.
        budgets: "heads" for curves of heads, else of layers; how the calls were measured.

    Returns:
        The curves. A layer's error is the geometric mean of its calls', so that no single prompt or step decides.
    """
    heads = len(rows[0]["error"][0])
    units = heads if budgets == "heads" else 1
    error, density = np.zeros((num_layers, units, len(levels))), np.ones((num_layers, units, len(levels)))
    measured = np.zeros(num_layers, dtype=bool)
    for layer in sorted({row["layer"] for row in rows}):
        own = [row for row in rows if row["layer"] == layer]
        lost, spent = (np.array([row[name] for row in own]) for name in ("error", "density"))  # [calls, n - 1, H]
        if budgets != "heads":
            lost, spent = typical(lost.sum(-1, keepdims=True))[None], spent.mean(-1, keepdims=True)
        error[layer, :, :-1], density[layer, :, :-1] = lost.mean(0).T, spent.mean(0).T
        measured[layer] = True
    return Curves(tuple(levels), error, density, measured, heads // units)


def typical(errors: np.ndarray) -> np.ndarray:
    """Geometric mean over the first dimension, of errors that may be 0."""
    return np.exp(np.log(np.maximum(errors, LEAST_ERROR)).mean(0))


def row_of(level: float, heads: int, budgets: str) -> tuple[float, ...]:
    """A layer's row of a table of budgets.

    Args:
        level: of all heads.
        heads: H.
        budgets: "heads": each head spends its own. Equal ones a method may spend together, as one, so that the last is
            the next number below; else they are equal.
    """
    last = math.nextafter(level, 0.0) if budgets == "heads" and level < 1 else level
    return (level,) * (heads - 1) + (last,)


def probed_level(config: MethodConfig, levels: tuple[float, ...]) -> float:
    """The level at which single layers and heads are tried: the method's own, or the next one that the video's size allows.

    Args:
        config: the method's settings.
        levels: those that are measured, the last one 1.
    """
    return next(level for level in levels if level >= config.probed_level)


def bare(config: MethodConfig) -> MethodConfig:
    """The settings of one call: no warm-up, no share of a run's budget, no per-head budgets, no place they are bound to.

    Args:
        config: the method's settings.
    """
    settings = {name: value for name, value in _OF_A_RUN.items() if hasattr(config, name)}
    return dataclasses.replace(config, **{**settings, str(config.head_field): None})


def _bytes_of(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if dataclasses.is_dataclass(value) or isinstance(value, dict):
        return sum(map(_bytes_of, (value if isinstance(value, dict) else vars(value)).values()))
    return sum(map(_bytes_of, value)) if isinstance(value, (list, tuple)) else 0
