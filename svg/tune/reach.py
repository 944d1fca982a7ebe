"""Searches lines of settings on some videos for what reaches a target at the least cost, and verifies it on others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .lines import Line
from .search import Search, Target

_VERIFICATIONS = 3
# Times the target's slack: how far beyond it is good enough in a search of lines, and on held-out videos.
_NEAR, _CLOSE = 2, 3

Trial = dict[str, Any]  # "value", what its videos reach of the target; "psnr"; and whatever `cost` reads


@dataclass(frozen=True)
class _Found:
    """The best setting of a line, the search that knows the line, and how good it is."""

    line: Line
    search: Search
    spent: float | None = None
    merit: float = -math.inf


class Reach:
    """Finds settings that reach a target.

    Args:
        target: what to reach.
        rounds: settings of a line that are tried in its search.
        search, verify: line, cost of a run -> trial, slow: on the videos of the search, and on those held out.
        cost: what a trial cost.
        tell: told what begins.
    """

    def __init__(
        self,
        target: Target,
        rounds: int,
        search: Callable[[Line, float], Trial],
        verify: Callable[[Line, float], Trial],
        cost: Callable[[Trial], float],
        tell: Callable[[str], None],
    ):
        self._target, self._rounds = target, rounds
        self._searched, self._verified = search, verify
        self._cost, self._tell = cost, tell

    def best(
        self, lines: Sequence[Line], start: float, *then: Callable[[Line], Sequence[Line]]
    ) -> tuple[Trial, list[Trial]]:
        """The best setting of some lines on held-out videos.

        Args:
            lines: those to search, from the safest one on.
            start: where the first search begins: the cost of a run.
            then: the best line so far -> more lines, searched in the same way; one after the other.

        Returns:
            A trial, "met" in it telling whether it reaches the target, of the line that the search found best, and all
            trials of that line on the held-out videos; the first has nothing else where no setting was found.
        """
        found = self._search(lines, start)
        for more in then if found.spent is not None else ():
            found = self._search(more(found.line), found.spent or start, found)
        if found.spent is None:
            return {"family": found.line.family, "met": False}, []
        tried: dict[float, Trial] = {}

        def measure(spent: float) -> float:
            self._tell(f"verifying {_named(found.line)}, cost {spent:.4g}")
            tried[spent] = self._verified(found.line, spent)
            return tried[spent]["value"]

        # Held-out videos are easier or harder than the others: how fast they change along the line is what these tell.
        held = Search(measure, *found.line.bounds, found.line.floor, found.search.growth(self._target))
        spent = held.find(self._target, found.spent, _VERIFICATIONS, close=_CLOSE, last_chance=False)
        if self._target.rises and (other := held.other_side(self._target)) is not None:
            held.look(other)
            spent = held.best(self._target)
        shown = tried[spent if spent is not None else next(reversed(tried))]
        return {**shown, "met": spent is not None}, list(tried.values())

    def _search(self, lines: Sequence[Line], start: float, best: _Found | None = None) -> _Found:
        """The best setting on the videos of the search, line after line until one is worse than the best before."""
        for line in lines:
            if best is not None and self._is_dearer(line, best):
                continue
            found = self._along(line, start, best)
            if best is not None and not found.merit > best.merit:
                break
            best, start = found, found.spent if found.spent is not None else start
        assert best is not None, "there is a line"
        return best

    def _is_dearer(self, line: Line, best: _Found) -> bool:
        """Whether all of a line costs more than what was found."""
        return self._target.rises and best.spent is not None and line.bounds[0] >= best.spent

    def _along(self, line: Line, start: float, before: _Found | None) -> _Found:
        self._tell(f"searching {_named(line)}")
        trials: dict[float, Trial] = {}

        def measure(spent: float) -> float:
            trials[spent] = self._searched(line, spent)
            return trials[spent]["value"]

        slope = None if before is None else before.search.growth(self._target)
        search = Search(measure, *line.bounds, line.floor, slope)
        left = self._rounds
        if before is not None and before.spent is not None and self._target.rises:
            # What falls short by more than a hair at the cost of the line before needs more than that.
            if self._target.margin(search.look(search.first(start))) < -self._target.slack:
                return _Found(line, search)
            left -= 1
        spent = search.find(self._target, start, left, close=_NEAR, last_chance=not self._target.rises)
        if not self._target.rises:  # what takes as long as it may: the better video is better
            return _Found(line, search, spent, -math.inf if spent is None else trials[spent]["psnr"])
        return _Found(line, search, search.estimate(self._target, _NEAR), -self._cost_of(search, trials))

    def _cost_of(self, search: Search, trials: dict[float, Trial]) -> float:
        """What a line costs exactly at the target: between its trials, or on the slope through the nearest one."""
        spent = search.nearest(self._target)
        cost = self._cost(trials[spent])
        exact = cost_at(self._target, [(one["value"], self._cost(one)) for one in trials.values()])
        growth = search.growth(self._target)
        if exact is None and growth is not None:
            saved = 1 - math.exp(-self._target.margin(search.known[spent]) / growth)
            exact = cost * (1 - saved * (1 - search.floor / spent))
        return cost if exact is None else exact


def cost_at(target: Target, points: Sequence[tuple[float, float]]) -> float | None:
    """What a target costs exactly, between the trials that are next to it on either side.

    Args:
        target: of a quality.
        points: value and cost of each trial; what is identical to dense says nothing of the way there.

    Returns:
        The cost, linear in dB or in the logarithm of LPIPS; None where all trials are on one side.
    """
    points = [point for point in points if math.isfinite(target.scale(point[0]))]
    met = [point for point in points if target.margin(point[0]) >= 0]
    missed = [point for point in points if target.margin(point[0]) < 0]
    if not met or not missed:
        return None
    above, below = (min(side, key=lambda point: abs(target.margin(point[0]))) for side in (met, missed))
    ends = [target.scale(point[0]) for point in (below, above)]
    share = (target.scale(target.value) - ends[0]) / (ends[1] - ends[0])
    return below[1] + share * (above[1] - below[1])


def _named(line: Line) -> str:
    return f"{line.family} budgets, {line}"
