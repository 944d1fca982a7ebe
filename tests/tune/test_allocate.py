"""The budget goes where it removes most error: against every possible choice, and against one budget for all."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from svg.config import NearConfig, SVG1Config
from svg.tune import run
from svg.tune.allocate import (
    Cost,
    Problem,
    at_price,
    bounded,
    fit_cost,
    uniform_cost,
    uniform_value,
    weights_of,
    within,
)
from svg.tune.curves import Curves
from svg.tune.lines import Steps, one_budget_line, others_to_try, refreshes_to_try, sharing, table_line, with_other

LEVELS = (0.3, 0.6, 0.9, 1.0)
BY_DENSITY = Cost(plan=0.0, per_density=1.0, dense=2.0, unit="density")
BY_TIME = Cost(plan=0.5, per_density=0.9, dense=1.7, unit="seconds")


def problem(rng, cost, layers=3, heads=2, free=None):
    density = np.sort(rng.uniform(0.05, 0.95, (layers, heads, 4)), -1)
    error = -np.sort(-rng.uniform(0.0, 1.0, (layers, heads, 4)), -1)
    density[..., -1], error[..., -1] = 1, 0
    curves = Curves(LEVELS, error, density, np.ones(layers, bool))
    free = np.ones(layers, bool) if free is None else np.array(free)
    return Problem(curves, rng.uniform(0.1, 3.0, (layers, heads)), cost, free)


def every_choice(given):
    """(cost, error) of all allocations, from the definition."""
    layers, heads, levels = given.curves.error.shape
    whole = layers * given.cost.dense
    for choice in itertools.product(range(levels), repeat=layers * heads):
        choice = np.array(choice).reshape(layers, heads)
        cost = error = 0.0
        for layer in range(layers):
            row = choice[layer]
            if not given.free[layer] and (row < levels - 1).any():
                break
            if (row == levels - 1).all():
                cost += given.cost.dense
                continue
            cost += given.cost.plan + given.cost.per_density * sum(
                given.curves.density[layer, head, row[head]] for head in range(heads)
            )
            error += sum(
                given.weight[layer, head] * given.curves.error[layer, head, row[head]] for head in range(heads)
            )
        else:
            yield cost / whole, error


@pytest.mark.parametrize("cost", [BY_DENSITY, BY_TIME])
@pytest.mark.parametrize("price", [1e-3, 0.1, 0.5, 1.0, 3.0, 100.0])
def test_no_choice_of_the_same_cost_has_less_error(cost, price):
    given = problem(np.random.default_rng(int(price * 1000)), cost, free=[True, True, False])
    found = at_price(given, price)
    best = min(error for spent, error in every_choice(given) if spent <= found.cost + 1e-9)
    assert found.error == pytest.approx(best, abs=1e-9)
    assert (found.choice[2] == 3).all()  # a layer that must stay dense


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.65, 0.8, 0.95])
def test_within_a_budget(budget):
    """On the hull the optimum; between its corners what is left is spent, and never more than there is."""
    given = problem(np.random.default_rng(7), BY_DENSITY)
    found, choices = within(given, budget), list(every_choice(given))
    assert found.cost <= budget
    assert found.error <= min(at_price(given, price).error for price in np.geomspace(1e-4, 1e3, 200)
                              if at_price(given, price).cost <= budget) + 1e-12  # fmt: skip
    best = min(error for spent, error in choices if spent <= budget)
    assert best - 1e-9 <= found.error <= best + 0.35 * given.error.max()
    table = np.array(found.table())
    assert table.shape == (3, 2) and set(table.flatten()) <= set(LEVELS)


def test_equal_steps_and_falling_returns_are_solved_exactly():
    """Where every step costs the same and gains fall, greedy is optimal: so must the result be, at every budget."""
    rng = np.random.default_rng(3)
    gains = -np.sort(-rng.uniform(0.01, 1, (3, 2, 3)), -1)
    error = np.concatenate([gains[..., ::-1].cumsum(-1)[..., ::-1], np.zeros((3, 2, 1))], -1)
    density = np.broadcast_to(np.array([0.25, 0.5, 0.75, 1.0]), error.shape)
    given = Problem(Curves(LEVELS, error, density, np.ones(3, bool)), np.ones((3, 2)), BY_DENSITY, np.ones(3, bool))
    choices = list(every_choice(given))
    for steps in range(19):
        budget = 0.25 + steps / 24 + 1e-6
        assert within(given, budget).error == pytest.approx(min(e for c, e in choices if c <= budget), abs=1e-9)


def test_bounds():
    given = problem(np.random.default_rng(1), BY_TIME)
    assert within(given, 1.0).error == 0
    least = min(spent for spent, _ in every_choice(given))
    assert within(given, 0.0).cost == pytest.approx(least)
    costly = Cost(plan=5.0, per_density=0.9, dense=1.7, unit="seconds")  # planning alone costs more than dense
    assert within(problem(np.random.default_rng(1), costly), 0.0).error == 0


def test_never_worse_than_one_budget_for_all():
    for seed in range(5):
        given = problem(np.random.default_rng(seed), BY_DENSITY, layers=5, heads=4)
        for index, level in enumerate(LEVELS[:-1]):
            cost, error = given.total(np.full((5, 4), index))
            assert uniform_cost(given, level) == pytest.approx(cost, abs=1e-6)
            assert uniform_cost(given, uniform_value(given, cost)) == pytest.approx(cost, abs=1e-6)
            assert within(given, cost).error <= error + 1e-12


def layers_problem(rng, cost=BY_DENSITY, heads=3):
    """Curves of layers, errors of which differ by more than what is bounded."""
    levels = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
    density = np.broadcast_to(np.array(levels), (5, 1, 7)).copy()
    error = 10.0 ** np.arange(-3, 2)[:, None, None] * (1 - density) / density
    return Problem(Curves(levels, error, density, np.ones(5, bool), heads), np.ones((5, 1)), cost, np.ones(5, bool))


def test_layers_are_units():
    given = layers_problem(np.random.default_rng(0), Cost(0.0, 3.0, 3.0, "density"))
    found = within(given, 0.4)
    table = np.array(found.table())
    assert table.shape == (5, 3) and (table == table[:, :1]).all() and (np.diff(table[:, 0]) >= 0).all()
    assert np.ptp(table) > 0.3 and found.cost == pytest.approx(table.mean()) and found.cost <= 0.4


@pytest.mark.parametrize("budget", [0.12, 0.2, 0.3, 0.6])
def test_a_table_stays_near_one_for_all(budget):
    """Beyond what is always computed, a level is within the factor of the one that costs as much."""
    given = layers_problem(np.random.default_rng(0), Cost(0.0, 3.0, 3.0, "density"))
    found = within(bounded(given, budget, 0.05, 2.0), budget)
    table, rest = np.array(found.table()), budget - 0.05
    assert found.cost <= budget and (table - 0.05 >= rest / 2 - 1e-9).all() and (table - 0.05 <= rest * 2 + 1e-9).all()
    free = within(given, budget)
    assert (
        free.error <= found.error <= given.total(np.full((5, 1), np.searchsorted(given.curves.levels, budget) - 1))[1]
    )


def test_bounded_tables_are_dense_where_that_is_no_dearer():
    dear = Cost(plan=2.9, per_density=3.0, dense=3.0, unit="seconds")
    given = layers_problem(np.random.default_rng(0), dear)
    assert (within(bounded(given, 0.1, 0.05, 2.0), 0.1).choice == 6).all()


def test_a_line_of_layers_is_bounded():
    given = layers_problem(np.random.default_rng(0), Cost(0.0, 3.0, 3.0, "density"))
    line = table_line(given, NearConfig(granule=32), Steps(total=10, dense=2))
    table = np.array(line.config(0.2 + 0.8 * 0.2).head_budget) - 1 / 32
    assert table.shape == (5, 3) and 1 < table.max() / table.min() <= 9
    assert table.max() <= 3 * (0.2 - 1 / 32) and line.bounds[0] == pytest.approx(0.2 + 0.8 * 0.1)


def test_weights_of_layers():
    error = np.array([[[0.2, 0.1, 0.0]], [[0.3, 0.2, 0.0]]])
    curves = Curves((0.3, 0.6, 1.0), error, np.ones((2, 1, 3)), np.ones(2, bool), heads=2)
    effects = [{"layer": 0, "heads": [0, 1], "effect": e} for e in (0.01, 1.0)]
    assert weights_of(curves, effects, 0.6) == pytest.approx(np.array([[1.0], [1.0]]))  # the other gets the mean


def rows(plan, per_density, branch="cond", calls=4):
    for _ in range(calls):
        density = [[share, share + 0.1] for share in (0.1, 0.3, 0.6)]
        seconds = [plan + per_density * sum(row) for row in density]
        yield {"density": density, "error": [[0, 0]] * 3, "seconds": seconds, "branch": branch}


def test_cost_from_times():
    cost, notes = fit_cost(list(rows(0.002, 0.01)), [0.03, 0.03, 9.0], on_gpu=True)
    assert (cost.plan, cost.per_density) == pytest.approx((0.002, 0.01)) and cost.unit == "seconds"
    assert cost.dense == 0.03  # an outlier does no harm
    assert notes == ["a sparse call takes 2 ms and 20 ms more at density 1, a dense one 30 ms"]
    cost, notes = fit_cost(list(rows(0.002, -0.01)), [0.03], on_gpu=True)
    assert cost == Cost(0.0, 1.0, 2.0, "density") and "too short to fit" in notes[0]
    cost, notes = fit_cost(list(rows(0.002, 0.01)), [0.03], on_gpu=False)
    assert cost.unit == "density" and "on a CPU" in notes[0]


def test_a_plan_that_branches_share_is_paid_once():
    """As often as it is: not by how many calls of either branch were measured."""
    measured = [*rows(0.002, 0.01), *rows(0.0, 0.01, "uncond", calls=7)]
    cost, _ = fit_cost(measured, [0.03], on_gpu=True)
    assert (cost.plan, cost.per_density) == pytest.approx((0.001, 0.01))


def test_a_plan_that_calls_share():
    measured = [{**row, "kept_seconds": [0.0005 + 0.01 * 1.3, 1.3]} for row in rows(0.002, 0.01)]
    cost, _ = fit_cost(measured, [0.03], on_gpu=True)
    assert cost.kept == pytest.approx(0.0005) and cost.shared(1) == cost
    assert cost.shared(3).plan == pytest.approx(0.001) and cost.shared(3).per_density == cost.per_density


def test_more_calls_share_only_where_that_saves_time():
    given, steps = problem(np.random.default_rng(1), BY_TIME), Steps(total=7, dense=2)
    assert refreshes_to_try(given, NearConfig(), steps) == []  # not measured, as on a CPU
    given = replace(given, cost=replace(BY_TIME, kept=0.1))
    assert refreshes_to_try(given, NearConfig(), steps) == [2, 4]  # of five sparse steps
    assert refreshes_to_try(given, NearConfig(refresh=2), steps) == refreshes_to_try(given, SVG1Config(), steps) == []
    cheaper, config = sharing(given, NearConfig(), 4)
    assert (cheaper.cost.plan, config.refresh) == (pytest.approx(0.2), 4)
    assert table_line(cheaper, config, steps).bounds[0] < table_line(given, NearConfig(), steps).bounds[0]
    assert str(table_line(cheaper, config, steps)) == "2 dense steps, refresh 4"


def test_larger_granules_are_tried_and_leave_the_rest_of_a_line():
    given, steps = problem(np.random.default_rng(1), BY_TIME), Steps(total=7, dense=2)
    assert others_to_try(NearConfig(), "granule") == [32, 64] and others_to_try(SVG1Config(), "granule") == []
    assert (
        others_to_try(NearConfig(granule=64), "granule") == []
        and len(others_to_try(NearConfig(granule=8), "granule")) == 3
    )
    line = one_budget_line(given, NearConfig(refresh=2), steps, "tuned")
    other = with_other(line, "granule", 64)
    assert other.config(0.5) == replace(line.config(0.5), granule=64) and other.bounds == line.bounds
    assert str(other) == "2 dense steps, refresh 2, granule 64"
    both = with_other(other, "warmup_precision", "int8-fp8")
    assert both.config(0.5) == replace(other.config(0.5), warmup_precision="int8-fp8")
    assert str(both) == "2 dense steps, refresh 2, granule 64, warmup_precision int8-fp8"


@pytest.mark.parametrize(
    ("on_gpu", "fp8", "asked", "kept"),
    [
        (True, True, {}, set()),
        (True, True, {"keep_precision": True}, {"warmup_precision"}),
        (True, False, {"keep_granule": True}, {"granule", "warmup_precision"}),
        (False, True, {}, {"warmup_precision"}),
    ],
)
def test_dense_steps_are_tried_in_8_bits_where_the_device_has_fp8(monkeypatch, on_gpu, fp8, asked, kept):
    monkeypatch.setattr(run.target, "has_fp8", lambda device: fp8)
    plan = SimpleNamespace(**{"keep_granule": False, "keep_precision": False, **asked})
    assert run.Tuner._kept.fget(SimpleNamespace(_plan=plan, _on_gpu=on_gpu, _device="cuda:0")) == kept


def test_weights_are_effect_for_each_unit_of_error():
    error = np.zeros((2, 2, 3))
    error[:, :, 1] = [[0.1, 0.4], [0.2, 0.0]]
    curves = Curves((0.3, 0.6, 1.0), error, np.ones((2, 2, 3)), np.ones(2, bool))
    assert (weights_of(curves, [], None) == 1).all()
    effects = [{"layer": 0, "heads": [0, 1], "effect": e} for e in (0.5, 1.5)] + [
        {"layer": 1, "heads": [0, 1], "effect": 3.0}
    ]
    assert weights_of(curves, effects, 0.6) == pytest.approx(np.array([[2.0, 2.0], [15.0, 15.0]]))
    alone = [{"layer": layer, "heads": [head], "effect": 0.1} for layer in (0, 1) for head in (0, 1)]
    # The head without an error of its own gets the others' mean.
    assert weights_of(curves, alone, 0.6) == pytest.approx(np.array([[1.0, 0.25], [0.5, (1 + 0.25 + 0.5) / 3]]))
