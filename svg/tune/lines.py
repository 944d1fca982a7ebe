"""Lines of settings from little to all: one budget for all, or one of each head or layer, at a number of dense steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import MethodConfig
from ..config.base import count
from .allocate import Allocation, Problem, bounded, uniform_cost, uniform_value, within

_FACTOR = 3.0  # by how much a layer's budget may differ from one for all


@dataclass(frozen=True)
class Line:
    """Settings along one line, by what a whole run costs as a share of dense attention in all its steps.

    Args:
        family: "tuned" or "uniform".
        dense_steps: of a run, its first ones.
        config: cost of a run -> settings.
        bounds: least and largest cost of a run.
        floor: the part of it that dense steps cost.
        refresh: calls of a layer that share a map; None where the method has no such setting.
        others: names and values of settings that the method has tuned too, where they are not the given ones.
    """

    family: str
    dense_steps: int
    config: Callable[[float], MethodConfig]
    bounds: tuple[float, float]
    floor: float
    refresh: int | None = None
    others: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        shared = f", refresh {self.refresh}" if (self.refresh or 1) > 1 else ""
        return dense_steps(self.dense_steps) + shared + "".join(f", {name} {value}" for name, value in self.others)


@dataclass(frozen=True)
class Steps:
    """The steps of a run, of which the first ones are dense.

    Args:
        total: all of them.
        dense: those that are dense, fewer than all.
    """

    total: int
    dense: int

    def whole(self, share: float) -> float:
        """What a run costs whose sparse steps cost a share of dense ones."""
        return (self.dense + (self.total - self.dense) * share) / self.total

    def share(self, whole: float) -> float:
        """What sparse steps cost in a run that costs so much."""
        return (whole * self.total - self.dense) / (self.total - self.dense)


def dense_steps_to_try(config: MethodConfig, total: int, keep: bool) -> list[int]:
    """Numbers of dense steps, the most first: the config's own, half of it, one, none.

    Args:
        config: settings of the method, whose warm-up is by steps.
        total: steps of a run.
        keep: whether the config's own is the only one.
    """
    own = count(config.warmup_steps, total)
    return [own] if keep else sorted({own, own // 2, min(own, 1), 0}, reverse=True)


def sharing(problem: Problem, config: MethodConfig, calls: int) -> tuple[Problem, MethodConfig]:
    """The same problem and settings where so many calls of a layer share a map.

    Args:
        problem: curves, weights and costs where none share.
        config: the settings that stay.
        calls: how many.
    """
    cost = problem.cost.shared(calls)
    return dataclasses.replace(problem, cost=cost), dataclasses.replace(config, refresh=calls)


def refreshes_to_try(problem: Problem, config: MethodConfig, steps: Steps) -> list[int]:
    """Numbers of calls that may share a map, two, four and eight; none where that saves no time.

    Args:
        problem: curves, weights and costs where none share.
        config: the settings that stay.
        steps: of a run.
    """
    if problem.cost.kept is None or getattr(config, "refresh", None) != 1:
        return []
    return [calls for calls in (2, 4, 8) if calls <= steps.total - steps.dense]


def others_to_try(config: MethodConfig, name: str) -> list[Any]:
    """Values of a setting that a method has tuned too, from the one behind the config's own on; none where its own is not known.

    Args:
        config: the settings that stay.
        name: of the setting.
    """
    values = config.tuned_too.get(name, ())
    own = getattr(config, name, None)
    return list(values[values.index(own) + 1 :]) if own in values else []


def with_other(line: Line, name: str, value: Any) -> Line:
    """The same line with another value of a setting; what a run costs is told as if it had the given one.

    Args:
        line: settings along a line.
        name, value: the setting's.
    """

    def at(cost: float) -> MethodConfig:
        return dataclasses.replace(line.config(cost), **{name: value})

    return dataclasses.replace(line, config=at, others=(*line.others, (name, value)))


def table_line(problem: Problem, config: MethodConfig, steps: Steps) -> Line:
    """Budgets of heads or layers after a number of dense steps.

    Args:
        problem: curves, weights and costs.
        config: the settings that stay.
        steps: of a run.
    """
    config = _after(config, steps)

    def spend(share: float) -> Allocation:
        if problem.curves.heads == 1:
            return within(problem, share)
        return within(bounded(problem, share, config.always_computed, _FACTOR), share)

    def at(cost: float) -> MethodConfig:
        return dataclasses.replace(config, **{str(config.head_field): spend(steps.share(cost)).table()})

    return Line(
        "tuned",
        steps.dense,
        at,
        (steps.whole(spend(0.0).cost), 1.0),
        steps.whole(0.0),
        getattr(config, "refresh", None),
    )


def one_budget_line(problem: Problem, config: MethodConfig, steps: Steps, family: str) -> Line:
    """One budget for all heads after a number of dense steps.

    Args:
        problem: curves, weights and costs.
        config: the settings that stay.
        steps: of a run.
        family: "uniform" for what there is without a tuning, "tuned" for other numbers of dense steps.
    """
    config = _after(config, steps)

    def at(cost: float) -> MethodConfig:
        value = round(uniform_value(problem, steps.share(cost)), 4)
        return dataclasses.replace(config, **{str(config.budget_field): value})

    # Where planning is dear, all heads at the lowest level may cost more than dense attention.
    low, high = (steps.whole(uniform_cost(problem, value)) for value in (problem.curves.levels[0], 1.0))
    return Line(family, steps.dense, at, (low, high), steps.whole(0.0), getattr(config, "refresh", None))


def _after(config: MethodConfig, steps: Steps) -> MethodConfig:
    """The settings with so many dense steps; untouched where they have them."""
    if steps.dense == count(config.warmup_steps, steps.total):
        return config
    return dataclasses.replace(config, warmup_steps=steps.dense / steps.total)


def dense_steps(number: int) -> str:
    """Such as "2 dense steps"."""
    return f"{number} dense step{'' if number == 1 else 's'}"
