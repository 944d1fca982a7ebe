"""What is kept of one attention call: its record for reports, and what an observer sees."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .guard import GuardOutcome


class Timer:
    """Time of one attention call: CUDA events on a GPU, read only when asked, so the call never waits."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._start = self._end = self._mark()

    def stop(self) -> None:
        self._end = self._mark()

    def seconds(self) -> float:
        """Elapsed seconds between construction and stop; waits for the GPU to get there."""
        if not self._cuda:
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000

    def _mark(self) -> Any:
        """Seconds, or an event of the current stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Elapsed:
    """A timer that has been read."""

    value: float

    def seconds(self) -> float:
        """Elapsed seconds."""
        return self.value


class AttentionRecord(NamedTuple):
    """One attention call; tensors stay on their device until a report reads them.

    Args:
        step: index of the step.
        layer: index of the layer.
        branch: guidance branch.
        density: float [B, H], computed share of the map.
        kind: int [B, H], 0 spatial and 1 temporal, or None for methods without head kinds.
        dense: whether the call computed everything because its step or layer stays dense.
        timer: the call's timer, read or not, or None when timing is off.
        precision: what attention was quantised to, or None where it was not.
        emulated: whether that precision's numbers were computed by wider units.
        guarded: what the guard saw, or None where it was off or nothing was quantised.
        reused: whether the call took an earlier call's clustering and map.
    """

    step: int
    layer: int
    branch: str
    density: Tensor
    kind: Tensor | None
    dense: bool
    timer: Timer | Elapsed | None
    precision: str | None = None
    emulated: bool = False
    guarded: GuardOutcome | None = None
    reused: bool = False

    def read(self) -> AttentionRecord:
        """The record with its numbers on the CPU, to be sent to another process."""
        timer = None if self.timer is None else Elapsed(self.timer.seconds())
        kind = None if self.kind is None else self.kind.cpu()
        guarded = None if self.guarded is None else self.guarded.cpu()
        return self._replace(density=self.density.cpu(), kind=kind, guarded=guarded, timer=timer)

    @property
    def seconds(self) -> float | None:
        return None if self.timer is None else self.timer.seconds()


@dataclass(frozen=True)
class ObservedAttention:
    """One attention call as an observer sees it, right after it ran.

    Args:
        layer: index of the layer.
        q, k, v: float [B, H, S, D].
        text_mask: bool [B, text_tokens], or None.
        out: float [B, H, S, D].
        plan: the method's Plan, or None where the call was dense or the method has none.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    text_mask: Tensor | None
    out: Tensor
    plan: Any
