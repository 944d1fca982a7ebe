"""Spends a budget where the error per cost is largest: the optimum of a Lagrangian over the curves of heads or layers.

    minimise  sum_lu weight_lu * error_lu(x_lu)   subject to   cost <= budget
    cost = sum over layers of: dense                                    where every unit has the last level
                               plan + per_density * sum_u density_lu    otherwise

A unit is a head, or a layer. At a price of cost every unit chooses for itself and every layer between its units' choices
and dense attention; what comes out is the least error at its own cost (Everett 1963). Units whose next level still fits
take what is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .curves import Curves, typical

_BISECTIONS = 60


@dataclass(frozen=True)
class Cost:
    """What one attention call costs.

    Args:
        plan: of a sparse call, whatever it computes.
        per_density: of one unit, a head or a layer, at density 1.
        dense: of a dense call.
        unit: "seconds" or "density".
        kept: what is left of `plan` where a call takes an earlier one's map; None: not known.
    """

    plan: float
    per_density: float
    dense: float
    unit: str
    kept: float | None = None

    def shared(self, refresh: int) -> Cost:
        """The same where so many calls share a map."""
        assert self.kept is not None, "what a call takes that plans nothing was measured"
        return replace(self, plan=self.kept + (self.plan - self.kept) / refresh)

    def of_layers(self, density: np.ndarray) -> np.ndarray:
        """Cost of each layer, [L], at densities [L, U]; a layer at density 1 in every unit runs dense."""
        sparse = self.plan + self.per_density * density.sum(1)
        return np.where((density == 1).all(1), self.dense, sparse)


@dataclass(frozen=True)
class Problem:
    """Curves in one currency of error, and what things cost.

    Args:
        curves: of heads or layers.
        weight: float64 [L, U], how much a unit's error matters.
        cost: of a call.
        free: bool [L], layers that may be sparse at all; the others run dense.
        allowed: bool [n], levels that may be chosen; None: all. Dense attention may be where it is no dearer.
    """

    curves: Curves
    weight: np.ndarray
    cost: Cost
    free: np.ndarray
    allowed: np.ndarray | None = None

    @property
    def error(self) -> np.ndarray:
        """Weighted error float64 [L, U, n]."""
        return self.curves.error * self.weight[:, :, None]

    def total(self, choice: np.ndarray) -> tuple[float, float]:
        """Cost as a share of dense attention in every layer, and weighted error, of a choice int64 [L, U]."""
        density, error = (_pick(x, choice) for x in (self.curves.density, self.error))
        # The last level is dense by definition, also where a lower one happens to compute everything.
        density = np.where(choice == len(self.curves.levels) - 1, 1.0, np.minimum(density, 1 - 1e-9))
        return float(self.cost.of_layers(density).sum() / (len(choice) * self.cost.dense)), float(error.sum())


@dataclass(frozen=True)
class Allocation:
    """A level for every unit.

    Args:
        choice: int64 [L, U], index into the levels.
        levels: the levels.
        cost: share of what dense attention in every layer costs.
        error: weighted.
        heads: of a unit.
    """

    choice: np.ndarray
    levels: tuple[float, ...]
    cost: float
    error: float
    heads: int = 1

    def table(self) -> tuple[tuple[float, ...], ...]:
        """Budgets [layers][heads], as a config takes them."""
        return tuple(tuple(self.levels[index] for index in np.repeat(row, self.heads)) for row in self.choice)


def at_price(problem: Problem, price: float) -> Allocation:
    """Least error + price * cost, cost in its own unit.

    Args:
        problem: curves, weights and costs.
        price: >= 0, error one is willing to take for a unit of cost.

    Returns:
        The allocation; among equals the cheaper one.

    Source: Everett, Generalized Lagrange Multiplier Method (Operations Research 11, 1963), theorem 1.
    """
    cost, curves = problem.cost, problem.curves
    score = problem.error + price * cost.per_density * curves.density  # [L, U, n]
    if problem.allowed is not None:
        score = np.where(problem.allowed, score, np.inf)
    choice = score.argmin(-1)
    sparse = price * cost.plan + score.min(-1).sum(1)
    # An error of exactly nothing at price 0 is worth any cost: a tie then goes to the sparse side.
    better = price * cost.dense < sparse
    if problem.allowed is not None and not problem.allowed[-1]:
        better = cost.dense <= cost.of_layers(_pick(curves.density, choice))
    dense = ~problem.free | better | (choice == len(curves.levels) - 1).all(1)
    choice[dense] = len(curves.levels) - 1
    return _allocation(problem, choice)


def within(problem: Problem, budget: float) -> Allocation:
    """The least error found for a cost.

    Args:
        problem: curves, weights and costs.
        budget: upper bound on the cost, as a share of dense attention in every layer.

    Returns:
        The allocation; the cheapest one there is where the budget is below it.
    """
    low, high = 0.0, 1.0
    while at_price(problem, high).cost > budget and high < 1e30:
        high *= 8
    found = at_price(problem, high)
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5 if low else high / 64
        there = at_price(problem, middle)
        if there.cost > budget:
            low = middle
        else:
            high = middle
            found = min(found, there, key=lambda one: (one.error, one.cost))
        if high < 1e-30:
            break
    return _fill(problem, found, budget)


def bounded(problem: Problem, budget: float, always: float, factor: float) -> Problem:
    """The same problem with levels near the one that all units could have at that cost.

    Curves of a few prompts exaggerate how much units differ: what a table may do is bounded.

    Args:
        problem: curves, weights and costs.
        budget: cost, as a share of dense attention in every layer.
        always: the part of a level that is spent whatever it is.
        factor: >= 1, by how much the rest of a level may differ from that of one for all.
    """
    rest = uniform_value(problem, budget) - always
    levels = np.array(problem.curves.levels) - always
    allowed = (levels * factor >= rest) & (levels <= rest * factor)
    return replace(problem, allowed=allowed)


def uniform_cost(problem: Problem, value: float) -> float:
    """What one value for all units costs, as a share of dense attention in every layer, read off the curves."""
    levels = problem.curves.levels
    density = np.apply_along_axis(lambda row: np.interp(value, levels, row), -1, problem.curves.density)
    density = np.minimum(density, 1 - 1e-9)
    density[~problem.free] = 1
    return float(problem.cost.of_layers(density).sum() / (len(density) * problem.cost.dense))


def uniform_value(problem: Problem, cost: float) -> float:
    """The value for all units that costs so much; the lowest or highest level where none does."""
    low, high = problem.curves.levels[0], problem.curves.levels[-1]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if uniform_cost(problem, middle) < cost else (low, middle)
    return (low + high) / 2


def fit_cost(rows: list[dict[str, Any]], dense_seconds: list[float], on_gpu: bool) -> tuple[Cost, list[str]]:
    """What a call costs: measured seconds on a GPU; elsewhere density, because sparse references have no speed.

    Args:
        rows: of `measure_call`.
        dense_seconds: of dense calls.
        on_gpu: whether they ran on one.

    Returns:
        The cost, and notes on it.
    """
    heads = len(rows[0]["density"][0])
    by_density = Cost(0.0, 1.0, float(heads), "density")
    if not on_gpu:
        return by_density, ["cost is density: on a CPU sparse attention has no speed to measure"]
    x = [np.mean([sum(row["density"][level]) for row in rows]) for level in range(len(rows[0]["density"]))]
    # Guidance branches may differ, where the second takes what the first one planned: a run pays for both.
    branches = {row["branch"] for row in rows}
    by_branch = [[row["seconds"] for row in rows if row["branch"] == branch] for branch in sorted(branches)]
    y = np.mean([np.median(seconds, 0) for seconds in by_branch], 0)
    slope, start = np.polyfit(x, y, 1)
    if slope <= 0:
        return by_density, ["cost is density: the time of a call did not grow with it, so it is too short to fit"]
    cost = Cost(max(0.0, float(start)), float(slope), float(np.median(dense_seconds)), "seconds")
    known = [row["kept_seconds"] for row in rows if "kept_seconds" in row]
    kept = [seconds - cost.per_density * density for seconds, density in known]
    if kept:
        cost = replace(cost, kept=min(max(0.0, float(np.median(kept))), cost.plan))
    note = (
        f"a sparse call takes {1e3 * cost.plan:.3g} ms and {1e3 * cost.per_density * heads:.3g} ms more at density 1, "
    )
    return cost, [f"{note}a dense one {1e3 * cost.dense:.3g} ms"]


def weights_of(curves: Curves, effects: list[dict[str, Any]], probe: float | None) -> np.ndarray:
    """How much the error of a head or layer matters: the change of the model's prediction for each unit of it.

    Args:
        curves: of heads or layers.
        effects: of `svg.tune.calibrate`: {"layer", "heads", "effect"} each, effect being the squared relative change of
            the prediction when these heads alone are at the probed level.
        probe: that level, or None without effects.

    Returns:
        float64 [L, U]; 1 everywhere without effects. Of layers it is the geometric mean of the effects, as of the errors.
    """
    weight = np.ones(curves.error.shape[:2])
    if not effects:
        return weight
    level = curves.levels.index(probe)
    weight[:] = np.nan
    for layer, heads in {(row["layer"], tuple(row["heads"])) for row in effects}:
        own = np.array([row["effect"] for row in effects if (row["layer"], tuple(row["heads"])) == (layer, heads)])
        units = sorted({head // curves.heads for head in heads})
        lost = curves.error[layer, units, level].sum()
        if lost > 0:
            weight[layer, units] = (own.mean() if curves.heads == 1 else typical(own)) / lost
    return np.where(np.isnan(weight), np.nanmean(weight), weight)


def _fill(problem: Problem, found: Allocation, budget: float) -> Allocation:
    """Spend what is left, one unit at a time, where a unit of cost removes most error."""
    curves, whole = problem.curves, len(problem.curves) * problem.cost.dense
    error, blocked = problem.error, np.zeros(found.choice.shape, dtype=bool)
    while True:
        after = np.minimum(found.choice + 1, len(found.levels) - 1)
        spent = _pick(curves.density, after) - _pick(curves.density, found.choice)
        spent = spent * problem.cost.per_density / whole
        gained = _pick(error, found.choice) - _pick(error, after)
        fits = (gained > 0) & (found.cost + spent <= budget) & ~blocked & problem.free[:, None]
        if problem.allowed is not None:
            fits &= problem.allowed[after]
        if not fits.any():
            return found
        rate = np.where(fits, gained / np.maximum(spent, 1e-12), -1.0)
        unit = np.unravel_index(rate.argmax(), rate.shape)
        choice = found.choice.copy()
        choice[unit] = after[unit]
        there = _allocation(problem, choice)
        if there.cost > budget:  # its layer would become dense
            blocked[unit] = True
        else:
            found = there


def _allocation(problem: Problem, choice: np.ndarray) -> Allocation:
    cost, error = problem.total(choice)
    return Allocation(choice, problem.curves.levels, cost, error, problem.curves.heads)


def _pick(values: np.ndarray, choice: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, choice[:, :, None], -1)[:, :, 0]
