import math

import pytest
import torch

from svg.kernels import top_p_block_map
from svg.kernels.common import target
from svg.kernels.selection import top_p


def problem(B=2, H=2, Cq=3, Ck=21, D=32):
    q, k = torch.randn(B, H, Cq, D), torch.randn(B, H, Ck, D)
    sizes = torch.randint(1, 50, (B, H, Ck), dtype=torch.int32)
    sizes[..., ::5] = 0
    return q, k, sizes


def select_row(scores, sizes, top_p, min_k_ratio, budget):
    """The definition, one row, in Python floats: set of kept key clusters."""
    real = [j for j, n in enumerate(sizes) if n > 0]
    weights = {j: sizes[j] * math.exp(scores[j]) for j in real}
    total, tokens = sum(weights.values()), sum(sizes)
    kept, mass, used = set(), 0.0, 0
    for rank, j in enumerate(sorted(real, key=lambda j: (-weights[j], j))):
        wanted = mass <= top_p or rank < math.ceil(min_k_ratio * len(sizes))
        fits = budget is None or used + sizes[j] <= budget * tokens
        if rank > 0 and not (wanted and fits):
            break
        kept.add(j)
        mass += weights[j] / total
        used += sizes[j]
    return kept


@pytest.mark.parametrize(
    ("top_p", "min_k_ratio", "scale", "budget"),
    [(0.9, 0.1, 0.5, None), (0.5, 0.0, 0.3, None), (0.3, 0.5, 1.0, None), (0.9, 0.1, 0.1, 0.3), (0.9, 1.0, 0.5, 0.001)],
)
def test_matches_the_definition(top_p, min_k_ratio, scale, budget):
    q, k, sizes = problem()
    block_map = top_p_block_map(q, k, sizes, top_p, min_k_ratio, scale, budget)
    scores = (q.double() @ k.double().transpose(2, 3) * scale).tolist()
    for b in range(2):
        for h in range(2):
            for i in range(3):
                expected = select_row(scores[b][h][i], sizes[b, h].tolist(), top_p, min_k_ratio, budget)
                assert set(block_map[b, h, i].nonzero().squeeze(1).tolist()) == expected


def test_a_head_of_its_own():
    q, k, sizes = problem(H=4)
    shares = torch.tensor([0.2, 1.0, 0.9, 0.5])
    block_map = top_p_block_map(q, k, sizes, shares, 0.1, 0.5, 0.8)
    for head, share in enumerate(shares.tolist()):
        part = (q[:, head, None], k[:, head, None], sizes[:, head, None])
        assert torch.equal(block_map[:, head, None], top_p_block_map(*part, share, 0.1, 0.5, 0.8))
    with pytest.raises(ValueError, match=r"top_p must be fp32 \[H\] = \[4\]"):
        top_p_block_map(q, k, sizes, shares[:3], 0.1, 0.5)


@pytest.mark.parametrize("heads_at_a_time", [1, 3])
def test_heads_in_turn_give_the_same_map(monkeypatch, heads_at_a_time):
    q, k, sizes = problem(B=2, H=2)
    together = top_p_block_map(q, k, sizes, torch.tensor([0.5, 0.9]), 0.1, 0.5, 0.8)
    monkeypatch.setattr(top_p, "SCORES", heads_at_a_time * 3 * 21)
    assert torch.equal(top_p_block_map(q, k, sizes, torch.tensor([0.5, 0.9]), 0.1, 0.5, 0.8), together)


def test_top_p_one_keeps_every_non_empty_cluster():
    q, k, sizes = problem(B=1)
    block_map = top_p_block_map(q * 100, k, sizes, 1.0, 0.0, 1.0)  # almost all mass in one cluster
    assert torch.equal(block_map, (sizes > 0).unsqueeze(2).expand_as(block_map))


def test_the_crossing_cluster_is_in():
    scores = torch.tensor([0.5, 0.3, 0.2]).log()
    q, k, sizes = torch.ones(1, 1, 1, 1), scores.view(1, 1, 3, 1), torch.ones(1, 1, 3, dtype=torch.int32)
    keep = [top_p_block_map(q, k, sizes, p, 0.0, 1.0)[0, 0, 0].tolist() for p in (0.01, 0.49, 0.51, 0.79, 0.81)]
    assert keep == [[True, False, False]] * 2 + [[True, True, False]] * 2 + [[True, True, True]]


def test_sizes_weigh():
    q, k = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 3, 1)
    sizes = torch.tensor([[[1, 98, 1]]], dtype=torch.int32)
    assert top_p_block_map(q, k, sizes, 0.9, 0.0, 1.0).tolist() == [[[[False, True, False]]]]


def test_ties_go_to_the_lowest_index():
    q, k, sizes = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 20, 4), torch.full((1, 1, 20), 3, dtype=torch.int32)
    kept = top_p_block_map(q, k, sizes, 0.48, 0.0, 1.0)
    assert kept[0, 0, 0].tolist() == [j < 10 for j in range(20)]
    kept = top_p_block_map(q, k, sizes, 0.01, 0.35, 1.0)
    assert kept[0, 0, 0].tolist() == [j < 7 for j in range(20)]


def test_negative_and_zero_scores_rank_in_order():
    logits = torch.tensor([-1.0, 0.0, -0.0, 2.0, -30.0, 1e-30, -200.0])
    q, k, sizes = torch.ones(1, 1, 1, 1), logits.view(1, 1, 7, 1), torch.ones(1, 1, 7, dtype=torch.int32)
    order = [3, 5, 1, 2, 0, 4, 6]
    for count in range(1, 8):
        kept = top_p_block_map(q, k, sizes, 1e-6, count / 7, 1.0)[0, 0, 0].nonzero().squeeze(1).tolist()
        assert kept == sorted(order[:count])


def test_budget_counts_tokens_and_leaves_one_cluster():
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([3.0, 2.0, 1.0, 0.0]).view(1, 1, 4, 1)
    sizes = torch.tensor([[[40, 30, 20, 10]]], dtype=torch.int32)
    kept = [
        top_p_block_map(q, k, sizes, 1.0, 1.0, 1.0, budget)[0, 0, 0].sum().item() for budget in (0.1, 0.69, 0.7, 1.0)
    ]
    assert kept == [1, 1, 2, 4]


def test_all_clusters_empty_selects_nothing():
    q, k, sizes = problem(B=1)
    assert not top_p_block_map(q, k, torch.zeros_like(sizes), 0.9, 0.1, 1.0).any()


@pytest.mark.parametrize(
    ("match", "changed"),
    [
        (r"top_p must be in \(0, 1\], got 0", {"top_p": 0}),
        (r"top_p must be in \(0, 1\], got 1.5", {"top_p": 1.5}),
        (r"min_k_ratio must be in \[0, 1\], got -0.1", {"min_k_ratio": -0.1}),
        (r"budget must be in \(0, 1\], got 0", {"budget": 0.0}),
        (r"k_sizes \[B, H, Ck\]", {"k_sizes": torch.ones(1, 1, 3, dtype=torch.int32)}),
    ],
)
def test_wrong_arguments_are_named(match, changed):
    q, k, sizes = problem()
    named = {"q_centroids": q, "k_centroids": k, "k_sizes": sizes, "top_p": 0.9, "min_k_ratio": 0.1, "sm_scale": 1.0}
    with pytest.raises(ValueError, match=match):
        top_p_block_map(**named | changed)


@pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")
def test_too_many_clusters_are_refused():
    with pytest.raises(NotImplementedError, match="at most 8192 key clusters"):
        top_p_block_map(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 8193, 1), torch.ones(1, 1, 8193).int(), 0.9, 0.1, 1.0)
