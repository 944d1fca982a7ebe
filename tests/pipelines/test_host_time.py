"""What svg costs a host beside the attention itself; processor time, and bounds that leave room for slow machines."""

import time

import diffusers
import pytest
import torch

import svg
from svg import attend as attend_module
from svg.config import NearConfig
from svg.engine.layout import TokenLayout
from svg.pipelines.attach import attached

LAYERS, STEPS = 40, 50
ROOM = 4  # for cores that are slow, or shared: 50 us a call and 1 s are for an idle core of a server


class NoPlan:
    """A method that has nothing to do."""

    kind, reused = None, False

    def plan(self, q, *rest):
        self.ones = torch.ones(q.shape[:2])
        return self

    def execute(self, q, k, v, precision):
        return q

    def density(self):
        return self.ones


@pytest.fixture
def transformer(monkeypatch):
    """Wan 2.1 14B by its shapes, accelerated, with attention that costs nothing."""
    monkeypatch.setattr(attend_module, "planner", lambda config: NoPlan())
    monkeypatch.setattr(attend_module, "dense_attention", lambda q, *rest: q)
    with torch.device("meta"):
        dit = diffusers.WanTransformer3DModel()
    assert len(dit.blocks) == LAYERS
    return dit


@torch.no_grad()
def run(transformer, config):
    """A run of one branch, attention calls alone; seconds of its fastest step."""
    hook = attached(svg.accelerate(transformer, config))["transformer"]
    q, k, v = (torch.randn(1, 8, LAYERS, 16) for _ in range(3))
    hook.state.told = True
    hook.state.begin_run()
    steps = []
    for step in range(STEPS):
        hook.state.begin_forward(step, STEPS, "cond", TokenLayout(2, 2, 2))
        start = time.process_time()
        for processor in hook.processors:
            processor.attend(q, k, v)
        steps.append(time.process_time() - start)
    return min(steps)


@pytest.mark.parametrize("warmup", [0.0, 1.0], ids=["sparse", "dense"])
def test_a_call_costs_little_beside_attention(transformer, warmup):
    config = NearConfig(warmup_steps=warmup, warmup_layers=0.0, check_finite=False)
    assert run(transformer, config) / LAYERS < ROOM * 50e-6


def test_attaching_and_reporting_take_less_than_a_second(transformer):
    start = time.process_time()
    svg.restore(svg.accelerate(transformer, "balanced"))
    seconds = time.process_time() - start
    run(transformer, NearConfig())
    start = time.process_time()
    report = svg.report(transformer)["transformers"]["transformer"]
    seconds += time.process_time() - start
    assert report["calls"]["total"] == LAYERS * STEPS and seconds < ROOM * 1.0
