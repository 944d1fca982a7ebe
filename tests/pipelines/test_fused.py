"""QK-norm and RoPE in one kernel give the stock pipeline's result, and the report says that they ran so."""

import pytest
import torch
from torch import nn

import svg
from svg.config import DenseConfig, SVG2Config
from svg.pipelines import processor


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox_1_5"])
def test_fused_equals_stock(load, run, name, monkeypatch):
    pipe = load(name)
    stock = run(pipe, steps=2)
    calls, real = [], processor.norm_rope
    monkeypatch.setattr(processor, "norm_rope", lambda x, *args, **kw: calls.append(x.shape) or real(x, *args, **kw))
    fused = run(svg.accelerate(pipe, DenseConfig(fused=True)), steps=2)
    torch.testing.assert_close(fused, stock, rtol=0, atol=1e-5)
    report = svg.report(pipe)
    assert report["config"]["fused"] is True
    assert len(calls) == 2 * report["transformers"]["transformer"]["calls"]["total"]
    run(svg.accelerate(pipe, DenseConfig()), steps=2)
    assert len(calls) == 2 * report["transformers"]["transformer"]["calls"]["total"]


def test_sparse_and_fused(load, run):
    pipe, small = load("wan"), {"num_q_clusters": 3, "num_k_clusters": 5, "warmup_steps": 0.0, "warmup_layers": 0.0}
    plain = run(svg.accelerate(pipe, SVG2Config(**small, top_p=1.0)), steps=2)
    fused = run(svg.accelerate(pipe, SVG2Config(**small, top_p=1.0, fused=True)), steps=2)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)


def test_norms_that_cannot_be_read_are_refused():
    x, angle = torch.zeros(1, 3, 1, 8), torch.zeros(3, 8)
    with pytest.raises(NotImplementedError, match="fused needs RMSNorm or LayerNorm, got GroupNorm"):
        processor.norm_and_rotate(x, nn.GroupNorm(1, 8), angle, angle)
    with pytest.raises(NotImplementedError, match="norm weights on cpu, got meta"):
        processor.norm_and_rotate(x, nn.RMSNorm(8, device="meta"), angle, angle)
    with pytest.raises(TypeError, match="fused must be true or false"):
        DenseConfig(fused=1)
