"""`svg.sparge_attention` in the place of PyTorch's scaled_dot_product_attention."""

import pytest
import torch
import torch.nn.functional as F

import svg
from svg.attend import attend
from svg.config import SpargeConfig
from svg.engine import execute
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState

GRID = (3, 9, 11)


def inputs(S=300, Sk=None, heads=4, kv_heads=None, D=32):
    return (torch.randn(2, heads, S, D), *(torch.randn(2, kv_heads or heads, Sk or S, D) for _ in range(2)))


@pytest.mark.parametrize("S, Sk", [(300, 300), (1, 129), (65, 63), (130, 700)])
def test_keeping_everything_is_sdpa(S, Sk):
    q, k, v = inputs(S, Sk)
    for options in ({"topk": 1.0}, {"cdf": 1.0, "simthresh": 0.0}):
        out = svg.sparge_attention(q, k, v, scale=0.3, **options)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3), rtol=0, atol=1e-5)


def test_layouts_and_shared_heads():
    q, k, v = inputs(kv_heads=2)
    out = svg.sparge_attention(q, k, v, topk=0.4, enable_gqa=True)
    full = svg.sparge_attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)), topk=0.4)
    assert torch.equal(out, full)
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    turned = svg.sparge_attention(*tokens_first, topk=0.4, enable_gqa=True, tensor_layout="NHD")
    torch.testing.assert_close(turned.transpose(1, 2), out)


@pytest.mark.parametrize("grid", [None, GRID])
@pytest.mark.parametrize("precision", ["native", "int8-fp8"])
def test_it_is_the_method(grid, precision):
    q, k, v = inputs(3 * 9 * 11)
    settings = {"cdf": 0.7, "simthresh": 0.009, "attention_sink": True, "precision": precision}
    if precision != "native":
        settings["pv_threshold"] = 4.0
    order = "rowmajor" if grid is None else "hilbert"
    state = RunState(SpargeConfig(**settings, order=order, warmup_steps=0, warmup_layers=0), 1)
    state.begin_forward(0, 1, "cond", TokenLayout(*GRID))
    expected = attend(*(x.transpose(1, 2) for x in (q, k, v)), state, 0).transpose(1, 2)
    assert 0.1 < state.records[0].density.mean() < 0.95
    out = svg.sparge_attention(q, k, v, grid=grid, **settings)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_torch_compile_keeps_one_graph():
    q, k, v = inputs()
    compiled = torch.compile(lambda *x: svg.sparge_attention(*x, topk=0.5) * 2, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), svg.sparge_attention(q, k, v, topk=0.5) * 2)
    torch.library.opcheck(torch.ops.svg.sparge_attention, (q, k, v, 0.5, None, -0.1, None, False, "native", 0.2, []))


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (NotImplementedError, "attn_mask and is_causal", {"is_causal": True}),
        (NotImplementedError, "attn_mask and is_causal", {"attn_mask": torch.ones(300, 300, dtype=torch.bool)}),
        (NotImplementedError, "dropout_p must be 0", {"dropout_p": 0.1}),
        (ValueError, "tensor_layout must be one of HND, NHD", {"tensor_layout": "SHD"}),
        (ValueError, "grid must have as many tokens as q and k, got .* for 300", {"grid": GRID}),
        (ValueError, "one of topk, cdf, thresholds must be given", {"topk": 0.5, "cdf": 0.5}),
        (ValueError, "pv_threshold must come with precision", {"pv_threshold": 3.0}),
        (TypeError, "unexpected keyword", {"top_k": 3}),
    ],
)
def test_wrong_arguments_are_named(error, match, options):
    with pytest.raises(error, match=match):
        svg.sparge_attention(*inputs(), **options)
    q, k, v = inputs(kv_heads=2)
    with pytest.raises(ValueError, match="k must have q's 4 heads"):
        svg.sparge_attention(q, k, v)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        svg.sparge_attention(q.requires_grad_(), *inputs()[1:])


def test_lists_of_a_long_video_stay_small(monkeypatch):
    """The drop-in runs as the method does: some heads at a time where lists of all heads' blocks would be large."""
    q, k, v = (torch.randn(2, 3, 300, 16) for _ in range(3))
    whole = svg.sparge_attention(q, k, v, topk=0.5, scale=0.3)
    made, run = [], execute._execute
    monkeypatch.setattr(
        execute, "_execute", lambda plan, *rest: made.append(plan.map_index.numel()) or run(plan, *rest)
    )
    monkeypatch.setattr(execute, "LISTED_BLOCKS", 1)
    torch.testing.assert_close(svg.sparge_attention(q, k, v, topk=0.5, scale=0.3), whole)
    assert made == [1] * 6
