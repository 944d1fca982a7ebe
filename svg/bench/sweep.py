"""Other rows of the launch tables, timed one after the other: how the tables are filled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from svg.kernels import kmeans_assign
from svg.kernels.block_sparse import triton as block_sparse
from svg.kernels.clustering import assign
from svg.kernels.common import target

from .timing import median_ms


def sweep_attention(bench, op: Callable, prefix: str, flops: float, shape: str, about: dict, dim: int) -> None:
    """Time an attention call under every candidate row.

    Args:
        bench: collects the results.
        op: the call.
        prefix: of the results' keys.
        flops: useful operations of the call.
        shape, about: as `Bench.note` takes them.
        dim: head dim.
    """
    key = (2, 64 if dim <= 64 else 128)
    table = target.launch_row(block_sparse.LAUNCH, torch.device("cuda"))
    for row in block_sparse.candidates():
        with replaced(table, key, row):
            ms = time_or_none(op)
        if ms is None:
            bench.say(f"{prefix}/{row.name()} does not fit this GPU: left out")
        else:
            bench.note(f"{prefix}/{row.name()}/tflops", flops / ms / 1e9, "TFLOP/s", shape, **about)


def sweep_assign(bench, x: Tensor, start: Tensor, prefix: str, shape: str, inputs: str) -> None:
    """Time the assignment under other tile sizes.

    Args:
        bench: collects the results.
        x, start: tokens and centroids.
        prefix, shape, inputs: as `Bench.note` takes them.
    """
    table = target.launch_row(assign.LAUNCH, x.device)
    for s, c, warps, stages in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3)):
        with replaced(table, x.element_size(), assign.Launch(s, c, warps, stages)):
            ms = time_or_none(lambda: kmeans_assign(x, start))
        if ms is not None:
            name = f"{prefix}/assign_{s}x{c}_w{warps}_s{stages}/ms"
            bench.note(name, ms, "ms", shape, inputs=inputs)


@contextmanager
def replaced(table: dict, key, row) -> Iterator[None]:
    """A launch table with another row, for as long as the block runs."""
    kept = table[key]
    table[key] = row
    try:
        yield
    finally:
        table[key] = kept


def time_or_none(op: Callable) -> float | None:
    """Median milliseconds of a call, or None where its launch doesn't fit the GPU."""
    try:
        return median_ms(op, 5)
    except target.triton.runtime.errors.OutOfResources:
        return None
