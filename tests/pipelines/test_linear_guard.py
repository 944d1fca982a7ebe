"""The guard of linears in 8 bits: it sees errors, takes linears back from the next forward on, and forgets them with the run."""

import copy

import pytest
import torch

import svg
from svg.config import DenseConfig, Sage2Config, SVG1Config
from svg.generate.report import _quantized_notes
from svg.pipelines import linears
from svg.pipelines.linears import QuantizedLinear

ALL = DenseConfig(linears="all", fused=True)


def found(pipe):
    return {name: one for name, one in pipe.transformer.named_modules() if isinstance(one, QuantizedLinear)}


def guard_of(pipe):
    return svg.report(pipe)["transformers"]["transformer"]["linears"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_probes_of_a_good_model_change_nothing(load, run, precision, fused):
    pipe = load("wan")
    config = DenseConfig(linears="all", linear_precision=precision, fused=fused)
    run(svg.accelerate(pipe, config), steps=12)
    report = guard_of(pipe)
    assert (report["linears"], report["precision"]) == (len(found(pipe)), precision)
    assert report["guard"]["probes"] == 2 * 2 * report["linears"]  # two branches, in steps 0 and 10 of 12
    assert 0 < report["guard"]["largest_error"]["error"] < 0.1 and report["guard"]["own_precision"] == []
    assert all(one.own is None and one.probe is None for one in found(pipe).values())


@pytest.mark.parametrize("name", ["blocks.1.attn1.to_k", "blocks.0.ffn.net.2"])
def test_a_linear_that_errs_goes_back_from_the_next_forward_on(load, run, name):
    pipe = load("wan")
    svg.accelerate(pipe, ALL)
    bad = found(pipe)[name]
    bad.scale *= 1.5
    seen = []
    bad.register_forward_hook(lambda module, args, out: seen.append((module.own is not None, args[0], out)))
    first = run(pipe, steps=3)
    own, x, out = zip(*seen)
    assert own == (False, *[True] * 5)
    exact = torch.nn.functional.linear(x[1], bad.weight, bad.bias)
    assert torch.equal(out[1], exact) and not torch.allclose(out[0], exact, atol=1e-3)
    report = guard_of(pipe)
    assert report["guard"]["own_precision"] == [name] and report["guard"]["largest_error"]["linear"] == name
    assert report["guard"]["largest_error"]["error"] == pytest.approx(0.5, abs=0.1)
    run_report = {"transformers": {"transformer": {"quantised": None, "linears": report}}}
    assert _quantized_notes(run_report) == [
        f"the guard took 1 of {report['linears']} linears back to their own precision"
    ]
    again = run(pipe, steps=3)  # the next run starts in 8 bits, and finds out again
    assert torch.equal(first, again) and [one[0] for one in seen[6:]] == [False, *[True] * 5]
    assert svg.summary(pipe).linears_back == 1 and "linears in their own precision again: 1" in str(svg.summary(pipe))
    svg.restore(pipe)
    assert not found(pipe)


def test_nan_fails_and_is_what_the_report_names(load, run):
    pipe = load("wan")
    svg.accelerate(pipe, DenseConfig(linears="feed_forward", check_finite=False))
    found(pipe)["blocks.2.ffn.net.2"].scale[3] = torch.nan
    found(pipe)["blocks.1.ffn.net.2"].scale *= 2
    run(pipe, steps=2)
    report = guard_of(pipe)["guard"]
    assert report["own_precision"] == ["blocks.1.ffn.net.2", "blocks.2.ffn.net.2"]
    assert report["largest_error"] == {"linear": "blocks.2.ffn.net.2", "error": None}


def test_what_stays_of_q_k_and_v_still_shares_one_quantisation(load, run, monkeypatch):
    pipe, calls = load("wan"), []
    svg.accelerate(pipe, DenseConfig(linears="all"))
    found(pipe)["blocks.1.attn1.to_k"].scale *= 2
    run(pipe, steps=1)  # two forwards: both branches
    real = linears.quantize_rows
    monkeypatch.setattr(linears, "quantize_rows", lambda x: calls.append(1) or real(x))
    assert found(pipe)["blocks.1.attn1.to_q"].shared.users == 2
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        for name in ("to_q", "to_k", "to_v"):
            pipe.transformer.blocks[1].attn1.get_submodule(name)(x)
    assert len(calls) == 1 and found(pipe)["blocks.1.attn1.to_q"].shared._found is None


@pytest.mark.parametrize("off", [{"guard": False}, {"probe_every": 0}])
def test_off(load, run, off):
    pipe = load("wan")
    svg.accelerate(pipe, Sage2Config(linears="all", **off))
    found(pipe)["blocks.1.attn1.to_k"].scale *= 2
    run(pipe, steps=1)
    assert guard_of(pipe)["guard"] is None
    assert all(one.sample is None and one.own is None for one in found(pipe).values())


def test_without_linears_in_8_bits_there_is_nothing_to_say(load, run):
    pipe = load("wan")
    run(svg.accelerate(pipe, DenseConfig()), steps=1)
    assert guard_of(pipe) is None


def test_a_copy_has_a_guard_of_its_own(load, run):
    pipe = load("wan")
    svg.accelerate(pipe, ALL)
    found(pipe)["blocks.1.attn1.to_k"].scale *= 2
    run(pipe, steps=1)
    other = copy.deepcopy(pipe.transformer)
    own = other.get_submodule("blocks.1.attn1.to_k")
    assert own.own is not None and own is not found(pipe)["blocks.1.attn1.to_k"]
    other.to(torch.float64)
    assert own.own.dtype == torch.float64 and found(pipe)["blocks.1.attn1.to_k"].own.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_linears_wait_for_the_end_of_the_warm_up(load, run, precision):
    pipe = load("wan")
    settings = {
        "linears": "all",
        "linear_precision": precision,
        "warmup_steps": 0.5,
        "warmup_layers": 0.0,
        "density": 1.0,
    }
    seen = []
    svg.accelerate(pipe, SVG1Config(**settings))
    name, one = next(iter(found(pipe).items()))
    one.register_forward_hook(lambda module, args, out: seen.append((module.own is not None, args[0], out)))
    first = run(pipe, steps=4)
    assert [own for own, _, _ in seen] == [True] * 4 + [False] * 4  # two branches a step
    _, x, out = seen[0]
    assert torch.equal(out, torch.nn.functional.linear(x, one.weight, one.bias))
    report = guard_of(pipe)["guard"]
    assert report["own_precision"] == [] and report["probes"] == 2 * len(found(pipe))  # in step 2
    assert torch.equal(first, run(pipe, steps=4)) and [own for own, _, _ in seen[8:]] == [True] * 4 + [False] * 4
    users = {one.shared.users for one in found(pipe).values()}
    svg.accelerate(pipe, SVG1Config(**settings, linear_warmup=False))
    del seen[:]
    assert not torch.equal(first, run(pipe, steps=4)) and not any(own for own, _, _ in seen)
    assert {one.shared.users for one in found(pipe).values()} == users


def test_too_little_memory_for_the_warm_up_is_said(load, run, monkeypatch):
    pipe = load("wan")
    svg.accelerate(pipe, SVG1Config(linears="all", density=1.0))

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(QuantizedLinear, "take_own", full)
    with pytest.raises(torch.OutOfMemoryError, match="linear_warmup must be false where the GPU cannot hold"):
        run(pipe, steps=2)
