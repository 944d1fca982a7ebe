"""Lists of granules: operation against the definition, granule by granule."""

import math

import pytest
import torch
from replayed_peers import on_all

from svg.kernels.common import target
from svg.kernels.granules import select_granules

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")
SIZE = 16


def coarse(scores):
    """Scores whose lower 7 bits, which the kernel does not compare, are 0."""
    return (scores.view(torch.int32) & -128).view(torch.float32)


def of(kind, *shape):
    return {
        "random": lambda: coarse(torch.randn(shape).mul(3).exp()),
        "few": lambda: torch.randint(0, 4, shape).float(),
        "equal": lambda: torch.full(shape, 0.375),
        "zero": lambda: torch.zeros(shape),
    }[kind]()


def tokens_of(B, T, *, last=SIZE, text=()):
    """Of T video granules, the last of `last` tokens, and text granules."""
    row = [SIZE] * (T - 1) + [last, *text]
    return torch.tensor([row] * B, dtype=torch.int32)


def by_definition(scores, budget, floor):
    """Chosen (row, granule) pairs of some rows [R, T]: floors, then the best of all while the budget lasts."""
    R, T = scores.shape
    allowed, least = math.floor(budget * R * T + 1e-6), min(T, max(1, round(floor * budget * T)))
    order = {r: sorted(range(T), key=lambda t: (-scores[r, t].item(), t)) for r in range(R)}
    chosen = {(r, t) for r in range(R) for t in order[r][:least]}
    left = [(-scores[r, t].item(), r, t) for r in range(R) for t in range(T) if (r, t) not in chosen]
    return chosen | {(r, t) for _, r, t in sorted(left)[: max(0, allowed - len(chosen))]}


def check(lists, chosen, tokens, T):
    """Lists, lengths and bits against the chosen (b, h, r, t)."""
    B, H, NG = lists.counts.shape
    used = []
    for b in range(B):
        every = range(tokens.shape[1])
        for h in range(H):
            for r in range(NG):
                wanted = [c for c in every if (b, h, r, c) in chosen or (c >= T and tokens[b, c] > 0)]
                wanted += [T - 1] if tokens[b, T - 1] < SIZE and T - 1 not in wanted else []
                whole = [c for c in wanted if tokens[b, c] == SIZE]
                start, count = lists.starts[b, h, r].item(), lists.counts[b, h, r].item()
                used += range(start, start + count)
                found = lists.entries[start : start + count].tolist()
                assert found == whole + sorted(set(wanted) - set(whole))
                assert lists.whole[b, h, r] == len(whole)
                for t in range(-(-T // 32) * 32):
                    bit = lists.chosen[b, h, r, t // 32].item() >> t % 32 & 1
                    assert bit == (t >= T or t in wanted)
    assert len(set(used)) == len(used) and max(used) < len(lists.entries)  # no list reaches into another


CASES = [  # kind, heads, groups, granules, tokens of the last one, text granules
    ("random", 2, 5, 70, 5, (16, 16, 3, 0)),
    ("random", 3, 2, 33, SIZE, ()),
    ("few", 2, 3, 40, SIZE, (7,)),
    ("equal", 2, 3, 20, 9, ()),
    ("zero", 1, 1, 5, 2, (16,)),
    ("few", 1, 1, 1, SIZE, ()),
    ("random", 1, 2, 1, 1, ()),
]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("budget", "floor"), [(0.3, 0.5), (0.001, 0.0), (0.45, 1.0)])
@pytest.mark.parametrize("case", CASES)
def test_lists_match_the_definition(case, budget, floor, per_head):
    kind, H, NG, T, last, text = case
    scores, tokens = of(kind, 2, H, NG, T), tokens_of(2, T, last=last, text=text)
    lists = select_granules(scores, tokens, budget=budget, floor=floor, size=SIZE, rows=128, per_head=per_head)
    chosen = set()
    for b in range(2):
        for first, heads in ((h, 1) for h in range(H)) if per_head else ((0, H),):
            pairs = by_definition(scores[b, first : first + heads].flatten(0, 1), budget, floor)
            chosen |= {(b, first + row // NG, row % NG, t) for row, t in pairs}
    check(lists, chosen, tokens, T)


@pytest.mark.parametrize("deal", [((0, 1), (2,)), ((0,), (1, 2)), ((0,), (1,), (2,))])
@pytest.mark.parametrize(("budget", "floor"), [(0.3, 0.5), (0.001, 0.0), (0.45, 1.0), (1.0, 0.2)])
@pytest.mark.parametrize("kind", ["random", "few", "equal"])
def test_heads_of_several_processes_share_a_threshold(kind, budget, floor, deal):
    H, NG, T = 3, 4, 41
    scores, tokens = of(kind, 2, H, NG, T), tokens_of(2, T, last=7, text=(3,))
    options = {"budget": budget, "floor": floor, "size": SIZE, "rows": 128}
    whole = select_granules(scores, tokens, **options)
    parts = on_all(deal, lambda peers: select_granules(scores[:, peers.own], tokens, others=peers, **options))
    for name in ("whole", "counts", "chosen"):
        together = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(together, getattr(whole, name))
    for part in parts:
        assert int((part.starts + part.counts).max()) <= part.entries.numel()


@pytest.mark.parametrize("per_head", [False, True])
def test_budgets_of_heads(per_head):
    scores, tokens = of("random", 2, 3, 4, 50), tokens_of(2, 50, text=(16, 2))
    budgets = torch.tensor([0.1, 1.0, 0.35])
    lists = select_granules(scores, tokens, budget=budgets, floor=0.4, size=SIZE, rows=64, per_head=per_head)
    assert lists.rows == 64
    chosen = set()
    for b in range(2):
        if per_head:
            parts = [(h, by_definition(scores[b, h], budgets[h].item(), 0.4)) for h in range(3)]
        else:
            parts = [(0, by_definition(scores[b].flatten(0, 1), budgets.double().mean().item(), 0.4))]
        chosen |= {(b, first + row // 4, row % 4, t) for first, pairs in parts for row, t in pairs}
    check(lists, chosen, tokens, 50)


def test_a_bound_on_budgets_of_heads():
    """Lists are sized by the bound; budgets within it are kept, larger ones scaled down."""
    scores, tokens = of("random", 1, 2, 4, 60), tokens_of(1, 60)
    options = {"floor": 0.5, "size": SIZE, "rows": 128, "per_head": True}
    small = torch.tensor([0.1, 0.3])
    bounded, free = (select_granules(scores, tokens, budget=small, most=m, **options) for m in (0.2, 1.0))
    assert torch.equal(bounded.chosen, free.chosen)
    scaled = select_granules(scores, tokens, budget=2 * small, most=0.2, **options)
    assert torch.equal(scaled.counts, free.counts)
    if target.INTERPRETED:  # the specification's lists are as long as they need to be
        assert len(bounded.entries) < len(free.entries) / 3


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("budget", [0.003, 0.2, 1 / 3, 1.0])
def test_one_budget_on_the_device_is_the_same_as_a_number(budget, floor):
    scores, tokens = of("random", 2, 3, 4, 60), tokens_of(2, 60, last=5, text=(16, 2))
    options = {"floor": floor, "size": SIZE, "rows": 128}
    number = select_granules(scores, tokens, budget=budget, **options)
    there = torch.tensor(budget, dtype=torch.float64)
    for most in (budget, min(1.0, 1.25 * budget)):
        tensor = select_granules(scores, tokens, budget=there, most=most, **options)
        for name in ("starts", "whole", "counts", "chosen", "schedule"):
            assert torch.equal(getattr(number, name), getattr(tensor, name)), name
        used = (number.starts + number.counts).max()
        assert used <= len(tensor.entries) and torch.equal(number.entries[:used], tensor.entries[:used])


@pytest.mark.parametrize("per_head", [False, True])
def test_everything_is_listed_with_the_whole_budget(per_head):
    scores, tokens = of("random", 2, 2, 3, 45), tokens_of(2, 45, last=3, text=(16, 5))
    lists = select_granules(scores, tokens, budget=1.0, floor=0.5, size=SIZE, rows=128, per_head=per_head)
    assert (lists.counts == 47).all() and (lists.whole == 45).all() and (lists.chosen == -1).all()


def test_one_threshold_moves_granules_to_the_heads_that_need_them():
    scores = torch.cat([of("random", 1, 1, 4, 64), 1e-6 * of("random", 1, 1, 4, 64)], 1)
    tokens = tokens_of(1, 64)
    together, apart = (
        select_granules(scores, tokens, budget=0.25, floor=0.25, size=SIZE, rows=128, per_head=own).counts.sum((0, 2))
        for own in (False, True)
    )
    assert apart.tolist() == [64, 64] and together.tolist() == [112, 16]


def test_two_runs_are_equal():
    scores, tokens = of("random", 2, 2, 5, 100), tokens_of(2, 100, last=7)
    first, second = (select_granules(scores, tokens, budget=0.2, floor=0.5, size=SIZE, rows=128) for _ in range(2))
    for name in ("starts", "whole", "counts", "chosen"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@in_interpreter
def test_scores_are_compared_by_their_upper_bits():
    """Scores that agree in 24 bits are equal: the lowest index goes first."""
    scores = torch.tensor([1.0, 1.0 + 2**-20, 1.0 + 2**-12]).view(1, 1, 1, 3)
    lists = select_granules(scores, tokens_of(1, 3), budget=0.67, floor=0.0, size=SIZE, rows=128)
    assert lists.entries[:2].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 0.0}, ValueError, r"budget must be in \(0, 1\], got 0.0"),
        ({"budget": torch.ones(3)}, ValueError, r"budget must be fp32 \[H\] = \[2\]"),
        ({"budget": torch.tensor(0.5)}, ValueError, r"or fp64 \[\] on cpu, got torch.float32"),
        ({"floor": 1.5}, ValueError, r"floor must be in \[0, 1\], got 1.5"),
        ({"most": -0.5}, ValueError, r"most must be in \[0, 1\], got -0.5"),
        ({"size": 12}, ValueError, "size must be one of 8, 16, 32, 64, got 12"),
        ({"rows": 96}, ValueError, "rows must be one of 16, 32, 64, 128, got 96"),
        ({"scores": torch.zeros(2, 3, 4)}, ValueError, r"scores must be \[B, H, NG, T\]"),
        ({"scores": torch.zeros(1, 2, 3, 40).double()}, TypeError, "scores must be fp32"),
        ({"tokens": torch.zeros(1, 9, dtype=torch.int32)}, ValueError, "tokens must hold all 40 video granules, got 9"),
    ],
)
def test_wrong_inputs(change, error, message):
    inputs = {"scores": torch.zeros(1, 2, 3, 40), "tokens": tokens_of(1, 40), "budget": 0.2, "floor": 0.5}
    with pytest.raises(error, match=message):
        select_granules(**(inputs | {"size": SIZE, "rows": 128} | change))


@in_interpreter
def test_limits_of_the_kernel():
    with pytest.raises(NotImplementedError, match="at most 32768 video granules"):
        select_granules(torch.zeros(1, 1, 1, 32_769), tokens_of(1, 32_769), budget=0.5, floor=0.0, size=SIZE, rows=128)
