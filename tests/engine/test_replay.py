"""Captured calls, with a stand-in for CUDA's graphs that does its work again on the tensors that it was recorded with."""

import dataclasses
import threading

import pytest
import torch
from tiny_pipelines import BUILDERS

import svg
import svg.attend
from svg.attend import attend
from svg.config import NearConfig, Sage2Config, SpargeConfig, SVG1Config, SVG2Config
from svg.engine import replay
from svg.engine.layout import TokenLayout
from svg.engine.replay import GRAPHS, Replays, is_launch_bound
from svg.engine.state import RunState
from svg.engine.tree import take_apart
from svg.pipelines.attach import attached

LAYOUT = TokenLayout(4, 6, 10)
COLD = {"warmup_steps": 0.0, "warmup_layers": 0.0}
CONFIGS = [
    NearConfig(budget=0.35, rows=64, cluster_tokens=16, query_cluster_tokens=32, first_iterations=3, **COLD),
    NearConfig(budget=0.35, rows=64, cluster_tokens=16, query_order="hilbert", share_branches=False, **COLD),
    NearConfig(budget=0.35, rows=64, cluster_tokens=16, query_order="hilbert", refresh=2, **COLD),
    NearConfig(
        budget=0.35, rows=64, cluster_tokens=16, query_cluster_tokens=32, residual=1.0, **{**COLD, "warmup_steps": 0.2}
    ),
    NearConfig(budget=0.35, rows=64, cluster_tokens=16, query_cluster_tokens=32, refresh=3, **COLD),
    NearConfig(budget=0.35, rows=64, head_budget=((0.3, 0.5, 1.0), (0.4, 0.4, 0.25)), **COLD),
    SVG2Config(top_p=0.6, num_q_clusters=6, num_k_clusters=12, first_iterations=3, compensate=True, refresh=2, **COLD),
    SVG1Config(density=0.4, block_size=16, **COLD),
    SpargeConfig(topk=0.4, **COLD),
    Sage2Config(precision="int8-fp16", probe_every=2),
]


class Again:
    """Work that is done again, into the same tensors; what was recorded last holds nothing before."""

    made = 0

    def record(self, run):
        Again.made += 1
        self.run, self.found = run, run()
        self.outputs = []
        take_apart(self.found, self.outputs)
        return self.found

    def replay(self):
        again = []
        take_apart(self.run(), again)
        for kept, new in zip(self.outputs, again, strict=True):
            kept.set_(new)  # lists of the reference are as long as they have to be


def video(config, seed=0, steps=6, layers=2):
    """Outputs and records of a run's calls, both branches, whose tokens move a little from step to step."""
    generator = torch.Generator().manual_seed(seed)
    meanings = 1.5 * torch.randn(3, 9, 1, 32, generator=generator)
    kind = torch.randint(0, 9, (2, LAYOUT.total_tokens), generator=generator)
    state = RunState(config, layers)
    state.replays = Replays(lambda device: Again())
    outputs = []
    for step in range(steps):
        for branch in ("cond", "uncond"):
            state.begin_forward(step, steps, branch, LAYOUT)
            for layer in range(layers):
                q, k, v = (
                    meanings[i][kind] + 0.4 * torch.randn(2, LAYOUT.total_tokens, 3, 32, generator=generator)
                    for i in range(3)
                )
                outputs.append(attend(q, k, v, state, layer))
    return outputs, state


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_a_run_of_captured_calls_is_the_same_bit_for_bit(config, monkeypatch):
    plain, before = video(config)
    Again.made = 0
    monkeypatch.setattr(svg.attend, "is_launch_bound", lambda q, wanted: True)
    captured, state = video(config)
    assert Again.made >= 1
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    for a, b in zip(before.records, state.records, strict=True):
        assert torch.equal(a.density, b.density) and (a.reused, a.dense, a.precision) == (
            b.reused,
            b.dense,
            b.precision,
        )
        assert (a.kind is None) == (b.kind is None) and (a.kind is None or torch.equal(a.kind, b.kind))


def test_layers_and_steps_share_captured_calls(monkeypatch):
    monkeypatch.setattr(svg.attend, "is_launch_bound", lambda q, wanted: True)
    Again.made = 0
    # Lists of branches that choose apart: the reference's are as long as they have to be, so that calls that take them differ.
    video(dataclasses.replace(CONFIGS[0], early=0.5, share_branches=False), steps=12, layers=4)
    assert Again.made <= 2  # of 4 x 12 x 2 calls with budgets of 12 steps: one graph serves them all


def test_a_branch_that_takes_the_other_ones_choice_is_captured_too(monkeypatch):
    monkeypatch.setattr(svg.attend, "is_launch_bound", lambda q, wanted: True)
    _, state = video(CONFIGS[0], steps=3)
    assert "k_centroids" not in state._layers[0, "uncond"].cache
    assert {
        branch for (constants, _, _) in state.replays._calls for branch in constants if branch in ("cond", "uncond")
    } == {
        "cond",
        "uncond",
    }


def test_sums_are_watched_in_captured_calls(monkeypatch):
    monkeypatch.setattr(svg.attend, "is_launch_bound", lambda q, wanted: True)
    state = RunState(CONFIGS[-2], 1)
    state.replays = Replays(lambda device: Again())
    q = torch.randn(1, LAYOUT.total_tokens, 2, 32)
    for step in range(3):
        state.begin_forward(step, 5, "cond", LAYOUT)
        attend(q, q, q, state, 0)
    state.begin_forward(3, 5, "cond", LAYOUT)
    with pytest.raises(FloatingPointError, match="v must be finite"):
        attend(q, q, q * torch.inf, state, 0)


def test_results_are_never_overwritten():
    replays = Replays(lambda device: Again())
    results = [replays.call("double", (torch.full((3,), float(n)),), lambda x: (x * 2, x)) for n in range(5)]
    assert [(a[0].item(), b[0].item()) for a, b in results] == [(2.0 * n, float(n)) for n in range(5)]


def test_another_shape_or_key_is_another_call():
    replays, seen = Replays(lambda device: Again()), []

    def run(x):
        seen.append(tuple(x.shape))
        return x + 1

    for shape in ((2,), (3,)):
        for key in ("a", "b"):
            replays.call(key, (torch.zeros(shape),), run)
    assert seen == [(2,), (2,), (3,), (3,)] and not replays._captured


def test_only_so_many_are_kept():
    replays = Replays(lambda device: Again())
    for key in range(GRAPHS + 5):
        for n in (1, 2, 3):
            assert replays.call(key, (torch.full((2,), float(n)),), lambda x: x * 3)[0] == 3 * n
    assert len(replays._captured) == GRAPHS


def test_what_cannot_be_captured_runs_as_it_is(caplog):
    class Refusing(Again):
        def record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    replays = Replays(lambda device: Refusing())
    assert [replays.call("k", (torch.ones(2) * n,), lambda x: x + 1)[0].item() for n in range(4)] == [1, 2, 3, 4]
    assert [record.message for record in caplog.records] == [
        "an attention call runs uncaptured, a little slower: operation not permitted when stream is capturing"
    ]


def test_nothing_is_captured_on_a_cpu_or_where_it_is_switched_off():
    q = torch.zeros(1, 2, 64, 32)
    assert not is_launch_bound(q, None) and not is_launch_bound(q, True) and not is_launch_bound(q, False)


@pytest.mark.parametrize("wrong", ["yes", 1])
def test_the_switch_is_checked(wrong):
    with pytest.raises(TypeError, match="cuda_graphs must be true, false or null"):
        NearConfig(cuda_graphs=wrong)


def test_memory_of_captured_calls_is_given_back_when_no_thread_captures(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(replay._CAPTURING.locked()))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(replay, "CudaGraph", lambda device, pool: Again())
    replays = Replays()
    replays.call("k", (torch.ones(2),), lambda x: x + 1)
    replays.clear()
    assert not emptied  # nothing was captured
    for _ in range(3):
        replays.call("k", (torch.ones(2),), lambda x: x + 1)
    with replay._CAPTURING:
        waiting = threading.Thread(target=replays.clear)
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive() and not emptied
    waiting.join()
    assert emptied == [True] and not replays._captured and not replays._buffers


def test_taking_a_pipeline_back_after_an_interrupted_run_clears_its_calls():
    pipe = BUILDERS["wan"]()
    pipe.set_progress_bar_config(disable=True)
    svg.accelerate(pipe, NearConfig(budget=0.9, **COLD))
    replays = attached(pipe)["transformer"].state.replays
    replays.call("k", (torch.ones(2),), lambda x: x + 1)
    svg.restore(pipe)
    assert not replays._calls


def test_two_threads_never_capture_at_once(monkeypatch):
    inside, most = [], []

    def recorded(self, run):
        inside.append(run)
        most.append(len(inside))
        threading.Event().wait(0.02)
        inside.remove(run)

    monkeypatch.setattr(replay.CudaGraph, "_record", recorded)
    monkeypatch.setattr(replay.torch.cuda, "CUDAGraph", lambda: None)
    graphs = [replay.CudaGraph(torch.device("cuda:0"), None) for _ in range(4)]
    threads = [threading.Thread(target=graph.record, args=(lambda n=n: n,)) for n, graph in enumerate(graphs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
