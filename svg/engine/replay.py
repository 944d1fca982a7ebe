"""Whole attention calls captured in CUDA graphs and replayed, where launching a call's kernels takes longer than running them.

A graph serves every layer and step whose call does the same work on tensors of the same shapes: inputs, and what the layer
remembers, are copied into the tensors that it was captured with, and what it leaves is copied out. Copies cost the traffic
of q, k, v and the output once more, so long calls, which are not bound by launches, run as they are.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config.base import MethodConfig
from .tree import fresh, like, once, put_together, take_apart

GRAPHS = 24  # that are kept at once
CALLS = 256  # whose number is kept
LAUNCH_BOUND = 1.5e13  # operations of dense attention, about 20 ms on an H100, up to which calls are captured

_log = logging.getLogger("svg")
# While a thread captures, no other may use its stream or empty the allocator.
_CAPTURING = threading.Lock()


class Steady(NamedTuple):
    """With what a method's call can be captured.

    Args:
        config: settings that are the same for other layers and steps whose calls do the same work.
        keeps: tensors that the call finds in a cache, not among its arguments, which must live as long as its graph.
    """

    config: MethodConfig
    keeps: Any = None


class Graph(Protocol):
    """Work that was recorded once."""

    def record(self, run: Callable[[], Any]) -> Any:
        """Record what a function launches, and return what it returns; its tensors hold nothing before a replay."""
        ...

    def replay(self) -> None:
        """Do the work again on the same tensors."""
        ...


class CudaGraph:
    """A CUDA graph of a device whose memory is that of the others: none is replayed before what another left was copied."""

    _streams: ClassVar[
        dict[torch.device, torch.cuda.Stream]
    ] = {}  # one each: cuBLAS keeps a workspace for every stream

    def __init__(self, device: torch.device, pool: Any):
        self._device, self._pool, self._graph = device, pool, torch.cuda.CUDAGraph()

    def record(self, run: Callable[[], Any]) -> Any:
        with _CAPTURING:
            return self._record(run)

    def _record(self, run: Callable[[], Any]) -> Any:
        here, aside = torch.cuda.current_stream(self._device), self._stream()
        aside.wait_stream(here)
        # Not torch.cuda.graph, which waits for the device, collects garbage and empties the allocator's cache.
        with torch.cuda.stream(aside):
            self._graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                found = run()
            finally:
                self._graph.capture_end()
        here.wait_stream(aside)
        return found

    def replay(self) -> None:
        self._graph.replay()

    def _stream(self) -> torch.cuda.Stream:
        if self._device not in self._streams:
            self._streams[self._device] = torch.cuda.Stream(self._device)
        return self._streams[self._device]


class Captured:
    """One recorded call.

    Args:
        graph: what it launches.
        inputs: tensors that it reads.
        outputs: tensors that it leaves, beside those of `inputs`.
        shape: of what it returns, over inputs and outputs.
        keeps: what must live as long.
    """

    def __init__(self, graph: Graph, inputs: list[Tensor], outputs: list[Tensor], shape: Any, keeps: Any):
        self._graph, self._inputs, self._outputs, self._shape, self._keeps = graph, inputs, outputs, shape, keeps

    def __call__(self, tensors: list[Tensor]) -> Any:
        """What the call returns for other tensors; nothing of it is overwritten later."""
        for static, tensor in zip(self._inputs, tensors):
            once(static).copy_(once(tensor))
        self._graph.replay()
        return put_together(self._shape, [*tensors, *(once(x).clone().expand_as(x) for x in self._outputs)])


class Replays:
    """The captured calls of one transformer.

    Args:
        graph: makes an empty graph for a device; None: CUDA's.
    """

    def __init__(self, graph: Callable[[torch.device], Graph] | None = None):
        self._make = graph or self._cuda_graph
        self.clear()

    def clear(self) -> None:
        """Forget all, and give the memory back: what a graph's pool held is of no use to anything else before that."""
        captured = bool(getattr(self, "_pools", None))
        self._captured: dict[Hashable, Captured | None] = {}
        self._calls: Counter[Hashable] = Counter()
        self._buffers: dict[Hashable, Tensor] = {}
        self._pools: dict[torch.device, Any] = {}
        if captured:
            with _CAPTURING:
                torch.cuda.empty_cache()

    def call(self, key: Hashable, arguments: tuple, run: Callable[..., Any], keeps: Any = None) -> Any:
        """What `run(*arguments)` returns: run the first time, captured the second, replayed from then on.

        Args:
            key: what decides the work beside tensors and what is in `arguments` with them.
            arguments: tensors in dicts, tuples and dataclasses, with whatever else the work depends on.
            run: a function of them that changes nothing, waits for nothing, and launches the same work whenever key and
                shapes are the same.
            keeps: what must live as long as what is captured.
        """
        tensors: list[Tensor] = []
        shape = take_apart(arguments, tensors)
        key = (key, shape, like(tensors))
        if key in self._captured:
            captured = self._captured[key]
        elif self._calls[key] == 0:
            if len(self._calls) >= CALLS:
                self._calls.clear()
            self._calls[key] += 1
            return run(*arguments)
        else:
            captured = self._captured[key] = self._capture(shape, tensors, run, keeps)
            if len(self._captured) > GRAPHS:
                del self._captured[next(iter(self._captured))]
        return run(*arguments) if captured is None else captured(tensors)

    def _capture(self, shape: Any, tensors: list[Tensor], run: Callable[..., Any], keeps: Any) -> Captured | None:
        """The call on tensors of its own, which later calls are copied into; None where it cannot be captured."""
        with torch.inference_mode(False):  # what is made inside cannot be written to outside
            inputs = [self._buffer(index, x) for index, x in enumerate(tensors)]
        for static, tensor in zip(inputs, tensors):
            once(static).copy_(once(tensor))
        device = next(x.device for x in tensors)
        graph = self._make(device)
        run(*put_together(shape, inputs))  # what a kernel's first launch sets up cannot be captured
        try:
            found = graph.record(lambda: run(*put_together(shape, inputs)))
        except RuntimeError as error:
            _log.warning("an attention call runs uncaptured, a little slower: %s", str(error).partition("\n")[0])
            return None
        everything = list(inputs)
        of_result = take_apart(found, everything)
        return Captured(graph, inputs, everything[len(inputs) :], of_result, keeps)

    def _buffer(self, index: int, x: Tensor) -> Tensor:
        """A tensor like x that all captured calls with one in this place share."""
        key = (index, x.device, *like([x]))
        if key not in self._buffers:
            self._buffers[key] = fresh(x)
        return self._buffers[key]

    def _cuda_graph(self, device: torch.device) -> CudaGraph:
        if device not in self._pools:
            self._pools[device] = torch.cuda.graph_pool_handle()
        return CudaGraph(device, self._pools[device])


def is_launch_bound(q: Tensor, wanted: bool | None) -> bool:
    """Whether a call is to be captured.

    Args:
        q: [B, H, S, D].
        wanted: the setting `cuda_graphs`; None: where dense attention would take a few milliseconds.
    """
    if wanted is False or not q.is_cuda or torch.is_grad_enabled() and q.requires_grad:
        return False
    B, H, S, D = q.shape
    small = 4 * B * H * S * S * D <= LAUNCH_BOUND
    return (small or wanted is True) and not torch.cuda.is_current_stream_capturing()
