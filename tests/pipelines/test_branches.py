"""A branch of guidance on each of two processes: who computes what, and when the results are there."""

import threading

import pytest
import torch

from svg.pipelines import branches
from svg.pipelines.branches import TwoBranches


class Doubles(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, hidden_states, branch, return_dict=True):
        self.calls.append(branch)
        return (hidden_states * (2.0 if branch == "cond" else 3.0),)


class Meeting:
    """`dist.broadcast` for two threads: what the source brings, the other gets."""

    def __init__(self):
        self.barrier, self.box = threading.Barrier(2, timeout=10), [None]

    def broadcast(self, tensor, source):
        if self.ranks[threading.current_thread().name] == source:
            self.box[0] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(self.box[0])
        self.barrier.wait()


def on_both(monkeypatch, run):
    """Results of `run(module)` by rank."""
    meeting, results = Meeting(), {}
    meeting.ranks = {"rank 0": 0, "rank 1": 1}
    monkeypatch.setattr(branches.dist, "broadcast", meeting.broadcast)

    def start(rank):
        module = Doubles()
        module.forward = TwoBranches(module, rank)
        results[rank] = run(module), module.calls

    threads = [threading.Thread(target=start, args=(rank,), name=f"rank {rank}") for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(2)]


def guided(module, steps=3):
    outputs = []
    for step in range(steps):
        latents = torch.full((1, 2), float(step + 1))
        cond, uncond = (module(latents, branch, return_dict=False)[0] for branch in ("cond", "uncond"))
        outputs.append(uncond + 4 * (cond - uncond))
    module.forward.end_run()
    return torch.stack(outputs)


def test_both_have_both_branches_and_compute_one_after_the_first_step(monkeypatch):
    (first, calls_0), (second, calls_1) = on_both(
        monkeypatch, lambda module: torch.cat([guided(module), guided(module)])
    )
    expected = -torch.tensor([1.0, 2.0, 3.0] * 2)[:, None, None].expand(6, 1, 2)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert calls_0 == ["cond", "uncond", "cond", "cond"] * 2 and calls_1 == ["cond", "uncond", "uncond", "uncond"] * 2


def test_one_call_a_step_is_noticed():
    module = Doubles()
    module.forward = TwoBranches(module, 0)
    module(torch.ones(1, 2), "cond", return_dict=False)
    with pytest.raises(ValueError, match="this pipeline called the transformer once a step"):
        module(torch.ones(1, 2), "cond", return_dict=False)
    with pytest.raises(ValueError, match="got one call in a step"):
        module.forward.end_run()


def test_more_than_two_processes_are_refused(monkeypatch):
    monkeypatch.setattr(branches.dist, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="split over 2 processes, got 3"):
        branches.split_branches(Doubles())
