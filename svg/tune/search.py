"""Finds where a slow measurement crosses a target, in a few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
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

    def __str__(self) -> str:
        over = "in every video" if self.worst else "in the mean"
        return {
            "min_psnr": f"PSNR >= {self.value:.4g} dB {over}",
            "max_lpips": f"LPIPS <= {self.value:.4g} {over}",
            "target_speedup": f"attention {self.value:.4g} times as fast {over}",
        }[self.kind]

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

    def scale(self, value: float) -> float:
        """A number on the scale on which costs are interpolated, dB or the logarithm of LPIPS; infinite where identical."""
        if self.kind == "max_lpips":
            return math.log(value) if value > 0 else -math.inf
        return value if value < _CAP else math.inf

    def margin(self, value: float) -> float:
        """How far a number is beyond the target; negative where it misses it."""
        return self.sign * (value - self.value)


@dataclass
class Search:
    """Bisection that also interpolates, over the logarithm of what may be saved; it keeps what it learnt.

    Args:
        measure: spending -> value, slow; near enough monotone.
        low, high: bounds of the spending.
        floor: what is spent in any case, below `low`.
        slope: by how much margins grow from one spending to e times as much, as others tell; None: not known.
        known: what was measured, spending -> value.
    """

    measure: Callable[[float], float]
    low: float
    high: float
    floor: float = 0.0
    slope: float | None = None
    known: dict[float, float] = field(default_factory=dict)

    def find(
        self, target: Target, start: float, rounds: int, close: float = 1.0, last_chance: bool = True
    ) -> float | None:
        """The least spending found that reaches a target (the most, where spending leads away from it).

        Args:
            target: what to reach.
            start: the first guess.
            rounds: measurements at most, beyond what is known.
            close: how many times the target's slack beyond it is good enough.
            last_chance: whether a last measurement that nothing reached the target before is at the bound.

        Returns:
            A spending that was measured and reaches the target, or None.
        """
        for left in reversed(range(rounds)):
            # A miss by a hair in the last but one leads to the bound: rather a little too far.
            guess = self._next(target, start, target.slack * (2 if left == 1 else close / 2), close)
            if guess is None:
                break
            if left == 0 and last_chance and not self._met(target):
                guess = self.high if target.rises else self.low
            self.look(guess)
        return self.best(target)

    def best(self, target: Target) -> float | None:
        """The least spending that is known to reach a target (the most, where spending leads away from it), or None."""
        met = self._met(target)
        return (min(met) if target.rises else max(met)) if met else None

    def estimate(self, target: Target, close: float = 1.0) -> float:
        """Where the target is likely reached, by half of what is good enough beyond it: a spending that need not be measured.

        Args:
            target: what to reach.
            close: how many times the target's slack beyond it is good enough.
        """
        best = self.best(target)
        if best is not None and target.margin(self.known[best]) <= close * target.slack:
            return best
        guess = self._next(target, self.low, target.slack * close / 2, close, inside=0.0)
        return self.nearest(target) if guess is None else guess

    def nearest(self, target: Target) -> float:
        """The known spending whose result is nearest to the target."""
        return min(self.known, key=lambda spent: abs(target.margin(self.known[spent])))

    def look(self, spent: float) -> float:
        """What a spending reaches, measured where it is not known."""
        if spent not in self.known:
            self.known[spent] = self.measure(spent)
        return self.known[spent]

    def first(self, start: float) -> float:
        """A guess, within the bounds."""
        return min(max(start, self.low), self.high)

    def growth(self, target: Target) -> float | None:
        """What `slope` is, between the two neighbours that are nearest to the target."""
        points = self._points(target)
        rising = [(a, b) for a, b in zip(points, points[1:]) if b[1] > a[1]]
        if not rising:
            return self.slope
        a, b = min(rising, key=lambda pair: abs(pair[0][1]) + abs(pair[1][1]))
        return (b[1] - a[1]) / (b[0] - a[0])

    def other_side(self, target: Target) -> float | None:
        """Where to measure so that the target lies between two measurements.

        Args:
            target: what lies between.

        Returns:
            A spending, or None where there are two already, or nothing is left on that side.
        """
        points, (low, high) = self._points(target), sorted(self._place(target, end) for end in (self.low, self.high))
        met = next((point for point in points if point[1] >= 0), None)
        if not points or (met is not None and any(margin < 0 for _, margin in points)):
            return None
        if met is None:
            guess = _beyond(points, high, target.slack, self.growth(target))
        else:
            guess = _before(met, low, high, -2 * target.slack, self.growth(target))
        return self._unknown(target, guess)

    def _met(self, target: Target) -> list[float]:
        return [spent for spent, value in self.known.items() if target.margin(value) >= 0]

    def _points(self, target: Target) -> list[tuple[float, float]]:
        """What is known, along the way on which margins grow: place, margin."""
        return sorted((self._place(target, spent), target.margin(value)) for spent, value in self.known.items())

    def _next(self, target: Target, start: float, height: float, close: float, inside: float = 0.2) -> float | None:
        """Where to measure next to be `height` beyond the target, or None where nothing is left to gain.

        Between two measurements it is at least a share `inside` of their distance away from either, lest it creep.
        """
        points, (low, high) = self._points(target), sorted(self._place(target, end) for end in (self.low, self.high))
        if not points:
            return self.first(start)
        if any(0 <= margin <= close * target.slack for _, margin in points):
            return None
        met = next((point for point in points if point[1] >= 0), None)
        missed = [point for point in points if point[1] < 0 and (met is None or point[0] < met[0])]
        if met is None:
            guess = _beyond(missed, high, height, self.slope)
        elif not missed:
            guess = _before(met, low, high, height, self.slope)
        else:
            guess = _crossing(missed[-1], met, target.slack * close / 2, inside, 1 - inside)
        return self._unknown(target, guess)

    def _place(self, target: Target, spent: float) -> float:
        """Where a spending is along the way on which margins grow."""
        return math.log(spent - self.floor) * (1 if target.rises else -1)

    def _unknown(self, target: Target, place: float) -> float | None:
        """The spending at a place, or None where it is measured."""
        spent = self.floor + math.exp(place if target.rises else -place)
        spent = min(max(round(spent, 4), self.low), self.high)
        return None if spent in self.known else spent


def _crossing(a: tuple[float, float], b: tuple[float, float], height: float, least: float, most: float) -> float:
    """Where the line through two points is at a height, as a share of their distance within [least, most]."""
    share = (height - a[1]) / (b[1] - a[1])
    return a[0] + min(max(share, least), most) * (b[0] - a[0])


def _beyond(missed: list[tuple[float, float]], high: float, height: float, slope: float | None) -> float:
    """A point between the last one and the bound: on the line through the last two if it rises, at most half-way."""
    last, room, least = missed[-1], high - missed[-1][0], 0.1
    if len(missed) > 1 and missed[-2][1] < last[1]:
        there = _crossing(missed[-2], last, height, 0.0, float("inf"))
    elif slope is not None:
        there, least = last[0] + (height - last[1]) / slope, 0.01
    else:
        return last[0] + 0.5 * room
    return min(max(there, last[0] + least * room), last[0] + 0.5 * room)


def _before(met: tuple[float, float], low: float, high: float, height: float, slope: float | None) -> float:
    """A point between the lower bound and one that reaches the target: by the slope, where that is known."""
    room = met[0] - low
    if room < 0.05 * (high - low):
        return low
    return low + 0.4 * room if slope is None else max(met[0] - (met[1] - height) / slope, low + 0.1 * room)
