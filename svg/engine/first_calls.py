"""What the first calls of a run launch, compiled in parallel, while its dense steps run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from svg.kernels.common import target
from svg.kernels.common.ahead import compile_together, launches_of

from ..config.base import GuardedConfig, MethodConfig, count
from .state import RunState

_log = logging.getLogger("svg")
_begun: set[tuple] = set()  # for which shapes and settings this process has compiled


def begin(state: RunState, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, attend: Callable) -> list[Future]:
    """Begin to compile the kernels of a run's sparse calls, and of its dense ones where those are in 8 bits.

    Args:
        state: the run's state, in its first forward.
        q, k, v: float [B, S, H, D], of any layer.
        text_mask: of the same call.
        attend: `svg.attend.attend_uncompiled`.

    Returns:
        What `finish` waits for: nothing on a CPU, where it was done before, or where calls depend on what tensors hold.
    """
    if not q.is_cuda or state.config.method == "dense" or not target.use_triton(q):
        return []
    key = (state.config, state.layout, q.shape, q.stride(), q.dtype, q.device)
    if key in _begun:
        return []
    _begun.add(key)
    try:
        with torch.no_grad():
            launches = launches_of(lambda: _trace(state, q, k, v, text_mask, attend))
    except Exception as error:  # a call that cannot be traced compiles its kernels when it runs
        _log.debug("kernels are compiled one after the other: %s", str(error).partition("\n")[0])
        return []
    return compile_together(launches, q.device)


def finish(futures: list[Future]) -> None:
    """Wait for the threads that compile; one that failed has left its kernel to the call that launches it."""
    wait(futures)
    futures.clear()


def _trace(state: RunState, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, attend: Callable) -> None:
    """The first calls of a sparse layer, on tensors without data."""
    config = _plain(state.scheduled)
    scratch = _scratch(state, config)
    sparse = [layer for layer in range(state.num_layers) if not scratch.config.is_dense(layer)]
    first, steps = count(scratch.config.warmup_steps, state.num_steps), state.num_steps
    if not sparse or first >= steps:
        return
    q, k, v = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in (q, k, v))
    mask = None if text_mask is None else torch.empty_like(text_mask)
    dense = {0} if getattr(scratch.config, "warmup_precision", "native") != "native" else set()

    def call(scratch: RunState, step: int) -> None:
        scratch.begin_forward(step, steps, state.branch, state.layout, state.forward.halves)
        attend(q, k, v, scratch, sparse[-1], mask)

    for step in sorted({*dense, first, min(first + 1, steps - 1)}):
        call(scratch, step)
    if isinstance(state.scheduled, GuardedConfig) and state.scheduled.probe_every:
        for step in sorted({*dense, first}):  # a state each: the next forward of one would read what was probed
            call(_scratch(state, replace(config, probe_every=1)), step)


def _scratch(state: RunState, config: MethodConfig) -> RunState:
    scratch = RunState(config, state.num_layers, state.name)
    scratch.timing, scratch.told, scratch.compiling = False, True, []
    return scratch


def _plain(config: MethodConfig) -> MethodConfig:
    """Settings under which a call asks nothing of the device."""
    changed: dict[str, Any] = {"cuda_graphs": False, "check_finite": False, "probe_every": 0, "min_cosine": None}
    return replace(config, **{one.name: changed[one.name] for one in fields(config) if one.name in changed})
