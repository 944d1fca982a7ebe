"""The search against functions whose crossing is known."""

import math

import pytest

from svg.tune.search import Search, Target


def count(function):
    calls = []

    def measured(spent):
        calls.append(spent)
        return function(spent)

    return measured, calls


CASES = [
    (Target("min_psnr", 30.0), lambda x: 20 + 25 * x, 0.4),
    (Target("min_psnr", 30.0), lambda x: 15 + 12 * x / (1.01 - x) if x < 1 else 100, 0.562),
    (Target("max_lpips", 0.1), lambda x: 0.4 * (1 - x) ** 2, 0.5),
    (Target("target_speedup", 2.0), lambda x: 1 / x, 0.5),
]


@pytest.mark.parametrize(("target", "function", "crossing"), CASES)
@pytest.mark.parametrize("start", [0.1, 0.5, 0.95])
def test_finds_the_crossing(target, function, crossing, start):
    measured, calls = count(function)
    found = Search(measured, 0.1, 1.0).find(target, start, rounds=9)
    assert target.margin(function(found)) >= 0
    assert abs(found - crossing) < 0.03 and len(calls) == len(set(calls)) <= 9


@pytest.mark.parametrize(("target", "function", "crossing"), CASES)
def test_few_rounds_still_reach_it(target, function, crossing):
    for rounds in (1, 2, 3):
        found = Search(function, 0.1, 1.0).find(target, 0.2, rounds)
        assert target.margin(function(found)) >= 0 and 0.1 <= found <= 1.0


def test_known_points_serve_another_target():
    measured, calls = count(lambda x: 20 + 25 * x)
    search = Search(measured, 0.1, 1.0)
    first = search.find(Target("min_psnr", 30.0), 0.5, rounds=5)
    before = len(calls)
    second = search.find(Target("min_psnr", 31.0), 0.5, rounds=5)
    assert second > first and len(calls) - before <= 3
    assert search.find(Target("min_psnr", 30.0), 0.5, rounds=5) == first and len(calls) - before <= 3


def test_out_of_reach():
    assert Search(lambda x: 20.0, 0.1, 1.0).find(Target("min_psnr", 30.0), 0.5, rounds=4) is None
    assert Search(lambda x: 1 / x, 0.4, 1.0).find(Target("target_speedup", 3.0), 0.5, rounds=4) is None


@pytest.mark.parametrize(
    ("kind", "value"),
    [("min_psnr", 0), ("min_psnr", math.inf), ("max_lpips", -0.1), ("max_lpips", math.nan), ("target_speedup", 1.0)],
)
def test_impossible_targets(kind, value):
    with pytest.raises(ValueError, match=f"--{kind.replace('_', '-')} must be a finite number > "):
        Target(kind, value)


def cell(psnr=30.0, lpips=0.1, attention=1.0, density=0.5):
    quality = {"psnr": {"mean": psnr}, "lpips": {"mean": lpips, "note": "no weights"}}
    return {"quality": quality, "seconds": {"attention": attention}, "density": {"all_calls": density}}


def test_numbers_of_a_target():
    cells, dense = [cell(psnr="inf"), cell(psnr=20.0)], [cell(), cell()]
    assert Target("min_psnr", 30.0).of(cells, dense, False) == 60  # identical counts as 100 dB
    assert Target("min_psnr", 30.0, worst=True).of(cells, dense, False) == 20
    cells = [cell(lpips=0.1), cell(lpips=0.3)]
    assert Target("max_lpips", 0.2).of(cells, dense, False) == pytest.approx(0.2)
    assert Target("max_lpips", 0.2, worst=True).of(cells, dense, False) == 0.3
    with pytest.raises(ValueError, match="--max-lpips needs LPIPS: no weights"):
        Target("max_lpips", 0.2).of([cell(lpips=None)], [cell()], False)
    cells = [cell(attention=0.5, density=0.25)]
    assert Target("target_speedup", 2.0).of(cells, [cell()], True) == 2
    assert Target("target_speedup", 2.0).of(cells, [cell()], False) == 4
