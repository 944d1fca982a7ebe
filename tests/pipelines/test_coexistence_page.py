"""docs/coexistence.md: every snippet beside svg, attached before it and after it."""

import re
import threading
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

import svg
from svg.config import SVG2Config

PAGE = (Path(__file__).parents[2] / "docs" / "coexistence.md").read_text()
SNIPPETS = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, flags=re.S))
PACKAGES = {"cache_dit": "cache_dit", "torchao": "torchao.quantization"}
CLUSTERS = dict(num_q_clusters=4, num_k_clusters=6, first_iterations=5, warmup_layers=0.0)
FULL = SVG2Config(top_p=1.0, warmup_steps=0.0, **CLUSTERS)
SPARSE = SVG2Config(top_p=0.5, warmup_steps=0.2, **CLUSTERS)


@pytest.fixture(autouse=True)
def clean():
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    torch._dynamo.reset()


def apply(name, pipe):
    torch.manual_seed(5)  # random adapters
    exec(SNIPPETS[name], {"pipe": pipe})


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", [name for name in SNIPPETS if name != "context_parallel"])
def test_snippet(load, run, name, order):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"the package {PACKAGES[name]} is not installed")
    stock_pipe = load("wan")
    apply(name, stock_pipe)
    stock = run(stock_pipe)
    pipe = load("wan")
    actions = [lambda: apply(name, pipe), lambda: svg.accelerate(pipe, FULL)]
    for action in actions if order == "before" else actions[::-1]:
        action()
    torch.testing.assert_close(run(pipe), stock, rtol=0, atol=1e-5)
    calls = svg.report(pipe)["transformers"]["transformer"]["calls"]
    assert calls["sparse"] == calls["total"] > 0
    svg.accelerate(pipe, SPARSE)
    assert run(pipe).isfinite().all()
    svg.restore(pipe)
    torch.testing.assert_close(run(pipe), stock, rtol=0, atol=1e-5)


def test_the_parallel_snippet_is_complete():
    names = {}
    exec(SNIPPETS["context_parallel"], names)
    assert callable(names["on_every_rank"])


class QuantisedLinear(nn.Module):
    """As torchao's and bitsandbytes' linears: no float weight to read, only a call."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.packed * self.scale, self.bias)


def quantise(pipe):
    for block in pipe.transformer.blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn1, name, QuantisedLinear(getattr(block.attn1, name)))


def test_quantised_linears(load, run):
    stock_pipe, pipe = load("wan"), load("wan")
    quantise(stock_pipe)
    svg.accelerate(pipe, FULL)
    quantise(pipe)
    torch.testing.assert_close(run(pipe), run(stock_pipe), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [dict(guidance_scale=1.0), dict(num_videos_per_prompt=2), dict(prompt=["a dog", "a red ball"])],
    ids=str,
)
def test_arguments_of_the_call(load, run, arguments):
    stock = run(load("wan"), **arguments)
    torch.testing.assert_close(run(svg.accelerate(load("wan"), FULL), **arguments), stock, rtol=0, atol=1e-5)


def test_prompt_embeds_and_a_callback_of_the_users(load, run):
    def call(pipe):
        positive, negative = pipe.encode_prompt("a red ball", max_sequence_length=32)
        seen = []

        def after(pipe, step, timestep, tensors):
            seen.append(step)
            return {"latents": tensors["latents"] * 0.9}

        out = run(
            pipe, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative, callback_on_step_end=after,
            callback_on_step_end_tensor_inputs=["latents"],
        )  # fmt: skip
        assert seen == [0, 1, 2, 3, 4]
        return out

    torch.testing.assert_close(call(svg.accelerate(load("wan"), FULL)), call(load("wan")), rtol=0, atol=1e-5)


def test_from_pipe_shares_the_transformer_and_runs_by_its_own_scheduler(load, run):
    pipe = svg.accelerate(load("wan"), FULL)
    stock = run(load("wan"), steps=4)
    other = diffusers.WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(other, steps=4), stock, rtol=0, atol=1e-5)


def test_two_pipes_in_two_threads(load, run):
    pipes = [svg.accelerate(load("wan"), SPARSE) for _ in range(2)]
    alone = [run(pipe, seed=seed) for seed, pipe in enumerate(pipes)]
    together = {}
    threads = [
        threading.Thread(target=lambda s=seed, p=pipe: together.update({s: run(p, seed=s)}))
        for seed, pipe in enumerate(pipes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(2))
