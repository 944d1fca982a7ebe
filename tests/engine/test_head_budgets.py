"""Budgets of their own for every head: each head is computed as if its budget were everybody's."""

import dataclasses
import json

import pytest
import torch

from svg.attend import attend, dense_attention
from svg.config import SVG1Config, SVG2Config, TunedFor, config_from_dict
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState
from svg.methods.dense import key_mask

GRID = TokenLayout(3, 3, 4)
ALWAYS = {"warmup_steps": 0, "warmup_layers": 0}
SVG1 = SVG1Config(block_size=4, sample_rows=8, **ALWAYS)
SVG2 = SVG2Config(num_q_clusters=5, num_k_clusters=9, first_iterations=4, min_k_ratio=0.0, **ALWAYS)
SHARES = (0.3, 0.9, 0.6)


def run(config, layout, qkv, mask=None, layer=1, steps=2):
    """Output of the last step and its record."""
    state = RunState(config, 2)
    for step in range(steps):
        state.begin_forward(step, steps, "cond", layout)
        out = attend(*qkv, state, layer, mask)
    return out, state.records[-1]


@pytest.mark.parametrize("config", [SVG1, SVG2], ids=["svg1", "svg2"])
@pytest.mark.parametrize("padded", [False, True])
def test_every_head_as_with_its_budget_alone(layout, config, padded, make_qkv, make_mask):
    qkv = make_qkv(layout, heads=3)
    mask = make_mask(layout) if padded else None
    own = dataclasses.replace(config, **{config.head_field: ((1.0, 0.5, 0.5), SHARES)})
    out, record = run(own, layout, qkv, mask)
    for head, share in enumerate(SHARES):
        alike, expected = run(dataclasses.replace(config, **{config.budget_field: share}), layout, qkv, mask)
        torch.testing.assert_close(out[:, :, head], alike[:, :, head], rtol=1e-5, atol=1e-6)
        assert torch.equal(record.density[:, head], expected.density[:, head])
        if record.kind is not None:
            assert torch.equal(record.kind[:, head], expected.kind[:, head])
    assert layout.frames == 1 or record.density[:, 0].mean() < record.density[:, 1].mean()


@pytest.mark.parametrize("config", [SVG1, SVG2], ids=["svg1", "svg2"])
def test_a_layer_of_ones_runs_dense(layout, config, make_qkv, make_mask):
    qkv, mask = make_qkv(layout), make_mask(layout)
    own = dataclasses.replace(config, **{config.head_field: ((1.0, 1.0, 1.0), SHARES)})
    out, record = run(own, layout, qkv, mask, layer=0)
    dense = dense_attention(*(x.transpose(1, 2) for x in qkv), key_mask(layout, mask)).transpose(1, 2)
    assert record.dense and torch.equal(out, dense)
    assert not run(own, layout, qkv, mask, layer=1)[1].dense


def test_round_trip():
    tuned = TunedFor(model="m", fingerprint=None, tokens=(3, 3, 4), device="cpu")
    for config in (SVG1, SVG2):
        own = dataclasses.replace(config, **{config.head_field: ((0.5, 1.0),)}, tuned_for=tuned)
        assert config_from_dict(json.loads(json.dumps(own.to_dict()))) == own
        assert config_from_dict(own.to_dict()) == own


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (0.5, TypeError, r"head_top_p must be \[layers\]\[heads\], got 0.5"),
        ([0.5], TypeError, r"head_top_p must be \[layers\]\[heads\]"),
        ([], ValueError, "the same heads in every layer"),
        ([[0.5], [0.5, 0.5]], ValueError, r"the same heads in every layer, got \[1, 2\]"),
        ([[0.5], ["x"]], TypeError, "must hold numbers, got 'x' in layer 1, head 0"),
        ([[0.5, 0.0]], ValueError, r"must be in \(0, 1\], got 0.0 in layer 0, head 1"),
        ([[float("nan")]], ValueError, "got nan in layer 0, head 0"),
    ],
)
def test_impossible_tables_raise(table, error, message):
    with pytest.raises(error, match=message):
        SVG2Config(head_top_p=table)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"model": "m"}, ValueError, "tuned_for must have the keys model, fingerprint, tokens, device, got model"),
        ("m", TypeError, "tuned_for must be keys and values"),
        ({"model": "m", "fingerprint": None, "tokens": [1, 2], "device": "cpu"}, TypeError, "tokens must be three"),
        ({"model": 3, "fingerprint": None, "tokens": [1, 2, 3], "device": "cpu"}, TypeError, "model must be text"),
    ],
)
def test_impossible_tunings_raise(value, error, message):
    with pytest.raises(error, match=message):
        SVG1Config(tuned_for=value)


@pytest.mark.parametrize(
    ("table", "tuned", "message"),
    [
        ([[0.5] * 3], None, r"head_top_p must be \[layers\]\[heads\] = \[2\]\[3\] in transformer, got \[1\]\[3\]"),
        ([[0.5] * 4] * 2, None, r"got \[2\]\[4\]: it was made for another model"),
        ([[0.5] * 3] * 2, ((3, 3, 5), "cpu"), "tuned for, 3x3x5, got 3x3x4: run `svg tune` for this one, or"),
        (
            [[0.5] * 3] * 2,
            ((3, 3, 4), "NVIDIA H100"),
            "tuned for, NVIDIA H100, got cpu: run `svg tune` .* tuned_for=null",
        ),
    ],
)
def test_budgets_of_something_else_are_refused(table, tuned, message, make_qkv):
    """At the first call of a run, though that one is a dense one of the warm-up."""
    if tuned is not None:
        tuned = TunedFor(model="m", fingerprint=None, tokens=tuned[0], device=tuned[1])
    config = SVG2Config(head_top_p=table, tuned_for=tuned, warmup_steps=0.5)
    with pytest.raises(ValueError, match=message):
        run(config, GRID, make_qkv(GRID))
    run(dataclasses.replace(config, head_top_p=None, tuned_for=None), GRID, make_qkv(GRID))
