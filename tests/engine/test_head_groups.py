"""Heads that run in turn, because lists of all their blocks would be large, give what they give together."""

import pytest
import torch

from svg.attend import attend
from svg.config import SpargeConfig, SVG2Config
from svg.engine import execute as plans
from svg.engine.layout import TokenLayout
from svg.engine.plan import Plan
from svg.engine.repair import repair, restricted_to_heads
from svg.engine.state import RunState

LAYOUT = TokenLayout(3, 6, 8, 9, "last")
ALWAYS = {"warmup_steps": 0, "warmup_layers": 0}
SVG2 = {**ALWAYS, "top_p": 0.6, "min_k_ratio": 0.0, "num_q_clusters": 5, "num_k_clusters": 9, "first_iterations": 2}
CONFIGS = {
    "svg2": SVG2Config(**SVG2),
    "svg2 tiles": SVG2Config(selection="tiles", **SVG2),
    "svg2 compensate": SVG2Config(compensate=True, **SVG2),
    "svg2 int8": SVG2Config(precision="int8-fp8", **SVG2),
    "svg2 int8 compensate": SVG2Config(precision="int8-fp8", compensate=True, **SVG2),
    "sparge int8": SpargeConfig(topk=0.5, precision="int8-fp8", **ALWAYS),
}


def inputs():
    torch.manual_seed(0)
    return [torch.randn(2, LAYOUT.total_tokens, 3, 32) for _ in range(3)]


def run(config):
    state = RunState(config, num_layers=1)
    state.begin_forward(0, 1, "cond", LAYOUT)
    mask = torch.ones(2, LAYOUT.text_tokens, dtype=torch.bool)
    mask[1, 4:] = False
    out = attend(*inputs(), state, 0, mask)
    return out, state.records[-1].density


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("blocks", [1, 300])
def test_same_output_and_density(monkeypatch, config, blocks):
    out, density = run(config)
    monkeypatch.setattr(plans, "LISTED_BLOCKS", blocks)
    again, density_again = run(config)
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-6)  # products of other batch sizes round differently
    assert torch.equal(density, density_again)


def test_groups_cover_all_heads_once(monkeypatch):
    made = []
    monkeypatch.setattr(plans, "_execute", lambda plan, q, k, v, precision, failed: made.append(plan) or q)
    monkeypatch.setattr(plans, "LISTED_BLOCKS", 160)  # of 7 x 11 a head
    out, _ = run(CONFIGS["svg2"])
    assert torch.equal(out, inputs()[0])
    assert len(made) == 4 and sum(part.map_index.numel() for part in made) == 6
    assert all(part.map_index.tolist() == [list(range(part.map_index.shape[1]))] for part in made)


def test_a_repair_in_turn(monkeypatch):
    seen = []
    monkeypatch.setattr(plans, "_execute", lambda plan, *rest: seen.append(plan) or rest[0])
    run(CONFIGS["svg2"])
    plan, (q, k, v) = seen[0], (x.transpose(1, 2) for x in inputs())
    failed = torch.tensor([[0, 1, 0], [1, 0, 1]], dtype=torch.int32)
    together, apart = torch.zeros_like(q), torch.zeros_like(q)
    repair(plan, q, k, v, together, failed)
    monkeypatch.setattr(plans, "LISTED_BLOCKS", 1)
    repair(plan, q, k, v, apart, failed)
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)
    assert torch.equal(apart.abs().amax((2, 3)) > 0, failed != 0)


@pytest.mark.parametrize("own", [True, False])
def test_maps_that_no_failed_head_uses_have_no_queries(own):
    sizes = torch.tensor([[3, 5], [4, 4], [1, 7], [8, 0]], dtype=torch.int32)
    maps = 4 if own else 2
    plan = Plan(
        q_permutation=None,
        k_permutation=None,
        q_sizes=sizes[:maps],
        k_sizes=sizes[:maps],
        block_map=torch.ones(maps, 2, 2, dtype=torch.bool),
        map_index=torch.tensor([[0, 1], [2, 3]] if own else [[0, 1], [1, 0]], dtype=torch.int32),
        visible_keys=torch.full((maps,), 8),
    )
    only = restricted_to_heads(plan, torch.tensor([[0, 0], [0, 1]], dtype=torch.int32), skip=True)
    used = 3 if own else 0
    assert only.map_index.tolist() == [[maps, maps], [maps, used]]
    expected = torch.zeros(maps + 1, 2, dtype=torch.int32)
    expected[used] = sizes[used]
    assert torch.equal(only.q_sizes, expected)
    assert only.block_map.shape[0] == only.k_sizes.shape[0] == maps + 1 and not only.block_map[maps].any()
