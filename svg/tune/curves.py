"""Every head's error against its density: measured call by call on q, k, v, averaged into curves."""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True)
class Curves:
    """What every head loses and computes at every level, means over the measured calls.

    Args:
        levels: values of the method's budget, ascending, the last one 1.
        error: float64 [L, H, n], squared error of the head's output / squared output of its layer; 0 at the last level.
        density: float64 [L, H, n]; 1 at the last level.
        measured: bool [L], layers that were measured; the others' errors are 0.
    """

    levels: tuple[float, ...]
    error: np.ndarray
    density: np.ndarray
    measured: np.ndarray

    def __len__(self) -> int:
        return len(self.error)  # layers


def measure_call(
    call: RecordedCall, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, config: MethodConfig, levels: tuple
) -> dict[str, Any]:
    """Measure one call at every level but the last.

    Clusters are made once from these very tensors; every level then starts from them, as in a run that is under way.

    Args:
        call: which it is.
        q, k, v: float [B, H, S, D].
        text_mask: bool [B, text_tokens], or None.
        config: the method's settings; its warm-up and per-head budgets play no part.
        levels: values of the method's budget, the last one 1.

    Returns:
        step, layer, branch, transformer; density and error [n - 1][H] as in Curves; seconds [n - 1] of the call, where
        several share a map their mean.
    """
    exact, _ = dense_rows(q, k, v, key_mask(call.layout, text_mask))
    scale = exact.square().sum()
    state = RunState(_bare(config), call.num_layers, call.transformer)
    state.begin_forward(call.step, call.num_steps, call.branch, call.layout)
    q_in, k_in, v_in = (x.transpose(1, 2) for x in (q, k, v))
    attend(q_in, k_in, v_in, state, call.layer, text_mask)  # also compiles

    def timed() -> tuple[Tensor, float]:
        """The output of a call, and what it takes where the GPU is busy while the host queues it."""
        if q.is_cuda:
            torch.cuda._sleep(BUSY_CYCLES)
        out = attend(q_in, k_in, v_in, state, call.layer, text_mask)
        return out.transpose(1, 2), state.records[-1].seconds or 0.0

    memory = state.layer(call.layer)
    start = {name: value for name, value in memory.cache.items() if name != "kept"}  # a map is of one level
    refresh = getattr(config, "refresh", 1)
    rows: dict[str, list] = {"density": [], "error": [], "seconds": []}
    for level in levels[:-1]:
        state.config = dataclasses.replace(state.config, **{str(config.budget_field): level})
        memory.cache = dict(start)
        out, seconds = timed()
        rows["density"].append(state.records[-1].density.double().mean(0).tolist())
        rows["error"].append(((out.float() - exact).square().sum((0, 2, 3)) / scale).tolist())
        if refresh > 1:  # the calls that follow plan nothing
            seconds = (seconds + (refresh - 1) * timed()[1]) / refresh
        rows["seconds"].append(seconds)
    state.end_run()
    return {"step": call.step, "layer": call.layer, "branch": call.branch, "transformer": call.transformer, **rows}


def curves_of(rows: list[dict[str, Any]], levels: tuple[float, ...], num_layers: int) -> Curves:
    """Average measured calls.

    Args:
        rows: of `measure_call`, all at the same levels.
        levels: these levels.
        num_layers: L.

    Returns:
        The curves.
    """
    heads = len(rows[0]["error"][0])
    error, density = np.zeros((num_layers, heads, len(levels))), np.ones((num_layers, heads, len(levels)))
    measured = np.zeros(num_layers, dtype=bool)
    for layer in sorted({row["layer"] for row in rows}):
        own = [row for row in rows if row["layer"] == layer]
        error[layer, :, :-1] = np.mean([row["error"] for row in own], 0).T
        density[layer, :, :-1] = np.mean([row["density"] for row in own], 0).T
        measured[layer] = True
    return Curves(tuple(levels), error, density, measured)


def _bare(config: MethodConfig) -> MethodConfig:
    """The settings alone: no warm-up, no per-head budgets, no place they are bound to."""
    settings = {"warmup_steps": 0.0, "warmup_layers": 0.0, "tuned_for": None, config.head_field: None}
    if getattr(config, "max_drift", None) is not None:  # one call knows no drift
        settings["max_drift"] = None
    return dataclasses.replace(config, **settings)
