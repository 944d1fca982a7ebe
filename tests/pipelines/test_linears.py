"""Linears in 8 bits: which ones, that they compute what they say, and that they leave nothing behind."""

import copy
import json

import pytest
import torch
from torch import nn

import svg
from svg.config import DenseConfig, Sage2Config
from svg.kernels import fp8_linear_reference, quantize_rows_reference
from svg.kernels.linears.int8_rows import hopper
from svg.pipelines import fused_blocks, linears, loading
from svg.pipelines.linear_guard import LinearGuard
from svg.pipelines.linears import QuantizedLinear, find_linears, quantize_linears, restore_linears
from svg.pipelines.linears_file import linears_content
from svg.pipelines.registry import find_spec

ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
FEED_FORWARD = ["ffn.net.0.proj", "ffn.net.2"]


def quantized(module):
    return [name for name, one in module.named_modules() if isinstance(one, QuantizedLinear)]


def bits(module):
    return {name: (id(parameter), parameter.detach().clone()) for name, parameter in module.named_parameters()}


def test_which_linears_of_wan(load):
    transformer = load("wan").transformer
    spec = find_spec(transformer)
    assert find_linears(transformer, spec, "none") == []
    blocks = [f"blocks.{i}." for i in range(3)]
    assert find_linears(transformer, spec, "feed_forward") == [b + name for b in blocks for name in FEED_FORWARD]
    assert sorted(find_linears(transformer, spec, "all")) == sorted(
        b + n for b in blocks for n in ATTENTION + FEED_FORWARD
    )


def test_edge_blocks_of_longer_models_stay(load):
    transformer = load("wan").transformer
    transformer.blocks = nn.ModuleList([*transformer.blocks, copy.deepcopy(transformer.blocks[0])])
    found = find_linears(transformer, find_spec(transformer), "all")
    assert {name.split(".")[1] for name in found} == {"1", "2"}


def test_which_linears_of_hunyuan_video(load):
    transformer = load("hunyuan").transformer
    found = find_linears(transformer, find_spec(transformer), "all")
    dual = [name for name in found if name.startswith("transformer_blocks.1.")]
    single = [name for name in found if name.startswith("single_transformer_blocks.0.")]
    assert {name.split(".", 2)[2] for name in dual} == {
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"
    }  # fmt: skip
    assert {name.split(".", 2)[2] for name in single} == {
        "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"
    }  # fmt: skip
    assert not [name for name in found if name.startswith("transformer_blocks.0.")]  # the first block


def test_what_a_user_changed_stays(load):
    class Theirs(nn.Linear):
        pass

    transformer = load("wan").transformer
    transformer.blocks[0].ffn.net[2] = Theirs(32, 32)
    transformer.blocks[1].ffn.net[2].register_forward_hook(lambda *args: None)
    transformer.blocks[2].ffn.net[2] = nn.Linear(24, 32)  # no multiple of 16
    found = find_linears(transformer, find_spec(transformer), "feed_forward")
    assert found == [f"blocks.{i}.ffn.net.0.proj" for i in range(3)]
    for block in transformer.blocks:
        block.ffn.net[0].proj.register_forward_pre_hook(lambda *args: None)
    with pytest.raises(
        NotImplementedError, match="linears must be none for this WanTransformer3DModel, got 'feed_forward'"
    ):
        find_linears(transformer, find_spec(transformer), "feed_forward")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_accelerate_and_restore(load, run, name, fused):
    pipe = load(name)
    before, stock = bits(pipe.transformer), run(pipe, steps=2)
    out = run(svg.accelerate(pipe, DenseConfig(linears="all", fused=fused)), steps=2)
    assert quantized(pipe.transformer) and not torch.equal(out, stock)
    assert (out - stock).norm() < 0.1 * stock.norm()
    state = pipe.transformer.state_dict()
    assert state.keys() >= before.keys()
    svg.restore(pipe)
    after = bits(pipe.transformer)
    assert not quantized(pipe.transformer) and list(after) == list(before)
    for key, (identity, values) in before.items():
        assert after[key][0] == identity and torch.equal(after[key][1], values) and torch.equal(state[key], values)
    assert torch.equal(run(pipe, steps=2), stock)


@pytest.mark.parametrize(("precision", "rows"), [("fp8", "fp8"), ("int8-rows", "int8")])
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_fused_passes_give_what_single_ones_give(load, run, monkeypatch, name, precision, rows):
    asked, modulate = [], fused_blocks.modulate
    monkeypatch.setattr(fused_blocks, "modulate", lambda *args, **rows: asked.append(rows) or modulate(*args, **rows))
    common = {"linears": "all", "linear_precision": precision}
    outs = [run(svg.accelerate(load(name), DenseConfig(**common, fused=fused)), steps=2) for fused in (False, True)]
    stock = run(load(name), steps=2)
    assert (outs[0] - outs[1]).norm() < 0.25 * (outs[0] - stock).norm()
    assert {rows: True} in asked  # from the second forward on, when nothing is probed


def test_q_k_and_v_share_one_quantisation(load, run, monkeypatch):
    pipe, calls = load("wan"), []
    real = linears.quantize_rows
    svg.accelerate(pipe, DenseConfig(linears="all"))
    monkeypatch.setattr(linears, "quantize_rows", lambda x: calls.append(x.shape) or real(x))
    run(pipe, steps=1)
    forwards = svg.report(pipe)["transformers"]["transformer"]["calls"]["total"]  # of attention layers
    assert len(calls) == 4 * forwards  # q k v; out; both of the feed-forward
    assert all(m.shared._found is None for m in pipe.transformer.modules() if getattr(m, "shared", None))


def test_in_int8_with_fallback(load, run):
    pipe = load("wan")
    stock = run(pipe, steps=2)
    out = run(svg.accelerate(pipe, DenseConfig(linears="all", linear_precision="int8", fused=True)), steps=2)
    assert 0 < (out - stock).norm() < 0.05 * stock.norm()
    found = [m for m in pipe.transformer.modules() if isinstance(m, QuantizedLinear)]
    assert all(m.values.dtype == torch.int8 and m.shared.steering.steps > 0 for m in found)
    assert found[0].shared is found[1].shared is found[2].shared and found[3].shared is not found[0].shared
    assert torch.equal(run(pipe, steps=2), out)  # the threshold of the run before is forgotten
    svg.restore(pipe)
    assert torch.equal(run(pipe, steps=2), stock)
    with pytest.raises(ValueError, match="linear_precision must be one of auto, fp8, int8-rows, int8"):
        DenseConfig(linear_precision="int4")


def precisions(pipe):
    return {one.precision for one in pipe.transformer.modules() if isinstance(one, QuantizedLinear)}


def test_what_auto_stands_for(load, monkeypatch):
    pipe = load("wan")
    assert precisions(svg.accelerate(pipe, DenseConfig(linears="all"))) == {"fp8"}
    assert precisions(svg.accelerate(pipe, DenseConfig(linears="feed_forward"))) == {"fp8"}
    monkeypatch.setattr(linears.target, "has_fp8", lambda device: False)
    assert precisions(svg.accelerate(load("wan"), DenseConfig(linears="all"))) == {"int8-rows"}


@pytest.mark.skipif(not hopper.LOADABLE, reason="Gluon cannot be loaded")
@pytest.mark.parametrize(
    "arch, precision", [(80, "int8-rows"), (89, "fp8"), (90, "int8-rows"), (100, "fp8"), (120, "fp8")]
)
def test_what_auto_stands_for_on_gpus(arch, precision, monkeypatch):
    monkeypatch.setattr(linears, "_computing", lambda device: torch.device("cuda"))
    monkeypatch.setattr(linears.target, "arch", lambda device: arch)
    assert linears.best_precision(nn.Linear(16, 16)) == precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_linear_is_its_specification(dtype):
    torch.manual_seed(1)
    linear = nn.Linear(64, 48).to(dtype)
    x = torch.randn(2, 5, 64).to(dtype)
    mine = QuantizedLinear(linear)
    with torch.no_grad():
        wanted = fp8_linear_reference(quantize_rows_reference(x), quantize_rows_reference(linear.weight), linear.bias)
        assert torch.equal(mine(x), wanted) and mine(x).dtype == dtype
    assert mine.weight is linear.weight and mine.original() is linear
    assert [name for name, _ in mine.named_parameters()] == ["bias"]


def test_casts_and_moves_keep_the_eight_bits():
    linear = nn.Linear(64, 48)
    kept = linear.weight.detach().clone()
    mine = QuantizedLinear(linear)
    values, scale = mine.values.clone(), mine.scale.clone()
    mine.to(torch.bfloat16)
    assert mine.values.dtype == values.dtype and torch.equal(mine.values.float(), values.float())
    assert torch.equal(mine.scale, scale) and mine.bias.dtype == torch.bfloat16
    assert mine.original().weight.dtype == torch.bfloat16 and torch.equal(mine.weight, kept.bfloat16())
    again = copy.deepcopy(mine)
    with torch.no_grad():
        x = torch.randn(3, 64)
        assert torch.equal(again(x), mine(x))


def test_autocast():
    mine = QuantizedLinear(nn.Linear(32, 16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert mine(torch.randn(2, 32)).dtype == torch.bfloat16


def test_gradients_and_loading_are_refused_in_words(load):
    transformer = load("wan").transformer
    names = quantize_linears(transformer, ["blocks.0.ffn.net.2"])
    linear = transformer.get_submodule(names[0])
    with pytest.raises(NotImplementedError, match="linears in 8 bits have no backward pass"):
        linear(torch.randn(1, 32, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"blocks.0.ffn.net.2.weight is in 8 bits: call svg.restore\(pipe\)"):
        transformer.load_state_dict(transformer.state_dict())
    transformer.blocks[0].ffn.net[2] = theirs = nn.Linear(32, 32)
    restore_linears(transformer, names)
    assert transformer.blocks[0].ffn.net[2] is theirs


def test_nothing_is_quantised_when_something_is_refused(load):
    pipe = load("wan")
    for block in pipe.transformer.blocks:
        for module in block.modules():
            if type(module) is nn.Linear:
                module.register_forward_hook(lambda *args: None)
    with pytest.raises(NotImplementedError, match="linears must be none"):
        svg.accelerate(pipe, DenseConfig(linears="all"))
    assert not svg.pipelines.attach.is_accelerated(pipe)
    with pytest.raises(ValueError, match="linears must be one of none, feed_forward, all"):
        DenseConfig(linears="some")


def test_accelerating_again_keeps_or_drops_them(load, run):
    pipe = load("wan")
    before = bits(pipe.transformer)
    svg.accelerate(pipe, DenseConfig(linears="all"))
    svg.accelerate(pipe, DenseConfig(linears="feed_forward"))
    assert {name.split(".", 2)[2] for name in quantized(pipe.transformer)} == set(FEED_FORWARD)
    svg.accelerate(pipe, DenseConfig())
    assert not quantized(pipe.transformer)
    assert all(torch.equal(values, before[key][1]) for key, (_, values) in bits(pipe.transformer).items())


def stored(pipe):
    """Bytes that a pipeline's transformer takes on its device."""
    parts = [*pipe.transformer.parameters(), *pipe.transformer.buffers()]
    return sum(part.numel() * part.element_size() for part in parts)


def test_what_is_put_on_the_device_is_in_8_bits_already(load, run, directory, monkeypatch):
    placed, config = [], DenseConfig(linears="all")
    real = loading.place
    monkeypatch.setattr(loading, "place", lambda pipe, *rest: placed.append(stored(pipe)) or real(pipe, *rest))
    plain = loading.load_pipeline(directory("wan"), device="cpu", dtype="bf16")
    loading.load_pipeline(directory("wan"), device="cpu", dtype="bf16", config=DenseConfig())
    pipe = loading.load_pipeline(directory("wan"), device="cpu", dtype="bf16", config=config)
    weights = sum(
        one.in_features * one.out_features for one in pipe.transformer.modules() if type(one) is QuantizedLinear
    )
    assert weights and placed[0] == placed[1] == stored(plain)
    kept = sum(
        one.scale.nbytes + one.sample.nbytes for one in pipe.transformer.modules() if type(one) is QuantizedLinear
    )
    assert placed[2] == placed[0] - weights + kept  # a byte less a weight
    out = run(pipe, steps=2)
    assert torch.equal(out, run(svg.accelerate(plain, config), steps=2))


def test_the_same_linears_stay_in_8_bits_when_the_method_changes(load, run):
    pipe = load("wan")
    stock = run(pipe, steps=2)
    svg.accelerate(pipe, DenseConfig(linears="all"))
    before = {name: pipe.transformer.get_submodule(name) for name in quantized(pipe.transformer)}
    out = run(svg.accelerate(pipe, Sage2Config(linears="all")), steps=2)
    assert {name: pipe.transformer.get_submodule(name) for name in quantized(pipe.transformer)} == before
    assert torch.equal(out, run(svg.accelerate(load("wan"), Sage2Config(linears="all")), steps=2))
    svg.accelerate(pipe, Sage2Config(linears="all", linear_precision="int8"))
    assert not before.keys() - set(quantized(pipe.transformer))
    assert precisions(pipe) == {"int8"}
    pipe.transformer.blocks[0].ffn.net[2] = theirs = nn.Linear(32, 32)
    svg.accelerate(pipe, DenseConfig(linears="all", linear_precision="int8"))  # anew, because one is not ours any more
    assert pipe.transformer.blocks[0].ffn.net[2] is not theirs
    svg.restore(pipe)
    assert pipe.transformer.blocks[0].ffn.net[2] is theirs and not quantized(pipe.transformer)
    pipe.transformer.blocks[0].ffn.net[2] = load("wan").transformer.blocks[0].ffn.net[2]
    assert torch.equal(run(pipe, steps=2), stock)


def test_rotated_int8_errs_less_than_fp8(load, run):
    stock, errors = run(load("wan"), steps=2), {}
    for precision in ("fp8", "int8-rows"):
        pipe = svg.accelerate(load("wan"), DenseConfig(linears="all", linear_precision=precision, fused=True))
        errors[precision] = (run(pipe, steps=2) - stock).norm().item()
        assert precisions(pipe) == {precision}
        assert torch.equal(run(svg.restore(pipe), steps=2), stock)
    assert 0 < errors["int8-rows"] < 0.5 * errors["fp8"]


def linears_file(path, precisions):
    names = [f"blocks.0.ffn.net.{name}" for name in ("0.proj", "2")]
    choices = {name: {"precision": one, "error": 0.01} for name, one in zip(names, precisions)}
    path.write_text(json.dumps(linears_content({"transformer": choices}, {})))
    return str(path)


def test_an_error_leaves_a_pipeline_with_linears_in_8_bits_as_it_was(load, run, tmp_path):
    pipe = svg.accelerate(load("wan"), DenseConfig(linears="all"))
    out, there = run(pipe, steps=2), quantized(pipe.transformer)
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]")
    with pytest.raises(ValueError, match="must say which linears"):
        svg.accelerate(pipe, DenseConfig(linears=str(wrong)))
    assert quantized(pipe.transformer) == there and torch.equal(run(pipe, steps=2), out)


@pytest.mark.parametrize(
    ("before", "after", "place", "number"),
    [
        ("none", "all", (linears, "quantize_rows"), 20),
        ("all", "feed_forward", (linears, "quantize_rows"), 8),
        ("none", "all", (LinearGuard, "begin_run"), 2),
        ("all", "all", (LinearGuard, "begin_run"), 2),  # linears that are kept
    ],
)
def test_whoever_interrupts_the_quantising_has_a_plain_pipeline(load, run, monkeypatch, before, after, place, number):
    pipe, calls = load("wan_2_2"), []
    stock, processors = run(pipe, steps=2), dict(pipe.transformer.attn_processors)
    svg.accelerate(pipe, DenseConfig(linears=before))
    real = getattr(*place)

    def interrupted(x):
        calls.append(x)
        if len(calls) == number:  # in the second transformer
            raise KeyboardInterrupt
        return real(x)

    with monkeypatch.context() as patched:
        patched.setattr(*place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            svg.accelerate(pipe, DenseConfig(linears=after))
    assert pipe.transformer.attn_processors == processors and not quantized(pipe.transformer)
    assert not quantized(pipe.transformer_2) and torch.equal(run(pipe, steps=2), stock)
    svg.accelerate(pipe, DenseConfig(linears="all"))


def test_a_file_is_for_the_precision_that_it_was_measured_in(load, tmp_path):
    pipe, path = load("wan"), tmp_path / "linears.json"
    for precision in ("int8", "int8-rows", "fp8"):
        file = linears_file(path, [precision] * 2)
        assert precisions(svg.accelerate(pipe, DenseConfig(linears=file))) == {precision}
    svg.accelerate(pipe, DenseConfig(linears=file, linear_precision="fp8"))
    with pytest.raises(
        ValueError, match="must be measured in linear_precision int8, got fp8: leave linear_precision out"
    ):
        svg.accelerate(pipe, DenseConfig(linears=file, linear_precision="int8"))
    with pytest.raises(ValueError, match="must be measured in one precision for all linears"):
        svg.accelerate(pipe, DenseConfig(linears=linears_file(path, ["fp8", "int8"])))
    svg.accelerate(pipe, DenseConfig(linears=linears_file(path, ["native", "int8"])))
    assert quantized(pipe.transformer) == ["blocks.0.ffn.net.2"]
    svg.accelerate(pipe, DenseConfig(linears=linears_file(path, ["native"] * 2)))
    assert not quantized(pipe.transformer)
    with pytest.raises(ValueError, match="linears must be a file, got x"):
        svg.accelerate(pipe, DenseConfig(linears="x" * 300 + ".json"))


def test_a_file_of_a_model_serves_it_with_a_lora(load, tmp_path):
    class Wrapped(nn.Module):  # as PEFT wraps a linear
        def __init__(self, linear):
            super().__init__()
            self.base_layer = linear

        def forward(self, x):
            return self.base_layer(x)

    pipe = load("wan")
    net = pipe.transformer.blocks[0].ffn.net
    net[2] = Wrapped(net[2])
    svg.accelerate(pipe, DenseConfig(linears=linears_file(tmp_path / "linears.json", ["native", "int8"])))
    assert quantized(pipe.transformer) == ["blocks.0.ffn.net.2.base_layer"] and precisions(pipe) == {"int8"}
