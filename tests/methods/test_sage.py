"""SageAttention as a method, and the guard of all quantised ones."""

import dataclasses
import json

import pytest
import torch

from svg.attend import attend
from svg.config import (
    DenseConfig,
    Sage2Config,
    Sage2PlusConfig,
    Sage3Config,
    SVG1Config,
    SVG2Config,
    config_from_dict,
)
from svg.engine import repair
from svg.engine.layout import TokenLayout
from svg.engine.summary import summarize
from svg.kernels.common import target
from svg.methods.sage import precision as sage
from svg.methods.sage.layers_file import layers_content

SAGE = {"sage2": Sage2Config(), "sage2++": Sage2PlusConfig(), "sage3": Sage3Config()}
VIDEO = TokenLayout(3, 3, 4)


def relative(out, expected):
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("method", SAGE)
def test_close_to_dense_with_text_masks(method, layout, make_qkv, make_state, make_mask):
    qkv, mask = make_qkv(layout, dtype=torch.bfloat16), make_mask(layout)
    expected = attend(*qkv, make_state(DenseConfig(), layout), 3, mask)
    state = make_state(SAGE[method], layout)
    out = attend(*qkv, state, 3, mask)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    assert 0 < relative(out, expected) < (0.2 if method == "sage3" else 0.06)
    report = summarize(state)
    assert report["calls"] == {"total": 1, "dense": 0, "sparse": 1, "reused": 0} and report["density"]["all_calls"] == 1
    assert report["quantised"]["guard"]["recomputed"] == 0 and report["quantised"]["guard"]["probed_calls"] == 1
    assert report["quantised"]["guard"]["least_cosine"] > 0.98
    json.dumps(report)


def test_sage3_takes_8_bits_at_both_ends(make_qkv, make_state):
    qkv = make_qkv(VIDEO)
    state = make_state(Sage3Config(edge_steps=2), VIDEO, step=0, num_steps=6)
    for step in range(6):
        state.begin_forward(step, 6, "cond", VIDEO)
        attend(*qkv, state, 0)
    eight = "int8-fp8"
    assert [record.precision for record in state.records] == [eight, eight, "nvfp4", "nvfp4", eight, eight]
    precisions = summarize(state)["quantised"]["precisions"]
    assert precisions == {eight: {"calls": 4, "emulated": False}, "nvfp4": {"calls": 2, "emulated": True}}


def test_gpus_without_fp8_take_the_safe_mode(make_qkv, make_state, monkeypatch):
    monkeypatch.setattr(target, "arch", lambda device: 80)
    state = make_state(Sage2Config(), VIDEO)
    attend(*make_qkv(VIDEO), state, 0)
    assert state.records[0].precision == "int8-fp16"
    with pytest.raises(NotImplementedError, match="FP8 needs compute capability"):
        attend(*make_qkv(VIDEO), make_state(Sage2PlusConfig(), VIDEO), 0)


@pytest.mark.parametrize("config", [Sage2Config(), SVG1Config(density=0.6, block_size=4, sample_rows=6, precision="int8-fp8"),
                                    SVG2Config(top_p=0.6, num_q_clusters=5, num_k_clusters=9, precision="int8-fp8")])  # fmt: skip
def test_a_broken_head_is_computed_again(config, layout, make_qkv, make_state, make_mask, monkeypatch):
    """Whatever a kernel does to one head, the output is the unquantised one there, and the report counts it."""
    qkv, mask = make_qkv(layout, dtype=torch.bfloat16), make_mask(layout)
    run = {"sage2": (sage, "quantised_attention"), "svg1": None, "svg2": None}[config.method]
    native = {"precision": "native"} if config.method != "sage2" else {}
    plain = dataclasses.replace(config, **native) if native else DenseConfig()
    expected = attend(*qkv, make_state(plain, layout), 3, mask)
    whole = attend(*qkv, make_state(config, layout), 3, mask)
    from svg.engine import execute

    home, name = run or (execute, "block_sparse_attention_quantised")
    kernel = getattr(home, name)

    def broken(*args, failed=None, **kwargs):
        out = kernel(*args, failed=failed, **kwargs)
        out[1, 2] = torch.nan
        failed[1, 2] = 1
        return out

    monkeypatch.setattr(home, name, broken)
    state = make_state(config, layout)
    out = attend(*qkv, state, 3, mask)
    torch.testing.assert_close(out[1, :, 2], expected[1, :, 2], rtol=0.02, atol=0.02)
    others = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert all(torch.equal(out[b, :, h], whole[b, :, h]) for b, h in others)
    found = summarize(state)["quantised"]["guard"]
    assert (found["recomputed"], found["head_calls"], found["per_layer"]) == (1, 6, {"3": 1})


def test_probed_rows_over_the_tolerance_fail(make_qkv, make_state, monkeypatch):
    qkv = make_qkv(VIDEO)
    expected = attend(*qkv, make_state(DenseConfig(), VIDEO), 0)
    kernel = sage.quantised_attention

    def inexact(*args, **kwargs):
        out = kernel(*args, **kwargs)
        out[0, 1] *= 1.5
        return out

    monkeypatch.setattr(sage, "quantised_attention", inexact)
    state = make_state(Sage2Config(), VIDEO)
    out = attend(*qkv, state, 0)
    torch.testing.assert_close(out[0, :, 1], expected[0, :, 1])
    assert summarize(state)["quantised"]["guard"]["recomputed"] == 1
    for off in (Sage2Config(probe_every=0), Sage2Config(guard=False), Sage2Config(tolerance=0.6)):
        assert relative(attend(*qkv, make_state(off, VIDEO), 0)[0, :, 1], expected[0, :, 1]) > 0.4


def test_outliers_within_tokens_fail_honestly(make_qkv, make_state):
    """What INT8 cannot stand for: one huge channel of one sign a token hides all others, and probing finds out."""
    q, k, v = make_qkv(VIDEO)
    noise = torch.randn(k.shape[:3]).sign()
    k[..., 0] = 3000 * noise
    q[..., 0] = 0
    expected = attend(q, k, v, make_state(DenseConfig(), VIDEO), 0)
    blind = attend(q, k, v, make_state(Sage2Config(guard=False), VIDEO), 0)
    state = make_state(Sage2Config(), VIDEO)
    assert relative(attend(q, k, v, state, 0), expected) < 0.01 < relative(blind, expected)
    assert summarize(state)["quantised"]["guard"]["recomputed"] == 6


def test_probes_come_every_so_many_steps(make_qkv, make_state):
    qkv = make_qkv(VIDEO)
    state = make_state(Sage2Config(probe_every=3), VIDEO, step=0)
    for step in range(8):
        state.begin_forward(step, 10, "cond", VIDEO)
        attend(*qkv, state, 0)
    probed = [record.guarded.cosine is not None for record in state.records]
    assert probed == [step % 3 == 0 for step in range(8)]


def test_the_map_of_chosen_heads_alone(make_qkv, make_state, make_mask, layout, token_map):
    state = make_state(SVG2Config(top_p=0.6, num_q_clusters=5, num_k_clusters=9), layout)
    seen = []
    state.observer = seen.append
    attend(*make_qkv(layout), state, 3, make_mask(layout))
    plan = seen[0].plan
    chosen = torch.tensor([[0, 1, 0], [1, 0, 0]], dtype=torch.int32)
    for skip in (False, True):
        only = repair.restricted_to_heads(plan, chosen, skip)
        for b, h in ((0, 1), (1, 0)):
            assert torch.equal(token_map(dataclasses.replace(only, k_permutation=plan.k_permutation), b, h),
                               token_map(plan, b, h))  # fmt: skip
        index = only.map_index.long()
        assert not only.block_map[index[chosen == 0]].any()
        assert (only.q_sizes[index].sum(-1)[chosen == 0] == (0 if skip else layout.total_tokens)).all()


def test_a_layer_below_the_least_cosine_takes_a_safer_precision(make_qkv, make_state):
    qkv = make_qkv(VIDEO)
    state = make_state(Sage3Config(min_cosine=0.9999, edge_steps=0, probe_every=1), VIDEO, step=0)
    for step in range(4):
        state.begin_forward(step, 10, "cond", VIDEO)
        attend(*qkv, state, 1)
    assert [record.precision for record in state.records] == ["nvfp4", "int8-fp16", "int8-fp16", "int8-fp16"]
    assert summarize(state)["quantised"]["safer"] == {"1": 1}
    strict = make_state(Sage2Config(precision="int8-fp16", min_cosine=1.0, probe_every=1), VIDEO, step=0)
    for step in range(2):
        strict.begin_forward(step, 10, "cond", VIDEO)
        attend(*qkv, strict, 1)
    assert [record.dense for record in strict.records] == [False, True]


def test_precisions_from_a_file(tmp_path, make_qkv, make_state):
    path = tmp_path / "layers.json"
    choices = {"transformer": {0: {"precision": "int8-fp16"}, 1: {"precision": "native"}}}
    path.write_text(json.dumps(layers_content(choices, {})))
    state = make_state(Sage2Config(layers=str(path)), VIDEO)
    for layer in (0, 1):
        attend(*make_qkv(VIDEO), state, layer)
    assert [record.precision for record in state.records] == ["int8-fp16", None] and state.records[1].dense
    with pytest.raises(ValueError, match="layers must have transformer layer 2"):
        attend(*make_qkv(VIDEO), state, 2)
    with pytest.raises(ValueError, match="which is not there; make one with `svg adapt`"):
        attend(*make_qkv(VIDEO), make_state(Sage2Config(layers=str(tmp_path / "no")), VIDEO), 0)


def test_gradients_are_refused(make_qkv, make_state):
    q, k, v = make_qkv(VIDEO)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        attend(q.requires_grad_(), k, v, make_state(Sage2Config(), VIDEO), 0)


@pytest.mark.parametrize("config", SAGE.values(), ids=SAGE.keys())
def test_dict_round_trip(config):
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.warmup_steps == 0


@pytest.mark.parametrize(
    ("config", "values", "error", "match"),
    [
        (Sage2Config, {"precision": "nvfp4"}, ValueError, "precision must be one of auto, int8-fp8"),
        (Sage2PlusConfig, {"precision": "int8-fp8"}, ValueError, "precision must be one of int8-fp8-acc16"),
        (Sage2Config, {"smooth_v": True, "precision": "int8-fp16"}, ValueError, "smooth_v needs FP8"),
        (Sage2Config, {"smooth_k": 1}, TypeError, "smooth_k must be true or false"),
        (Sage2Config, {"q_groups": "tensor"}, ValueError, "q_groups must be one of token"),
        (Sage2Config, {"min_cosine": 1.2}, ValueError, "min_cosine must be in"),
        (Sage2Config, {"min_cosine": 0.99, "guard": False}, ValueError, "min_cosine needs guard on"),
        (Sage2Config, {"min_cosine": 0.99, "layers": "x"}, ValueError, "one of layers and min_cosine"),
        (Sage2Config, {"tolerance": 0}, ValueError, "tolerance must be > 0"),
        (Sage2Config, {"probe_every": -1}, ValueError, "probe_every must be >= 0"),
        (Sage2Config, {"guard": "yes"}, TypeError, "guard must be true or false"),
        (Sage3Config, {"q_groups": "block"}, ValueError, "q_groups has no meaning in NVFP4"),
        (Sage3Config, {"edge_steps": -1}, ValueError, "edge_steps must be >= 0"),
    ],
)
def test_impossible_values_raise(config, values, error, match):
    with pytest.raises(error, match=match):
        config(**values)
