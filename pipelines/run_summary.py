"""What the last run of a pipeline was worth, for people: a short table, in a terminal or a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import torch

from svg.words import speed

from .attach import attached, report


@dataclass(frozen=True)
class RunSummary:
    """The last run of an accelerated pipeline in a few numbers; printing it gives a table, a notebook shows one too.

    Args:
        method: name of the method.
        density: computed share of the attention map, mean over all calls, those of the warm-up included.
        sparse_density: the same over the sparse calls; None where there were none.
        steps: of the run, those of both where there are two transformers.
        dense_steps: of them, those in which every call was dense.
        attention_share: share of the transformer's time that attention took.
        attention_speedup: a dense call's time over a sparse one's, both means of this very run; None where one kind is
            missing, as without a warm-up, or dense calls are in 8 bits.
        speedup: estimated speed-up of the transformer over a run in which every call takes what this run's dense ones
            took; None as before.
        recomputed: heads that the guard computed again, as a share of those it watched; None without a guard.
        linears_back: linears in 8 bits that the guard took back to their own precision; None without such a guard.
        peak_memory: bytes torch held at most on the GPU since its statistics were last reset; None on a CPU.
        transformer_seconds: in the transformers' forwards.
    """

    method: str
    density: float
    sparse_density: float | None
    steps: int
    dense_steps: int
    attention_share: float | None
    attention_speedup: float | None
    speedup: float | None
    recomputed: float | None
    linears_back: int | None
    peak_memory: int | None
    transformer_seconds: float

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def _repr_html_(self) -> str:
        cells = (f"<tr><th style='text-align:left'>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
                 for label, value in self._rows())  # fmt: skip
        return f"<table>{''.join(cells)}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        watched = [] if self.recomputed is None else [f"{_percent(self.recomputed)} of the heads computed again"]
        watched += [] if self.linears_back is None else [f"linears in their own precision again: {self.linears_back}"]
        guard = ", ".join(watched) or "off"
        memory = "-" if self.peak_memory is None else f"{self.peak_memory / 2**30:.1f} GiB"
        return [
            ("method", self.method),
            ("computed, all calls", _percent(self.density)),
            ("computed, sparse calls", _percent(self.sparse_density)),
            ("dense steps", _dense_steps(self.dense_steps, self.steps)),
            ("attention's share of the time", _percent(self.attention_share)),
            ("attention, against this run's dense calls", speed(self.attention_speedup)),
            ("transformer, estimated", speed(self.speedup)),
            ("guard", guard),
            ("peak GPU memory", memory),
        ]


def summary(pipe: Any) -> RunSummary:
    """Say what the last run of an accelerated pipeline was worth.

    Args:
        pipe: an accelerated pipeline, after a run.

    Returns:
        A RunSummary: print it, show it in a notebook, or read its fields.

    Raises:
        ValueError: the pipeline isn't accelerated, or has not run yet.

    Example:
        svg.accelerate(pipe)
        video = pipe(prompt).frames[0]
        print(svg.summary(pipe))
    """
    hooks = attached(pipe)
    if not any(hook.state.records for hook in hooks.values()):
        raise ValueError("pipe must have run since svg.accelerate, got none: call pipe(...) first")
    found = report(pipe)
    parts = [part for part in found["transformers"].values() if part["calls"]["total"]]
    seconds = sum(part["transformer_seconds"] for part in parts)
    attention, as_dense, speedup = _attention(parts)
    if found["config"].get("warmup_precision", "native") != "native":  # this run's dense calls are no baseline
        as_dense, speedup = None, None
    density = _weighted(parts, "all_calls", "total")
    assert density is not None  # some call was recorded
    whole = None
    if attention is not None and as_dense is not None and seconds:
        whole = (seconds - attention + as_dense) / seconds
    guards = [part["quantised"]["guard"] for part in parts if part["quantised"] and part["quantised"]["guard"]]
    watched = sum(guard["head_calls"] for guard in guards)
    linears = [part["linears"]["guard"] for part in parts if part["linears"] and part["linears"]["guard"]]
    return RunSummary(
        method=found["config"]["method"],
        density=density,
        sparse_density=_weighted(parts, "sparse_calls", "sparse"),
        steps=sum(part["steps"]["total"] for part in parts),
        dense_steps=sum(part["steps"]["dense"] for part in parts),
        attention_share=attention / seconds if attention is not None and seconds else None,
        attention_speedup=speedup,
        speedup=whole,
        recomputed=sum(guard["recomputed"] for guard in guards) / watched if watched else None,
        linears_back=sum(len(guard["own_precision"]) for guard in linears) if linears else None,
        peak_memory=_peak_memory(hooks),
        transformer_seconds=seconds,
    )


def _attention(parts: list[dict[str, Any]]) -> tuple[float | None, float | None, float | None]:
    """Seconds in attention, seconds it would have taken dense, and one dense call's time over a sparse one's."""
    timed = [part for part in parts if part["attention_seconds"] is not None]
    if not timed:
        return None, None, None
    seconds = {kind: sum(part["attention_seconds"][kind] for part in timed) for kind in ("total", "dense", "sparse")}
    calls = {kind: sum(part["calls"][kind] for part in timed) for kind in ("total", "dense", "sparse")}
    if not (calls["dense"] and calls["sparse"]):
        return seconds["total"], None, None
    dense, sparse = (seconds[kind] / calls[kind] for kind in ("dense", "sparse"))
    return seconds["total"], dense * calls["total"], dense / sparse


def _weighted(parts: list[dict[str, Any]], density: str, calls: str) -> float | None:
    rows = [(part["density"][density], part["calls"][calls]) for part in parts if part["calls"][calls]]
    return sum(value * count for value, count in rows) / sum(count for _, count in rows) if rows else None


def _peak_memory(hooks: dict[str, Any]) -> int | None:
    # A dense call's density is a CPU tensor wherever it ran, so one record alone does not tell.
    devices = {record.density.device for hook in hooks.values() for record in hook.state.records}
    return next((torch.cuda.max_memory_allocated(device) for device in devices if device.type == "cuda"), None)


def _dense_steps(dense: int, steps: int) -> str:
    hint = {0: ", every step was sparse", steps: ", no step was sparse"}.get(dense, "")
    return f"{dense} of {steps}{hint}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
