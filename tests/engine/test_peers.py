"""Heads of a layer on several processes: how they are dealt, and what moves with them."""

import pytest
import torch
from replayed_peers import on_all

from svg.config import NearConfig
from svg.engine.layout import TokenLayout
from svg.engine.peers import Peers, balanced_deal, bounds, even_deal
from svg.engine.state import RunState


def load(work, deal):
    return [sum(work[head] for head in hand) for hand in deal]


def test_even_deals_are_as_torch_splits():
    for heads, ranks in ((3, 2), (24, 4), (7, 3), (5, 5)):
        assert even_deal(heads, ranks) == tuple(
            tuple(part.tolist()) for part in torch.arange(heads).tensor_split(ranks)
        )


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_work_is_even_and_every_head_is_dealt_once(ranks):
    generator = torch.Generator().manual_seed(ranks)
    for heads in (24, 40, 41):
        work = torch.rand(heads, generator=generator).square().sort().values.tolist()
        deal = balanced_deal(work, ranks)
        assert sorted(sum(deal, ())) == list(range(heads))
        assert [len(hand) for hand in deal] == [len(hand) for hand in even_deal(heads, ranks)]
        imbalance = max(load(work, deal)) * ranks / sum(work)
        before = max(load(work, even_deal(heads, ranks))) * ranks / sum(work)
        assert before > 1.3 and imbalance < 1 + 0.4 * (before - 1)


def test_heads_stay_where_moving_them_gains_nothing():
    assert balanced_deal([0.25] * 8, 2) == even_deal(8, 2)
    assert balanced_deal([1.0, 0.99, 1.0, 1.0], 2) == even_deal(4, 2)


def test_a_part_of_everyones_heads_is_counted_anew():
    peers = Peers(((0, 3, 4), (1, 2)), 1)
    assert [peers.part(index, 2).deal for index in range(2)] == [((0, 2), (1,)), ((1,), (0,))]
    assert bounds(5, 2) == [(0, 2), (2, 5)]


def test_sums_of_the_processes_before():
    numbers = torch.tensor([5, 7], dtype=torch.int32)
    found = on_all(((0,), (1,), (2,)), lambda peers: peers.before(numbers * (peers.rank + 1)))
    assert [part.tolist() for part in found] == [[0, 0], [5, 7], [15, 21]]
    assert found[0].dtype == torch.int32


def test_centroids_go_with_their_heads_and_all_else_is_made_anew():
    before, after = ((0, 1), (2,)), ((1, 2), (0,))
    centroids = torch.randn(2, 3, 4, 8)

    def run(peers):
        state = RunState(NearConfig(), num_layers=1)
        state.begin_forward(0, 1, "cond", TokenLayout(1, 2, 2))
        state.peers = peers
        layer = state.layer(0)
        layer.cache = {
            "kept": object(),
            "q_centroids": centroids[:, peers.own],
            "k_centroids": -centroids[:, peers.own],
        }
        state.peers = Peers(after, peers.rank)
        return state.layer(0).cache

    for heads, cache in zip(after, on_all(before, run)):
        assert sorted(cache) == ["k_centroids", "q_centroids"]
        assert torch.equal(cache["q_centroids"], centroids[:, list(heads)])
        assert torch.equal(cache["k_centroids"], -centroids[:, list(heads)])


def test_work_is_dealt_from_the_next_forward_on():
    state = RunState(NearConfig(), num_layers=2)
    state.begin_forward(0, 2, "cond", TokenLayout(1, 2, 2))
    state.peers = Peers(even_deal(4, 2), 0)
    state.note_work(1, torch.tensor([0.9, 0.8, 0.1, 0.2]))
    assert state.deals == {}
    state.begin_forward(1, 2, "cond", TokenLayout(1, 2, 2))
    assert state.deals == {1: ((0, 2), (1, 3))}
    state.begin_run()
    assert state.deals == {} and state.peers is None
