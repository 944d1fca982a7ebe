"""Whole methods on a GPU, with inputs of more than 2^31 elements; skipped elsewhere."""

from dataclasses import replace

import pytest
import torch

from svg.attend import attend
from svg.config import SpargeConfig, SVG1Config, SVG2Config
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState
from svg.kernels.common import target

ALWAYS = {"warmup_steps": 0, "warmup_layers": 0, "check_finite": False}
SVG2 = {**ALWAYS, "top_p": 1.0, "budget": 0.03, "min_k_ratio": 0.0, "first_iterations": 2}
CONFIGS = {
    "svg1": SVG1Config(density=0.05, **ALWAYS),
    "svg2": SVG2Config(**SVG2),
    "svg2 tiles": SVG2Config(selection="tiles", **SVG2),
    "svg2 compensate": SVG2Config(compensate=True, **SVG2),
    "svg2 int8": SVG2Config(precision="int8-fp16", guard=False, **SVG2),
    "sparge": SpargeConfig(topk=0.03, **ALWAYS),
}
HEADS, DIM = 56, 128
LAYOUT = TokenLayout(84, 45, 80)  # 302,400 tokens
NEEDED = 48 << 30  # bytes of free memory


def large_inputs(layout=LAYOUT, heads=HEADS, dim=DIM, device="cuda"):
    """q, k, v [1, S, H, D] bf16: tokens of the same neighbourhood are alike."""
    tokens = layout.total_tokens
    assert layout is not LAYOUT or tokens * heads * dim > 2**31
    place = torch.linspace(0, 40, tokens, device=device)[:, None] * torch.linspace(0.2, 2, dim, device=device)
    smooth = place.sin()[None, :, None]
    out = []
    for seed in range(3):
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.empty(1, tokens, heads, dim, device=device, dtype=torch.bfloat16)
        for head in range(heads):
            x[:, :, head : head + 1] = smooth + torch.randn(1, tokens, 1, dim, generator=generator, device=device)
        out.append(x)
    return out


def differences(config, inputs, layout=LAYOUT):
    """How many numbers of the last two heads depend on whether all heads are there."""

    def run(x):
        state = RunState(config, num_layers=1)
        state.begin_forward(0, 1, "cond", layout)
        return attend(*x, state, 0)

    alone = run([x[:, :, -2:].contiguous() for x in inputs])
    assert alone.isfinite().all() and alone.abs().amax((0, 1, 3)).min() > 0
    return (run(inputs)[:, :, -2:] != alone).sum().item()


@pytest.fixture(scope="module")
def inputs():
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"needs a GPU with {NEEDED >> 30} GiB free")
    return large_inputs()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_offsets_beyond_2_31_elements(inputs, config):
    assert target.use_triton(inputs[0])
    assert differences(config, inputs) == 0


CAPTURED = {
    "svg1": SVG1Config(density=0.3, **ALWAYS),
    **{name: replace(config, budget=0.3) for name, config in CONFIGS.items() if isinstance(config, SVG2Config)},
    "svg2 int8-fp8 compensate": SVG2Config(
        precision="int8-fp8", compensate=True, guard=False, **{**SVG2, "budget": 0.3}
    ),
    "svg2 int8-fp8": SVG2Config(precision="int8-fp8", guard=False, **{**SVG2, "budget": 0.3}),
    "sparge": SpargeConfig(topk=0.3, **ALWAYS),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", CAPTURED.values(), ids=CAPTURED.keys())
def test_a_call_is_captured_in_a_cuda_graph(config):
    """The plan included: a replay on other inputs gives what a call gives."""
    layout = TokenLayout(5, 16, 20)
    first, second = (torch.randn(3, 1, layout.total_tokens, 4, 128, device="cuda").bfloat16() for _ in range(2))

    def begun():
        state = RunState(config, num_layers=1)
        state.begin_forward(0, 2, "cond", layout)
        attend(*first, state, 0)  # compiles, and clusters from nothing
        state.begin_forward(1, 2, "cond", layout)
        return state

    right = attend(*second, begun(), 0)
    state, static, graph = begun(), first.clone(), torch.cuda.CUDAGraph()
    graph.register_generator_state(state.generator(0, first.device))
    with torch.cuda.graph(graph):
        out = attend(*static, state, 0)
    static.copy_(second)
    graph.replay()
    assert torch.equal(out, right)


def test_the_check_itself():
    layout = TokenLayout(3, 4, 5)
    made = large_inputs(layout, 4, 32, "cpu")
    config = SVG2Config(**{**SVG2, "budget": 0.4}, num_q_clusters=4, num_k_clusters=6)
    assert differences(config, made, layout) == 0
