"""torch.compile beside svg: where graphs break, and when they are compiled."""

import pytest
import torch
from torch._dynamo.utils import counters

import svg
from svg.config import NearConfig

pytestmark = pytest.mark.slow

NEAR = NearConfig(
    budget=0.9, granule=8, rows=16, cluster_tokens=8, query_cluster_tokens=8, warmup_steps=0.2, warmup_layers=0.0
)


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_blocks(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager")


def compile_whole(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


@pytest.mark.parametrize("compiled", [compile_blocks, compile_whole])
@pytest.mark.parametrize("name", ["wan", pytest.param("hunyuan", marks=pytest.mark.slow)])
def test_graphs_break_at_attention_and_nothing_is_compiled_after_the_second_step(load, run, name, compiled):
    plain = run(svg.accelerate(load(name), NEAR))
    pipe = svg.accelerate(load(name), NEAR)
    compiled(pipe)
    graphs = []  # a recompilation makes a graph, too

    def count(pipe, step, timestep, tensors):
        graphs.append(counters["stats"]["unique_graphs"])
        return {}

    torch.testing.assert_close(run(pipe, callback_on_step_end=count), plain, rtol=0, atol=1e-5)
    run(pipe, steps=7, callback_on_step_end=count)
    assert graphs[0] > 0 and set(graphs[1:]) == {graphs[1]}
    assert all("VideoAttnProcessor.attend" in reason for reason in counters["graph_break"])


def test_a_block_of_wan_breaks_in_each_frame_above_attention_once(load, run):
    """The fused forward's, the block's, the attention module's and the processor's: 4 graphs, whatever the layers."""
    pipe = svg.accelerate(load("wan"), NEAR)
    compile_blocks(pipe)
    run(pipe)
    assert counters["stats"]["unique_graphs"] == 4 and sum(counters["graph_break"].values()) == 4
