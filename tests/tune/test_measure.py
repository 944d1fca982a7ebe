"""What is measured: heads against their definition, single layers and heads in a real forward, and what tuning gains."""

import dataclasses

import numpy as np
import pytest
import torch

from svg.attend import attend
from svg.config import NearConfig, SVG1Config, SVG2Config
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState
from svg.methods.dense import dense_attention, key_mask
from svg.pipelines import GenerationRequest, accelerate, generate, load_pipeline, restore
from svg.recordings.record import RecordedCall
from svg.tune import curves
from svg.tune.allocate import Cost, Problem, uniform_cost, within
from svg.tune.calibrate import calibrate
from svg.tune.curves import Handed, curves_of, measure_call, row_of, typical

LAYOUT = TokenLayout(4, 6, 8)
SVG1 = SVG1Config(block_size=4, sample_rows=192)  # every row: kinds are the same in every call
SVG2 = SVG2Config(num_q_clusters=6, num_k_clusters=16, first_iterations=4, min_k_ratio=0.0)
LEVELS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 1.0)


def heads(layer, count=4, dim=16):
    """q, k, v [1, H, S, D] of heads from diffuse to sharp, over features that vary slowly in space and time."""
    generator = torch.Generator().manual_seed(layer)
    t, y, x = torch.meshgrid(*(torch.linspace(0, 3, n) for n in (4, 6, 8)), indexing="ij")
    waves = torch.stack([f(a * p.flatten()) for p in (t, y, x) for a in (1.0, 2.0) for f in (torch.sin, torch.cos)], -1)
    q, k, v = (waves @ torch.randn(count, waves.shape[1], dim, generator=generator) for _ in range(3))
    sharp = torch.linspace(0.3, 2.0, count)[:, None, None]
    return (q * sharp)[None], k[None], v[None]


def call(layer, num_layers=3, layout=LAYOUT):
    return RecordedCall(
        name="", step=1, num_steps=4, layer=layer, num_layers=num_layers, branch="cond", transformer="transformer", layout=layout
    )  # fmt: skip


@pytest.mark.parametrize(
    "config", [SVG1, SVG2, dataclasses.replace(SVG2, refresh=3, compensate=True)], ids=["svg1", "svg2", "shared"]
)
def test_a_call_against_its_definition(config):
    """Text with padding; a level is measured from clusters that one call has made."""
    layout = TokenLayout(3, 4, 6, 4, "last")
    q, k, v = (torch.randn(2, 3, layout.total_tokens, 16) for _ in range(3))
    mask = torch.arange(4) < torch.tensor([[1], [3]])
    row = measure_call(call(0, layout=layout), q, k, v, mask, config, LEVELS)
    assert (row["layer"], row["branch"], row["transformer"]) == (0, "cond", "transformer")
    exact = dense_attention(q, k, v, key_mask(layout, mask))
    for index, level in enumerate(LEVELS[:-1]):
        state = RunState(dataclasses.replace(config, warmup_steps=0.0, warmup_layers=0.0), 3)
        state.begin_forward(1, 4, "cond", layout)
        inputs = [x.transpose(1, 2) for x in (q, k, v)]
        attend(*inputs, state, 0, mask)
        state.config = dataclasses.replace(state.config, **{config.budget_field: level})
        state.layer(0).cache.pop("kept", None)
        out = attend(*inputs, state, 0, mask).transpose(1, 2)
        lost = (out - exact).square().sum((0, 2, 3)) / exact.square().sum()
        assert row["error"][index] == pytest.approx(lost.tolist(), rel=1e-3, abs=1e-9)
        assert row["density"][index] == pytest.approx(state.records[-1].density.mean(0).tolist())
    assert np.diff(np.array(row["density"]), axis=0).min() >= 0 and len(row["seconds"]) == len(LEVELS) - 1
    assert np.array(row["error"])[-1].sum() < np.array(row["error"])[0].sum()


NEAR = NearConfig(granule=8, rows=16, cluster_tokens=16, query_cluster_tokens=32, early=0.6, first_iterations=3)
NEAR_LEVELS = (0.3, 0.5, 1.0)


def branches(handed, budgets="heads"):
    """The rows of two guidance branches of a step, whose queries and keys differ."""
    return [
        measure_call(
            dataclasses.replace(call(0), branch=branch), *heads(seed), None, NEAR, NEAR_LEVELS, handed, budgets
        )
        for seed, branch in enumerate(("cond", "uncond"))
    ]


@pytest.mark.parametrize("budgets", ["heads", "layers"])
def test_branches_share_what_they_share_in_a_run(budgets):
    rows = branches(Handed(), budgets)
    for index, level in enumerate(NEAR_LEVELS[:-1]):
        own = dataclasses.replace(NEAR, warmup_steps=0.0, warmup_layers=0.0, early=0.0)
        state = RunState(own, 3)
        for step in (1, 2):  # the second one begins from clusters, as measured
            for seed, row in enumerate(rows):
                state.config = dataclasses.replace(own, head_budget=[row_of(level, 4, budgets)] * 3)
                state.begin_forward(step, 4, row["branch"], LAYOUT)
                q, k, v = heads(seed)
                out = attend(*(x.transpose(1, 2) for x in (q, k, v)), state, 0).transpose(1, 2)
                exact = dense_attention(q, k, v)
                if step == 2:
                    lost = (out - exact).square().sum((0, 2, 3)) / exact.square().sum()
                    assert row["error"][index] == pytest.approx(lost.tolist(), rel=0.02)
                    assert row["density"][index] == pytest.approx(state.records[-1].density.mean(0).tolist())
    assert rows[0]["density"] == rows[1]["density"]
    alone = branches(None, budgets)
    assert alone[0]["error"] == rows[0]["error"] and np.sum(alone[1]["error"]) < np.sum(rows[1]["error"])


@pytest.mark.parametrize(("config", "known"), [(NEAR, True), (SVG2, True), (SVG1, False),
                                               (dataclasses.replace(NEAR, refresh=2), False)])  # fmt: skip
def test_a_call_that_plans_nothing_is_measured_too(config, known, monkeypatch):
    reused = []

    def seen(*args):
        out = attend(*args)
        reused.append(args[3].records[-1].reused)
        return out

    monkeypatch.setattr(curves, "attend", seen)
    row = measure_call(call(0), *heads(0), None, config, NEAR_LEVELS)
    assert ("kept_seconds" in row) == known
    if known:
        assert row["kept_seconds"][1] == pytest.approx(sum(row["density"][-1])) and row["kept_seconds"][0] > 0
        assert reused == [False] * 4 + [True]


def test_what_branches_hand_on_is_bounded(monkeypatch):
    monkeypatch.setattr(curves, "HANDED_BYTES", 0)
    assert [row["error"] for row in branches(Handed())] == [row["error"] for row in branches(None)]


def test_a_level_is_of_the_whole_run():
    """`early` gives a step more or less of it, and what a whole run computes is the level."""
    row = measure_call(call(0), *heads(0), None, NEAR, NEAR_LEVELS)
    assert np.mean(row["density"], 1) == pytest.approx(NEAR_LEVELS[:-1], abs=0.03)


def test_heads_are_measured_with_budgets_of_their_own():
    """One budget for all is spent where a layer's error is largest: a head that is measured so would not get as much."""
    q, k, v = heads(0)
    row = measure_call(call(0), q, k, v, None, NEAR, NEAR_LEVELS)
    assert np.ptp(row["density"], axis=1).max() < 0.02
    own = dataclasses.replace(NEAR, warmup_steps=0.0, warmup_layers=0.0, early=0.0, budget=0.5)
    state = RunState(own, 3)
    for step in (1, 2):  # the second one begins from clusters, as measured
        state.begin_forward(step, 4, "cond", LAYOUT)
        attend(*(x.transpose(1, 2) for x in (q, k, v)), state, 0)
    assert np.ptp(state.records[-1].density.numpy()) > 0.05
    layers = measure_call(call(0), q, k, v, None, NEAR, NEAR_LEVELS, budgets="layers")
    assert layers["density"][1] == pytest.approx(state.records[-1].density.mean(0).tolist())


def test_curves_of_layers():
    """Errors of heads are added up; no single call that loses much decides."""
    calls = [[[0.01, 0.03], [0.0, 0.0]], [[0.5, 0.5], [0.1, 0.1]]]  # [levels][heads]
    rows = [{"layer": 1, "error": error, "density": [[0.1, 0.3], [0.4, 0.4]]} for error in calls]
    curves = curves_of(rows, NEAR_LEVELS, 2, "layers")
    assert curves.error.shape == (2, 1, 3) and curves.heads == 2 and curves.measured.tolist() == [False, True]
    assert curves.error[1, 0] == pytest.approx([0.2, (1e-12 * 0.2) ** 0.5, 0.0])
    assert curves.density[1, 0] == pytest.approx([0.2, 0.4, 1.0])
    assert curves_of(rows, NEAR_LEVELS, 2).error[1, :, 0] == pytest.approx([0.255, 0.265])
    assert typical(np.array([0.0, 0.0])) > 0


def losses(config, layers):
    """Squared error of each layer's output as a share of it, and mean density, when run as configured."""
    state = RunState(dataclasses.replace(config, warmup_steps=0.0, warmup_layers=0.0), len(layers))
    state.begin_forward(1, 4, "cond", LAYOUT)
    lost = []
    for _ in range(2):  # the second call starts from clusters, as measured
        lost, state.records = [], []
        for layer, (q, k, v) in enumerate(layers):
            out = attend(*(x.transpose(1, 2) for x in (q, k, v)), state, layer).transpose(1, 2)
            exact = dense_attention(q, k, v)
            lost.append(((out - exact).square().sum() / exact.square().sum()).item())
    return sum(lost), torch.stack([record.density.mean() for record in state.records]).mean().item()


@pytest.mark.parametrize("config", [SVG1, SVG2], ids=["svg1", "svg2"])
def test_tuned_budgets_beat_one_for_all(config):
    """At no more density, on the tensors that were measured, executed for real."""
    layers = [heads(layer) for layer in range(3)]
    rows = [measure_call(call(layer), *tensors, None, config, LEVELS) for layer, tensors in enumerate(layers)]
    curves = curves_of(rows, LEVELS, 3)
    problem = Problem(curves, np.ones((3, 4)), Cost(0.0, 1.0, 4.0, "density"), curves.measured)
    gained = []
    for value in (0.4, 0.6, 0.8):
        uniform, spent = losses(dataclasses.replace(config, **{config.budget_field: value}), layers)
        found = within(problem, uniform_cost(problem, value))
        tuned, density = losses(dataclasses.replace(config, **{config.head_field: found.table()}), layers)
        assert density <= spent + 0.01 and tuned <= uniform + 1e-9
        gained.append(1 - tuned / uniform)
    assert max(gained) > 0.15


REQUEST = GenerationRequest(prompt="a red ball", height=32, width=48, num_frames=9, steps=3)


@pytest.mark.parametrize("probe", ["heads", "layers"])
def test_calibration_of_a_pipeline(model, probe):
    """Effects of step 0 are the distances of real sparse runs' first predictions: their inputs are the same there."""
    config = SVG2Config(num_q_clusters=3, num_k_clusters=6, first_iterations=2, min_k_ratio=0.0, warmup_layers=0.3)
    pipe = load_pipeline(model, device="cpu")
    before = list(pipe.transformer.attn_processors.values())
    plain = generate(pipe, REQUEST).frames
    seen = []
    found = calibrate(pipe, REQUEST, config, (0.6, 1.0), [0, 2], probe, seen.append)
    assert len(seen) == 3 and list(pipe.transformer.attn_processors.values()) == before
    assert not pipe.transformer._forward_hooks
    assert (found["num_layers"], found["heads"], found["tokens"], found["device"]) == (3, 2, [3, 2, 3], "cpu")
    # Layer 0 is warm-up. Steps, branches, layers 1 and 2.
    assert [(r["step"], r["branch"], r["layer"]) for r in found["rows"][:4]] == [
        (0, "cond", 1), (0, "cond", 2), (0, "uncond", 1), (0, "uncond", 2),
    ]  # fmt: skip
    assert len(found["rows"]) == 8 and len(found["effects"]) == (16 if probe == "heads" else 8)
    assert len(found["dense_seconds"]) == 3 * 2 * 3
    expected = predictions(pipe, None)
    for effect in (e for e in found["effects"] if e["step"] == 0):
        table = [[1.0, 1.0] for _ in range(3)]
        for head in effect["heads"]:
            table[effect["layer"]][head] = 0.6
        changed = predictions(pipe, dataclasses.replace(config, head_top_p=table, warmup_steps=0.0, warmup_layers=0.0))
        branch = ("cond", "uncond").index(effect["branch"])
        distance = (changed[branch] - expected[branch]).square().sum() / expected[branch].square().sum()
        assert effect["effect"] == pytest.approx(distance.item(), rel=0.02) and effect["effect"] > 0
    assert np.array_equal(generate(pipe, REQUEST).frames, plain)


def predictions(pipe, config):
    """The first step's predictions, cond and uncond, plain or accelerated."""
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    try:
        if config is not None:
            accelerate(pipe, config)
        generate(pipe, REQUEST)
    finally:
        handle.remove()
        restore(pipe)
    return seen[:2]
