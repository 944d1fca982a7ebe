"""Clusterings of SVG2 that are kept for several calls, and what ends that early."""

import dataclasses
import math

import pytest
import torch

from svg.config import SVG2Config
from svg.engine.layout import TokenLayout
from svg.engine.state import LayerState, RunState
from svg.methods import reuse
from svg.methods.svg2 import plan as svg2

LAYOUT = TokenLayout(3, 3, 4, 5, "last")
SMALL = {"num_q_clusters": 5, "num_k_clusters": 9, "first_iterations": 4, "warmup_steps": 0, "warmup_layers": 0}


def test_refresh_keeps_map_and_order_and_renews_the_means(layout, make_qkv, make_mask, make_state):
    mask = make_mask(layout)
    config = SVG2Config(**SMALL, top_p=0.3, min_k_ratio=0.0, refresh=3, compensate=True)
    memory = LayerState(0, "cond", 7)
    steps = [[x.transpose(1, 2) for x in make_qkv(layout, seed=step)] for step in range(5)]
    plans = [svg2.plan(q, k, v, config, memory, layout, mask) for q, k, v in steps]
    for i in (1, 2, 4):
        first = plans[i - i % 3]
        assert torch.equal(plans[i].block_map, first.block_map)
        assert torch.equal(plans[i].k_permutation, first.k_permutation)
        assert torch.equal(plans[i].tail.bias, first.tail.bias)
        keys = plans[i].k_permutation[0, 0].long()[: plans[i].k_sizes[0, 0]]
        if len(keys):
            torch.testing.assert_close(plans[i].tail.k[0, 0, 0], steps[i][1][0, 0, keys].mean(0))
    assert not torch.equal(plans[3].k_permutation, plans[0].k_permutation)
    state = make_state(config, layout)
    state.layer(0).cache["kept"] = "of an earlier run"
    state.begin_run()
    state.begin_forward(0, 10, "cond", layout)
    assert "kept" not in state.layer(0).cache


DRIFTING = SVG2Config(**SMALL, top_p=0.3, min_k_ratio=0.0, refresh=5, max_drift=0.25)


def drifting_inputs(layout, make_qkv, speeds):
    """q, k, v of forwards whose tokens move by a speed a step."""
    inputs, place = [x.transpose(1, 2) for x in make_qkv(layout)], 0.0
    direction = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in inputs]
    for speed in speeds:
        place += speed
        yield [x + place * d for x, d in zip(inputs, direction)]


def drifting_run(layout, make_qkv, config, speeds, mask=None):
    """Every forward's plan, all from one layer's state."""
    state, plans = RunState(config, 1), []
    for step, (q, k, v) in enumerate(drifting_inputs(layout, make_qkv, speeds)):
        state.begin_forward(step, len(speeds), "cond", layout)
        plans.append(svg2.plan(q, k, v, config, state.layer(0), layout, mask))
    return plans


def expected_reuse(config, inputs, layout):
    """Which calls share an earlier one's clustering, from whole tokens in float64."""
    made, calls, a_call, out = None, 0, math.inf, []
    for q, k, _ in inputs:
        now = torch.stack([x[:, :, layout.video_slice].double() for x in (q, k)])
        shared = made is not None and calls < config.refresh and a_call * calls <= config.max_drift
        if made is not None:
            spread = (made - made.mean(-2, keepdim=True)).norm(dim=(-2, -1))
            a_call = ((now - made).norm(dim=(-2, -1)) / spread).max().item() / calls
        made, calls = (made, calls + 1) if shared else (now, 1)
        out.append(shared)
    return out


@pytest.mark.parametrize("speed", [0.0, 0.1, 0.2, 1.0])
def test_a_drift_beyond_the_bound_clusters_anew(layout, make_qkv, make_mask, speed):
    speeds = [speed] * 9  # fewer tokens than are sampled: all of them count
    reused = [plan.reused for plan in drifting_run(layout, make_qkv, DRIFTING, speeds, make_mask(layout))]
    assert reused == expected_reuse(DRIFTING, drifting_inputs(layout, make_qkv, speeds), layout)
    assert not any(reused[:2])  # the second call knows no drift yet
    if speed == 0.0:
        assert reused[2:] == [True] * 4 + [False] + [True] * 2


def test_drift_is_measured_against_the_clustering(layout, make_qkv):
    q, k, _ = (x.transpose(1, 2) for x in make_qkv(layout))
    moved = q.clone()
    moved[1, 2] *= 1.5  # one head of one sample
    rows = reuse.sample_rows(q, k)
    sample = reuse.with_spread(rows)
    picked = rows[0, 1, 2].double()
    expected = 0.5 * picked.norm() / (picked - picked.mean(0)).norm()
    torch.testing.assert_close(reuse.drift(reuse.sample_rows(moved, k), sample).double(), expected, rtol=1e-5, atol=0)
    assert reuse.drift(rows, sample) == 0


@pytest.mark.parametrize("tokens", [1, 5, 64, 130, 9216, 75600])
def test_sampled_rows_are_spread(tokens):
    x = torch.arange(tokens, dtype=torch.float32).expand(1, 1, tokens)[..., None]
    rows = reuse.sample_rows(x, x)[0, 0, 0, :, 0]
    assert min(tokens, 43) <= len(rows) <= 64 and rows[-1] >= (tokens - 1) - tokens / 32
    columns = {int(row) % 32 for row in rows}
    assert tokens < 9216 or len(columns) == 32


def test_a_run_with_a_bound_on_drift_repeats_bit_for_bit(layout, make_qkv):
    speeds = [0.0, 0.05, 0.3, 0.0, 0.01, 0.2, 0.0]
    first, second = (drifting_run(layout, make_qkv, DRIFTING, speeds) for _ in range(2))
    assert {plan.reused for plan in first} == {False, True}
    for a, b in zip(first, second):
        assert (
            a.reused == b.reused
            and torch.equal(a.block_map, b.block_map)
            and torch.equal(a.k_permutation, b.k_permutation)
        )


def test_a_drift_that_is_not_a_number_clusters_anew(make_qkv):
    state = LayerState(0, "cond", 7)
    state.cache.update(kept=reuse.SharedClustering(None, None, 1, None), drift_a_call=math.nan)
    assert reuse.still_good(state, DRIFTING) is None
    state.cache["drift_a_call"] = 0.2
    assert reuse.still_good(state, DRIFTING) is not None


def test_the_density_of_a_shared_plan_is_that_of_a_new_one(layout, make_qkv, make_mask):
    config = dataclasses.replace(DRIFTING, max_drift=None, compensate=True)
    for plan in drifting_run(layout, make_qkv, config, [0.1] * 3, make_mask(layout)):
        assert torch.equal(plan.density(), dataclasses.replace(plan).density())


def test_a_bound_on_drift_needs_refresh():
    with pytest.raises(ValueError, match="max_drift must come with refresh"):
        SVG2Config(max_drift=0.1)
    with pytest.raises(ValueError, match="max_drift must be > 0"):
        SVG2Config(max_drift=0.0, refresh=4)
    with pytest.raises(TypeError):
        SVG2Config(max_drift=True, refresh=4)
