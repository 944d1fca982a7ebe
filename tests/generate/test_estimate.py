"""How long a run will take: dense and sparse steps have a pace each."""

from types import SimpleNamespace

import pytest
import torch

from svg.config import DenseConfig, NearConfig
from svg.generate.estimate import Estimate, clock

PIPE = SimpleNamespace(_execution_device=torch.device("cpu"))


def said(config, later, sparse_step, ends, steps=20):
    job, told = SimpleNamespace(request=SimpleNamespace(steps=steps)), []
    estimate = Estimate(PIPE, job, config, later, sparse_step, told.append)
    for step, seconds in enumerate(ends, 1):
        estimate(SimpleNamespace(step=step, seconds=seconds))
    return told


def test_sparse_steps_count_at_their_own_pace():
    """Three dense steps of a second each; four of twenty are dense, and the warm-up's sparse step took three."""
    (text,) = said(NearConfig(warmup_steps=0.2), 2, 3.0, [1, 2, 3, 4, 7])
    assert "52 s for this video, 92 s for all 3 runs" in text and "GiB of memory" in text


def test_without_a_warm_up_the_first_sparse_step_is_waited_for():
    assert said(NearConfig(warmup_steps=0.2), 2, None, [1, 2, 3, 4]) == []
    (text,) = said(NearConfig(warmup_steps=0.2), 2, None, [1, 2, 3, 4, 7, 10])
    assert "52 s for this video, 92 s for all 3 runs" in text


def test_sparse_steps_that_have_run_are_asked_themselves():
    (text,) = said(NearConfig(warmup_steps=0.05), 1, 9.0, [1, 4, 7, 10])
    assert "58 s for this video, 78 s for all 2 runs" in text  # one dense second, nineteen of three


def test_without_a_dense_step_nothing_is_said_of_dense_runs():
    (text,) = said(NearConfig(warmup_steps=0.0), 2, 9.0, [2, 4, 6])
    assert "at this pace 40 s for this video, decoding apart" in text


def test_a_dense_run_and_a_short_one():
    (text,) = said(DenseConfig(), 1, None, [1, 2, 3])
    assert "20 s for this video, 40 s for all 2 runs" in text
    assert said(DenseConfig(), 1, None, [1, 2, 3], steps=3) == []


@pytest.mark.parametrize("seconds, text", [(45, "45 s"), (720, "12 min"), (7500, "2 h 05 min")])
def test_clock(seconds, text):
    assert clock(seconds) == text
