"""Scores of granules: operation against the definition, query by query."""

import math

import pytest
import torch

from svg.kernels.common import target
from svg.kernels.granules import Granules, granule_scores
from svg.kernels.granules.reference import cut_granules_reference, granule_scores_reference

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")


def problem(S, V, *, B=2, H=2, D=64, size=16, dtype=torch.float32, spread=1.0):
    q, k, v = (torch.randn(B, S, H, D).to(dtype).transpose(1, 2) for _ in range(3))
    orders = [torch.rand(B, H, S).argsort(-1)[:, :, :V].int() for _ in range(2)]
    return q, orders[0], cut_granules_reference(k * spread, v, orders[1], size)


def by_definition(q, granules, b, h, index, pool, scale):
    """Scores [T] of one group of sorted rows, in Python floats."""
    T = granules.k_mean.shape[2]
    number = granules.tokens[b, :T].double()
    totals, members = torch.zeros(T, dtype=torch.float64), index.split(pool)
    for part in members:
        query = q[b, h, part].float().mean(0).to(q.dtype).double()
        p = (scale * granules.k_mean[b, h].double() @ query + number.log()).softmax(-1)
        growth = (scale**2 * (query @ query) * granules.spread[b, h].double()).clamp_max(6).expm1()
        totals += p**2 * growth * granules.weight[b, h].double() / number
    return totals / len(members)


@pytest.mark.parametrize(
    ("V", "rows", "pool", "D"),
    [
        (1, 64, 1, 64),
        (129, 64, 8, 40),
        (200, 128, 4, 64),
        (67, 128, 2, 128),
        (131, 128, 1, 16),
        (70, 16, 2, 64),
        (70, 32, 8, 64),
    ],
)
def test_scores_match_the_definition(V, rows, pool, D):
    q, order, granules = problem(V + 9, V, D=D, size=8)
    found = granule_scores(q, order, granules, rows=rows, pool=pool)
    assert found.dtype == torch.float32 and found.shape == (2, 2, -(-V // rows), -(-V // 8))
    for b, h in ((0, 1), (1, 0)):
        for group, index in enumerate(order[b, h].long().split(rows)):
            exact = by_definition(q, granules, b, h, index, pool, D**-0.5)
            torch.testing.assert_close(found[b, h, group].double(), exact, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 64])
def test_kernel_against_the_specification(dtype, size):
    q, order, granules = problem(1_111, 1_093, B=1, D=96, size=size, dtype=dtype, spread=2.0)
    found = granule_scores(q, order.long(), granules, rows=64, pool=4, sm_scale=0.2)
    exact = granule_scores_reference(q, order, granules, rows=64, pool=4, sm_scale=0.2)
    torch.testing.assert_close(found, exact, rtol=3e-5, atol=0)


def test_without_an_order_all_tokens_in_order():
    q, _, granules = problem(150, 150)
    order = torch.arange(150).expand(2, 2, -1)
    found, exact = (granule_scores(q, o, granules, rows=64, pool=2) for o in (None, order))
    assert torch.equal(found, exact)


def test_large_logits_stay_finite():
    """One granule holds all the mass, hundreds of powers of two above the others."""
    q, order, granules = problem(300, 300, dtype=torch.bfloat16)
    found = granule_scores(q * 100, order, granules, rows=128, pool=4)
    exact = granule_scores_reference(q * 100, order, granules, rows=128, pool=4)
    assert found.isfinite().all()
    torch.testing.assert_close(found, exact, rtol=3e-3, atol=1e-7 * exact.max().item())


def test_equal_keys_leave_no_error():
    q, order, granules = problem(150, 150)
    still = Granules(**(vars(granules) | {"spread": torch.zeros_like(granules.spread)}))
    assert not granule_scores(q, order, still, rows=64, pool=4).any()


def test_the_last_granule_weighs_what_it_holds():
    """All means equal: p is a granule's share of the keys."""
    q, order, granules = problem(41, 41, B=1, H=1, size=16)
    ones = {
        "k_mean": torch.ones_like(granules.k_mean),
        "weight": torch.ones(1, 1, 3),
        "spread": torch.full((1, 1, 3), 1e9),
    }
    found = granule_scores(q, order, Granules(**(vars(granules) | ones)), rows=64, pool=1)
    exact = torch.tensor([16.0, 16.0, 9.0]) / 41**2 * math.expm1(6)
    torch.testing.assert_close(found[0, 0, 0], exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": 48}, ValueError, "rows must be one of 16, 32, 64, 128, got 48"),
        ({"pool": 3}, ValueError, "pool must be one of 1, 2, 4, 8, got 3"),
        ({"sm_scale": -1.0}, ValueError, "sm_scale must not be negative, got -1.0"),
        ({"q": torch.zeros(2, 2, 30, 32)}, ValueError, "with the granules' heads"),
        ({"q": torch.zeros(2, 2, 30, 64).bfloat16()}, TypeError, "q must have the granules' dtype"),
        ({"q_order": torch.zeros(1, 2, 30).int()}, ValueError, r"q_order must be \[B, H, V\]"),
        ({"q_order": torch.zeros(2, 2, 30)}, TypeError, "q_order must be int32 or int64"),
    ],
)
def test_wrong_inputs(change, error, message):
    q, order, granules = problem(30, 30)
    with pytest.raises(error, match=message):
        granule_scores(**({"q": q, "q_order": order, "granules": granules, "rows": 64, "pool": 4} | change))


@in_interpreter
def test_limits_of_the_kernel():
    q, order, granules = problem(20, 20, D=136)
    with pytest.raises(NotImplementedError, match="head dim must be at most 128, got 136"):
        granule_scores(q, order, granules, rows=64, pool=4)
