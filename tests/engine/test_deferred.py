"""Deferred reads: every tensor's numbers reach its own reader, in the order of the queue, once."""

import math

import pytest
import torch

from svg.engine.deferred import DeferredReads


def test_numbers_reach_their_readers_in_order():
    reads, told = DeferredReads(), []
    reads.add(torch.tensor(0.5), lambda numbers: told.append(("one", numbers)))
    reads.add(torch.arange(6, dtype=torch.int32).view(2, 3), lambda numbers: told.append(("table", numbers)))
    reads.add(torch.empty(0), lambda numbers: told.append(("none", numbers)))
    reads.add(torch.tensor([math.inf, 2.0], dtype=torch.float16), lambda numbers: told.append(("half", numbers)))
    assert told == []
    reads.read()
    assert told == [("one", [0.5]), ("table", [0, 1, 2, 3, 4, 5]), ("none", []), ("half", [math.inf, 2.0])]
    reads.read()
    assert len(told) == 4


def test_a_reader_that_raises_leaves_nothing_behind():
    def refuse(numbers):
        raise FloatingPointError(f"got {numbers}")

    reads, told = DeferredReads(), []
    reads.add(torch.tensor([math.nan]), refuse)
    reads.add(torch.tensor([1.0]), told.append)
    with pytest.raises(FloatingPointError, match="nan"):
        reads.read()
    reads.read()
    assert told == []


def test_a_reader_may_queue_for_the_next_time():
    reads, told = DeferredReads(), []
    reads.add(torch.tensor(1.0), lambda numbers: reads.add(torch.tensor(2.0), told.append))
    reads.read()
    assert told == []
    reads.read()
    assert told == [[2.0]]
