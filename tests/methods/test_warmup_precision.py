"""Dense calls of a sparse method's warm-up in 8 bits."""

import pytest
import torch

from svg.attend import attend
from svg.config import NearConfig, Sage2Config, SVG1Config, config_from_dict
from svg.engine import residual
from svg.engine.layout import TokenLayout
from svg.engine.summary import summarize

VIDEO = TokenLayout(4, 6, 8)
STEPS = 4


def settings(method=NearConfig, **options):
    return method(warmup_steps=0.5, warmup_layers=0.0, warmup_precision="int8-fp8", **options)


def outputs(config, make_qkv, make_state, layout=VIDEO, mask=None):
    state, found = make_state(config, layout, step=0, num_steps=STEPS), []
    for step in range(STEPS):
        state.begin_forward(step, STEPS, "cond", layout)
        found.append(attend(*make_qkv(layout, dtype=torch.bfloat16), state, 0, mask))
    return found, state


@pytest.mark.parametrize("method", [NearConfig, SVG1Config])
def test_dense_steps_are_those_of_sage2_and_sparse_ones_stay_in_16_bits(method, make_qkv, make_state):
    found, state = outputs(settings(method), make_qkv, make_state)
    sage, _ = outputs(Sage2Config(precision="int8-fp8"), make_qkv, make_state)
    native, _ = outputs(method(warmup_steps=0.5, warmup_layers=0.0), make_qkv, make_state)
    assert all(torch.equal(found[step], sage[step]) for step in (0, 1))
    assert all(torch.equal(found[step], native[step]) for step in (2, 3))
    assert not torch.equal(found[0], native[0])
    assert [(record.dense, record.precision) for record in state.records] == [(True, "int8-fp8")] * 2 + [
        (False, None)
    ] * 2
    report = summarize(state)
    assert report["calls"]["dense"] == 2 and report["steps"] == {"total": 4, "dense": 2}
    assert report["quantised"]["precisions"]["int8-fp8"]["calls"] == 2
    assert report["quantised"]["guard"]["probed_calls"] == 1  # every tenth step of a layer


def test_padding_is_not_seen(make_qkv, make_state, make_mask):
    layout = TokenLayout(4, 6, 8, text_tokens=20, text_position="last")
    mask = make_mask(layout)
    found, _ = outputs(settings(), make_qkv, make_state, layout, mask)
    sage, _ = outputs(Sage2Config(precision="int8-fp8"), make_qkv, make_state, layout, mask)
    assert torch.equal(found[0], sage[0])


def test_what_is_too_short_stays_in_16_bits(make_qkv, make_state):
    native, _ = outputs(NearConfig(warmup_steps=0.5, warmup_layers=0.0), make_qkv, make_state)
    found, state = outputs(settings(min_tokens=10_000), make_qkv, make_state)
    assert torch.equal(found[0], native[0]) and all(record.precision is None for record in state.records)


def test_the_residual_is_what_dense_attention_in_8_bits_loses(make_qkv, make_state, monkeypatch):
    kept = []
    monkeypatch.setattr(residual, "keep", lambda state, layer, dense, sparse: kept.append(dense))
    found, _ = outputs(settings(residual=1.0), make_qkv, make_state)
    assert len(kept) == 1 and torch.equal(kept[0].transpose(1, 2), found[1])


def test_a_precision_that_is_none_is_refused():
    with pytest.raises(ValueError, match="warmup_precision must be one of native, int8-fp8, int8-fp16, got 'fp8'"):
        NearConfig(warmup_precision="fp8")
    with pytest.raises(ValueError, match="'warmup_precision' for method sage2 .it belongs to near"):
        config_from_dict({"method": "sage2", "warmup_precision": "int8-fp8"})
