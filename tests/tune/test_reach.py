"""Lines of settings with other numbers of dense steps, on stand-ins whose quality and cost are known."""

import math
from dataclasses import replace

import pytest

from svg.config import NearConfig
from svg.config.base import count
from svg.tune.lines import Line, Steps, dense_steps_to_try
from svg.tune.reach import Reach, cost_at
from svg.tune.search import Target

PSNR = Target("min_psnr", 40.0)


@pytest.mark.parametrize(("own", "total", "tried"), [
    (0.2, 16, [4, 2, 1, 0]), (0.2, 15, [3, 1, 0]), (0.1, 20, [2, 1, 0]), (0.05, 20, [1, 0]), (0.0, 20, [0]),
])  # fmt: skip
def test_numbers_of_dense_steps(own, total, tried):
    config = NearConfig(warmup_steps=own)
    assert dense_steps_to_try(config, total, keep=False) == tried
    assert dense_steps_to_try(config, total, keep=True) == tried[:1]


def test_the_share_of_dense_steps_is_exact():
    for total in range(1, 61):
        assert [count(dense / total, total) for dense in range(total + 1)] == list(range(total + 1))


def test_cost_of_a_run():
    steps = Steps(total=16, dense=4)
    assert steps.whole(0.2) == pytest.approx((4 + 12 * 0.2) / 16) and steps.whole(1.0) == 1
    assert steps.share(steps.whole(0.37)) == pytest.approx(0.37)


class Model:
    """Videos whose PSNR is that of a smooth model: errors of dense steps are none, all others' fall with the budget.

    Args:
        bonus: dB that each number of dense steps is worth beyond the budget.
        harder: dB that held-out videos are worse.
    """

    def __init__(self, bonus, harder=0.0, lowest=0.05, total=16):
        self.bonus, self.harder, self.total = bonus, harder, total
        self.searched, self.verified = [], []
        self.lines = [self.line(dense, lowest) for dense in sorted(bonus, reverse=True)]

    def line(self, dense, lowest):
        steps = Steps(self.total, dense)
        return Line("tuned", dense, lambda cost: None, (steps.whole(lowest), 1.0), steps.whole(0.0))

    def psnr(self, line, spent):
        share = Steps(self.total, line.dense_steps).share(spent)
        return 50 + 12 * math.log2(share / 0.2) + self.bonus[line.dense_steps]

    def trial(self, line, spent, harder):
        value = self.psnr(line, spent) - harder
        return {"value": value, "psnr": value, "spent": spent, "dense_steps": line.dense_steps}

    def search(self, line, spent):
        self.searched.append((line.dense_steps, spent))
        return self.trial(line, spent, 0.0)

    def verify(self, line, spent):
        self.verified.append((line.dense_steps, spent))
        return self.trial(line, spent, self.harder)

    def best(self, target=PSNR, rounds=4, start=0.5):
        reach = Reach(target, rounds, self.search, self.verify, lambda trial: trial["spent"], lambda text: None)
        return reach.best(self.lines, start)

    def cheapest(self, dense, value=PSNR.value):
        """The exact cost of a value on the videos of the search."""
        return Steps(self.total, dense).whole(0.2 * 2 ** ((value - 50 - self.bonus[dense]) / 12))


def test_fewer_dense_steps_where_they_are_cheaper():
    model = Model({4: 0.0, 2: -3.0, 1: -5.0, 0: -16.0})
    exact = {dense: model.cheapest(dense) for dense in (4, 2, 1, 0)}
    assert min(exact, key=exact.get) == 1
    found, tried = model.best()
    assert found["met"] and found["dense_steps"] == 1 and 40 <= found["value"] <= 40.9
    assert found["spent"] == pytest.approx(exact[1], rel=0.08)
    # Every line begins at what the one before reached, and the last one falls short there: it is left at once.
    numbers = [dense for dense, _ in model.searched]
    assert numbers == sorted(numbers, reverse=True) and numbers.count(0) == 1 and len(numbers) <= 12
    assert cost_at(PSNR, [(one["value"], one["spent"]) for one in tried]) == pytest.approx(exact[1], rel=0.01)


def test_a_line_that_is_dearer_ends_the_descent():
    model = Model({4: 0.0, 2: -30.0, 1: 50.0, 0: 50.0})
    found, _ = model.best()
    assert found["dense_steps"] == 4 and {dense for dense, _ in model.searched} == {4, 2}


def test_a_line_that_can_only_be_dearer_is_not_tried():
    model = Model({4: 0.0, 2: 0.0, 1: 0.0})
    model.lines[1] = model.line(2, lowest=0.9)  # where planning is dear
    found, _ = model.best()
    assert found["dense_steps"] == 1 and {dense for dense, _ in model.searched} == {4, 1}


@pytest.mark.parametrize("harder", [-4.0, 0.0, 3.0])
def test_held_out_videos_lie_on_both_sides(harder):
    """Whatever they are: one that reaches the target, close to it, and one that does not, in four trials at most."""
    model = Model({2: 0.0}, harder)
    found, tried = model.best()
    values = [one["value"] for one in tried]
    assert len(tried) <= 4 and min(values) < 40 <= found["value"] == min(v for v in values if v >= 40) <= 41.5
    exact = model.cheapest(2, 40 + harder)
    assert cost_at(PSNR, [(one["value"], one["spent"]) for one in tried]) == pytest.approx(exact, rel=0.02)


def test_a_target_that_the_lowest_level_reaches():
    model = Model({1: 40.0})
    found, tried = model.best()
    assert found["met"] and found["spent"] == pytest.approx(model.lines[0].bounds[0], abs=1e-4)
    assert cost_at(PSNR, [(one["value"], one["spent"]) for one in tried]) is None


def test_a_target_out_of_reach():
    model = Model({1: -80.0})
    found, tried = model.best(rounds=3)
    assert not found["met"] and found["value"] < 40 and len(model.searched) == 3 and len(tried) == 4
    found, tried = model.best(Target("target_speedup", 20.0))
    assert found == {"family": "tuned", "met": False} and tried == []


def test_a_speed_up_takes_the_best_video():
    class Speed(Model):
        def trial(self, line, spent, harder):
            return {**super().trial(line, spent, harder), "value": 1 / spent}

    model = Speed({4: 0.0, 2: -2.0, 0: -30.0})
    found, _ = model.best(Target("target_speedup", 2.5))
    assert found["met"] and found["value"] == pytest.approx(2.5, rel=0.1) and found["dense_steps"] == 2


def test_cost_between_trials():
    assert cost_at(PSNR, [(38.0, 0.2), (41.0, 0.5), (30.0, 0.1), (50.0, 0.9)]) == pytest.approx(0.4)
    assert cost_at(PSNR, [(41.0, 0.5), (44.0, 0.6)]) is None and cost_at(PSNR, [(38.0, 0.2)]) is None
    assert cost_at(PSNR, [(38.0, 0.2), (100.0, 1.0)]) is None  # identical: no dB that a line could pass through
    lpips = Target("max_lpips", 0.01)
    assert cost_at(lpips, [(0.1, 0.2), (0.001, 0.4)]) == pytest.approx(0.3)
    assert cost_at(lpips, [(0.1, 0.2), (0.0, 0.4)]) is None


def test_then_more_calls_share_a_map():
    """Only from the best number of dense steps on, and only as far as it pays."""
    model = Model({4: 0.0, 2: -3.0, 1: -20.0})
    asked = []

    def then(best):
        asked.append(best.dense_steps)
        return [replace(model.lines[1], refresh=calls, dense_steps=2, floor=0.1) for calls in (2, 4, 8)]

    def psnr(line, spent):  # two calls save a tenth of the run for nothing, four lose more than they save
        lost = {None: 0.0, 1: 0.0, 2: 0.0, 4: 9.0, 8: 0.0}[line.refresh]
        return Model.psnr(model, line, spent + (0.02 if (line.refresh or 1) > 1 else 0.0)) - lost

    model.psnr = psnr
    trial, searched = model.trial, []
    model.trial = lambda line, spent, harder: (
        searched.append(line.refresh) or {**trial(line, spent, harder), "refresh": line.refresh}
    )
    reach = Reach(PSNR, 4, model.search, model.verify, lambda one: one["spent"], lambda text: None)
    found, _ = reach.best(model.lines, 0.5, then)
    assert asked == [2] and found["met"] and found["refresh"] == 2 and 8 not in searched and 4 in searched
