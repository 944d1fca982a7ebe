"""Clusterings and maps that several calls share, and how far queries and keys have drifted since they were made.

How far: evenly spread video tokens of the clustering call are kept, and every later call compares its own with them:

    drift = max over samples, heads, Q and K of ||x - kept|| / ||kept - mean(kept)||

It stays on the device. `RunState.begin_forward`, which waits for the forward before anyway, reads the drifts of that
forward together, so what a call does depends on earlier forwards alone and never on how far the device happens to be. A
call's own drift is therefore foreseen: what a call added at the last reading, times the calls since the clustering.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.state import LayerState
from .near.config import NearConfig
from .svg2.config import SVG2Config

ROWS = 64  # sampled tokens of a head


class Sample(NamedTuple):
    """Tokens of a clustering call.

    Args:
        rows: fp32 [2, B, H, R, D], of Q and of K.
        spread: fp32 [2, B, H], norm of their differences from their mean.
    """

    rows: Tensor
    spread: Tensor


class SharedClustering(NamedTuple):
    """What calls share.

    Args:
        plan: the method's, of the call that clustered.
        chosen: the method's choice, such as blocks and their map.
        calls: calls that took it.
        sample: its tokens, or None where no drift is measured.
    """

    plan: Any
    chosen: Any
    calls: int
    sample: Sample | None


def still_good(state: LayerState, config: SVG2Config | NearConfig) -> SharedClustering | None:
    """What an earlier call left, if it serves this one: made fewer than `refresh` calls ago, within `max_drift`."""
    kept = state.cache.get("kept")
    if kept is None or kept.calls >= config.refresh:
        return None
    if config.max_drift is None:
        return kept
    foreseen = state.cache.get("drift_a_call", torch.inf) * kept.calls
    return kept if foreseen <= config.max_drift else None


def remember(
    state: LayerState,
    config: SVG2Config | NearConfig,
    kept: SharedClustering | None,
    plan: Any,
    chosen: Any,
    q: Tensor,
    k: Tensor,
) -> None:
    """Keep what later calls may share, and note how far this one is from the last clustering.

    Args:
        state: the layer's state.
        config: the method's settings.
        kept: what this call shared with an earlier one, or None where it clustered.
        plan: of this call.
        chosen: its blocks and their map.
        q, k: float [B, H, V, D], the video's.
    """
    if config.refresh == 1:
        return
    last, sample = state.cache.get("kept"), None
    if config.max_drift is not None:
        rows = sample_rows(q, k)
        if last is not None:
            moved = drift(rows, last.sample)
            if state.peers is not None:  # all cluster anew, or none
                moved = state.peers.largest(moved)
            state.reads.add(moved, partial(_note_drift, state, last.calls))
        sample = kept.sample if kept is not None else with_spread(rows)
    kept = SharedClustering(plan, chosen, 0, sample) if kept is None else kept
    state.cache["kept"] = kept._replace(calls=kept.calls + 1)


def _note_drift(state: LayerState, calls: int, measured: list[float]) -> None:
    state.cache["drift_a_call"] = measured[0] / calls


def sample_rows(q: Tensor, k: Tensor) -> Tensor:
    """Evenly spread tokens [2, B, H, R, D]; an odd step meets every column of a frame of even width."""
    step = max(1, q.shape[2] // ROWS)
    step += step % 2 == 0
    return torch.stack([x[:, :, ::step][:, :, :ROWS] for x in (q, k)])


def with_spread(rows: Tensor) -> Sample:
    """A sample of tokens [2, B, H, R, D] and its spread."""
    rows = rows.float()
    return Sample(rows, torch.linalg.vector_norm(rows - rows.mean(-2, keepdim=True), dim=(-2, -1)))


def drift(rows: Tensor, sample: Sample) -> Tensor:
    """How far tokens [2, B, H, R, D] are from a sample, as a share of its spread: the largest, fp32 []."""
    moved = torch.linalg.vector_norm(rows - sample.rows, dim=(-2, -1))
    return (moved / sample.spread.clamp_min(torch.finfo(torch.float32).tiny)).amax()
