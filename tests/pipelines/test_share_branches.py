"""near in pipelines: which calls share a choice, whether branches come in turn or in one batch."""

import pytest
import torch

import svg
from svg.config import NearConfig
from svg.pipelines.attach import attached

NEAR = NearConfig(
    budget=0.9, early=0.0, granule=8, rows=16, pool=1, cluster_tokens=8, query_cluster_tokens=8, warmup_steps=0.2, warmup_layers=0.0,
    min_tokens=0, first_iterations=3,
)  # fmt: skip


def observed(pipe, run, config=NEAR, **changes):
    """(branch, plan) of every sparse call of a run."""
    svg.accelerate(pipe, config)
    (hook,) = attached(pipe).values()
    seen = []

    def observe(call):
        if call.plan is not None:
            seen.append((hook.state.branch, call.plan))

    hook.state.observer = observe
    run(pipe, **changes)
    svg.restore(pipe)
    return seen


def test_branches_in_turn(load, run):
    seen = observed(load("wan"), run)
    assert [plan.reused for branch, plan in seen] == [branch == "uncond" for branch, _ in seen]
    assert sum(plan.reused for _, plan in seen) == len(seen) / 2 > 0


def test_samples_with_prompts_of_their_own_are_not_tied(load, run):
    seen = observed(load("wan"), run, prompt=["a red ball moves right", "a blue cat"])
    orders = [plan.chosen.q_order for _, plan in seen]
    assert orders[0].shape[0] == 2 and not any(torch.equal(order[0], order[1]) for order in orders)


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_1_5"])
def test_branches_in_one_batch(load, run, name):
    prompts = ["a red ball moves right", "a blue cat"]
    seen = observed(load(name), run, prompt=prompts)
    for _, plan in seen:
        order = plan.chosen.q_order
        assert order.shape[0] == 4 and torch.equal(order[:2], order[2:]) and not torch.equal(order[0], order[1])
    alone = observed(load(name), run, prompt=prompts, guidance_scale=1.0)
    assert len(alone) == len(seen) > 0
    assert not any(torch.equal(plan.chosen.q_order[0], plan.chosen.q_order[1]) for _, plan in alone)
