"""QK-norm and RoPE in one kernel give the stock pipeline's result, and the report says that they ran so."""

from types import SimpleNamespace

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


def test_norms_that_cannot_be_read_run_by_themselves(load, run, monkeypatch):
    x = torch.zeros(1, 3, 1, 8)
    assert processor.is_readable(nn.RMSNorm(8), x) and processor.is_readable(nn.LayerNorm(8), x)
    assert not processor.is_readable(nn.GroupNorm(1, 8), x) and not processor.is_readable(None, x)
    assert not processor.is_readable(nn.RMSNorm(8, device="meta"), x)
    monkeypatch.setattr(processor, "is_readable", lambda norm, x: False)
    monkeypatch.setattr(processor, "norm_rope", None)
    pipe = load("wan")
    stock = run(pipe, steps=2)
    torch.testing.assert_close(run(svg.accelerate(pipe, DenseConfig(fused=True)), steps=2), stock, rtol=0, atol=1e-5)


def test_fused_by_default_is_for_gpus_and_without_gradients(load, monkeypatch):
    pipe = load("wan")
    svg.accelerate(pipe, DenseConfig())
    own, norm = pipe.transformer.blocks[0].attn1.processor, nn.RMSNorm(8)
    on_gpu = SimpleNamespace(is_cuda=True, shape=(1, 3, 8), device=norm.weight.device)
    with torch.no_grad():
        assert own.fuses(on_gpu, norm) and not own.fuses(torch.zeros(1, 3, 8), norm)
    assert not own.fuses(on_gpu, norm)
    svg.accelerate(pipe, DenseConfig(fused=False))
    with torch.no_grad():
        assert not pipe.transformer.blocks[0].attn1.processor.fuses(on_gpu, norm)
    with pytest.raises(TypeError, match="fused must be true, false or null"):
        DenseConfig(fused=1)
