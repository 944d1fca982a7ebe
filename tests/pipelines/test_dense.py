"""Dense attention through our processors is the stock pipeline."""

import pytest
import torch

import svg
from svg.config import DenseConfig
from svg.pipelines import processor

# name -> attention calls of 5 steps: steps x layers x guidance branches
FAMILIES = {
    "wan": 30,
    "wan_euler": 30,
    "wan_5b": 30,
    "wan_2_2": 30,
    "wan_i2v": 30,
    "wan_5b_i2v": 30,
    "hunyuan": 20,
    "cogvideox_2b": 15,
    "cogvideox_1_5": 15,
    "cogvideox_i2v": 15,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_equals_stock_and_restore_is_exact(load, run, name):
    pipe = load(name)
    stock = run(pipe)
    attributes = {n: set(vars(module)) for n, module in svg.pipelines.attach.transformers_of(pipe).items()}
    processors = {n: getattr(pipe, n).attn_processors for n in attributes}

    assert svg.accelerate(pipe, DenseConfig()) is pipe
    dense = run(pipe)
    torch.testing.assert_close(dense, stock, rtol=0, atol=1e-5)
    assert sum(part["calls"]["total"] for part in svg.report(pipe)["transformers"].values()) == FAMILIES[name]
    for n, before in processors.items():
        changed = [key for key, value in getattr(pipe, n).attn_processors.items() if value is not before[key]]
        assert changed and not any("attn2" in key or "refiner" in key for key in changed)

    assert svg.restore(pipe) is pipe
    for n, before in processors.items():
        after = getattr(pipe, n).attn_processors
        assert list(after) == list(before) and all(after[key] is before[key] for key in before)
        assert set(vars(getattr(pipe, n))) == attributes[n]
    assert torch.equal(run(pipe), stock)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_depends_on_attention(load, run, name, monkeypatch):
    """Without this, equality above would say nothing."""
    pipe = load(name)
    stock = run(pipe, steps=2)
    monkeypatch.setattr(processor, "attend_uncompiled", lambda q, k, v, *args, **kwargs: v)
    off = run(svg.accelerate(pipe, DenseConfig()), steps=2)
    assert (off - stock).abs().max() > 1e-2
