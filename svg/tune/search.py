"""Finds where a slow measurement crosses a target, in a few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

_CAP = 100.0  # dB: what "identical" counts as among PSNRs
_SLACK = {"min_psnr": 0.3, "max_lpips": 0.04, "target_speedup": 0.03}  # dB, and shares of the target


@dataclass(frozen=True)
class Target:
    """What a video must reach.

    Args:
        kind: "min_psnr" (dB), "max_lpips" or "target_speedup" (of attention: time on a GPU, density elsewhere).
        value: the number.
        worst: whether every video must reach it, not their mean.

    Raises:
        ValueError: a number that nothing reaches, or that everything does.
    """

    kind: str
    value: float
    worst: bool = False

    def __post_init__(self):
        least = {"min_psnr": 0, "max_lpips": 0, "target_speedup": 1}[self.kind]
        if not (math.isfinite(self.value) and self.value > least):
            raise ValueError(f"--{self.kind.replace('_', '-')} must be a finite number > {least}, got {self.value}")

    @property
    def sign(self) -> int:
        """1 where more is better."""
        return -1 if self.kind == "max_lpips" else 1

    @property
    def rises(self) -> bool:
        """Whether spending more comes closer to it."""
        return self.kind != "target_speedup"

    @property
    def slack(self) -> float:
        """How far beyond the target is as good as on it."""
        return _SLACK[self.kind] * (1 if self.kind == "min_psnr" else self.value)

    def of(self, cells: list[dict[str, Any]], dense: list[dict[str, Any]], on_gpu: bool) -> float:
        """The target's number over some finished cells and their dense references."""
        values = [self._one(cell, reference, on_gpu) for cell, reference in zip(cells, dense)]
        if self.worst:
            return min(values) if self.sign > 0 else max(values)
        return sum(values) / len(values)

    def _one(self, cell: dict[str, Any], dense: dict[str, Any], on_gpu: bool) -> float:
        if self.kind == "target_speedup":
            return (
                dense["seconds"]["attention"] / cell["seconds"]["attention"]
                if on_gpu
                else 1 / cell["density"]["all_calls"]
            )
        if self.kind == "min_psnr":
            return min(float(cell["quality"]["psnr"]["mean"]), _CAP)
        if cell["quality"]["lpips"]["mean"] is None:
            raise ValueError(f"--max-lpips needs LPIPS: {cell['quality']['lpips']['note']}")
        return cell["quality"]["lpips"]["mean"]

    def moved(self, value: float) -> Target:
        """The same target at another number, kept where a target may be."""
        least = 1.001 if self.kind == "target_speedup" else self.value / 10
        return replace(self, value=max(value, least))

    def margin(self, value: float) -> float:
        """How far a number is beyond the target; negative where it misses it."""
        return self.sign * (value - self.value)


@dataclass
class Search:
    """Bisection that also interpolates; it keeps what it learnt for another target.

    Args:
        measure: spending -> value, slow; near enough monotone.
        low, high: bounds of the spending.
        known: what was measured, spending -> value.
    """

    measure: Callable[[float], float]
    low: float
    high: float
    known: dict[float, float] = field(default_factory=dict)

    def find(self, target: Target, start: float, rounds: int) -> float | None:
        """The least spending found that reaches a target (the most, where spending leads away from it).

        Args:
            target: what to reach.
            start: the first guess.
            rounds: measurements at most, beyond what is known.

        Returns:
            A spending that was measured and reaches the target, or None.
        """
        for left in reversed(range(rounds)):
            # A miss by a hair in the last but one leads to the bound: rather a little too far.
            guess = self._next(target, start, target.slack * (2 if left == 1 else 0.5))
            if guess is None:
                break
            if left == 0 and not self._met(target):
                guess = self.high if target.rises else self.low  # the last chance
            if guess not in self.known:
                self.known[guess] = self.measure(guess)
        met = self._met(target)
        return (min(met) if target.rises else max(met)) if met else None

    def _met(self, target: Target) -> list[float]:
        return [spent for spent, value in self.known.items() if target.margin(value) >= 0]

    def _next(self, target: Target, start: float, height: float) -> float | None:
        """Where to measure next to be `height` beyond the target, or None where nothing is left to gain."""
        way = 1 if target.rises else -1  # along which margins grow
        points = sorted((way * spent, target.margin(value)) for spent, value in self.known.items())
        low, high = sorted((way * self.low, way * self.high))
        if not points:
            return min(max(start, self.low), self.high)
        if any(0 <= margin <= target.slack for _, margin in points):
            return None
        met = next((point for point in points if point[1] >= 0), None)
        missed = [point for point in points if point[1] < 0 and (met is None or point[0] < met[0])]
        if met is None:
            guess = _beyond(missed, high, height)
        elif not missed:
            guess = low if met[0] - low < 0.05 * (high - low) else low + 0.4 * (met[0] - low)
        else:
            guess = _crossing(missed[-1], met, target.slack / 2, 0.1, 0.9)
        guess = round(way * guess, 4)
        return None if guess in self.known else guess


def _crossing(a: tuple[float, float], b: tuple[float, float], height: float, least: float, most: float) -> float:
    """Where the line through two points is at a height, as a share of their distance within [least, most]."""
    share = (height - a[1]) / (b[1] - a[1])
    return a[0] + min(max(share, least), most) * (b[0] - a[0])


def _beyond(missed: list[tuple[float, float]], high: float, height: float) -> float:
    """A point between the last one and the bound: on the line through the last two if it rises, at most half-way."""
    last, room = missed[-1], high - missed[-1][0]
    if len(missed) > 1 and missed[-2][1] < last[1]:
        there = _crossing(missed[-2], last, height, 0.0, float("inf"))
        return min(max(there, last[0] + 0.1 * room), last[0] + 0.5 * room)
    return last[0] + 0.5 * room
