"""One attention call: dense in warm-up, the configured method otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from svg.kernels.common import target
from svg.kernels.common.sums import sums_of

from .config import GuardedConfig, MethodConfig, Sage2Config
from .engine import first_calls, residual
from .engine.execute import is_emulated
from .engine.guard import GuardOutcome, guarded
from .engine.layout import TokenLayout
from .engine.plan import CallPlan
from .engine.records import AttentionRecord, ObservedAttention, Timer
from .engine.replay import Steady, is_launch_bound
from .engine.state import LayerState, RunState
from .methods.dense import dense_attention, key_mask
from .methods.registry import planner

__all__ = ["attend", "dense_attention"]

_log = logging.getLogger("svg")

F = TypeVar("F", bound=Callable)


def _not_compiled(function: F) -> F:
    """`torch.compiler.disable`, which hides a function's arguments from type checkers."""
    hidden: Any = torch.compiler.disable(function)
    return hidden


def attend_uncompiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RunState,
    layer: int,
    text_mask: Tensor | None = None,
    dense_backend: str | None = None,
) -> Tensor:
    """Self-attention of one layer by the state's method, recorded in the state; for callers that nothing compiles.

    Args:
        q, k, v: float [B, S, H, D], after QK-norm and RoPE; S = layout.total_tokens.
        state: the transformer's state, after `begin_forward`.
        layer: index of the layer, from 0.
        text_mask: bool [B, text_tokens], True for prompt tokens, False for padding; None if all are prompt tokens.
        dense_backend: what dense calls run on; None: the config's.

    Returns:
        [B, S, H, D] in q's dtype.

    Raises:
        ValueError: shapes do not agree with each other or with the layout, there is no such layer, or per-head budgets
            are for another model, token grid or device.
        RuntimeError: no forward was begun.
        NotImplementedError: gradients are wanted through a sparse call on a GPU, or through one in fewer bits.
        FloatingPointError: q, k or v hold NaN or infinity (raised at the next forward on a GPU).
    """
    config, layout = state.config, state.layout
    if not 0 <= layer < state.num_layers:
        raise ValueError(f"layer must be in [0, {state.num_layers}), got {layer}")
    _check(q, k, v, layout, text_mask)
    if state.compiling is None:
        state.compiling = first_calls.begin(state, q, k, v, text_mask, attend_uncompiled)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    if not state.records:
        state.check_tuned(q.shape[1], q.device)
    settings, precision, dense = _settings(state, layer, q.device)
    if state.compiling and precision is not None:
        first_calls.finish(state.compiling)
    timer = Timer(q.device) if state.timing else None
    kind, plan, outcome, reused = None, None, None, False
    if precision is None:
        if config.check_finite:
            state.watch(layer, sums_of(q, k, v))
        density = torch.ones(q.shape[:2])
        out = dense_attention(q, k, v, key_mask(layout, text_mask), dense_backend or config.dense_backend)
    else:
        called = _planned(q, k, v, state, layer, settings, precision, text_mask, config.check_finite)
        out, density, kind, reused, outcome, plan = called[:6]
        precision = None if precision == "native" else precision
    if not dense:
        out = residual.add(state, layer, out)
    elif residual.is_due(state, layer):
        _keep_residual(q, k, v, out, state, layer, text_mask)
    if timer is not None:
        timer.stop()
    if state.peers is not None:
        density, kind, outcome = _of_all_heads(density, kind, outcome, state, layer, dense)
    emulated = precision is not None and is_emulated(precision, q.device)
    if not (dense or state.told):
        state.told = True
        _tell_of_slow_paths(config.method, q, precision if emulated else None)
    state.records.append(
        AttentionRecord(
            state.step, layer, state.branch, density, kind, dense, timer, precision, emulated, outcome, reused
        )
    )
    if state.observer is not None:
        state.observer(ObservedAttention(layer, q, k, v, text_mask, out, plan))
    return out.transpose(1, 2)


attend = _not_compiled(attend_uncompiled)


@torch.no_grad()
def _keep_residual(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: RunState, layer: int, text_mask: Tensor | None
) -> None:
    precision = _precision(state, layer, q.device)
    if precision is not None:
        called = _planned(q, k, v, state, layer, state.settings, precision, text_mask, watch=False)
        residual.keep(state, layer, out, called.out)


def _settings(state: RunState, layer: int, device: torch.device) -> tuple[MethodConfig, str | None, bool]:
    """Whose plan a call follows, its precision (None: dense attention in the inputs' runs), and whether all is computed."""
    config = state.config
    if config.is_dense(layer) or state.layout.total_tokens < config.min_tokens:
        return config, None, True
    if not state.is_warmup(layer):
        precision = _precision(state, layer, device)
        return state.settings, precision, precision is None
    precision = getattr(config, "warmup_precision", "native")
    if precision == "native":
        return config, None, True
    return _dense_in(precision, getattr(config, "tolerance", GuardedConfig.tolerance)), precision, True


def _precision(state: RunState, layer: int, device: torch.device) -> str | None:
    """What the method computes a call in; None: dense attention runs in its place."""
    config = state.config
    choose = getattr(planner(config), "precision_of", None)
    if choose is None:
        return getattr(config, "precision", "native")
    found = choose(config, state, layer, device)
    return None if found == "native" else found


@cache
def _dense_in(precision: str, tolerance: float) -> MethodConfig:
    """What plans a dense call in fewer bits; made once, as it is asked for in every call."""
    return Sage2Config(precision=precision, tolerance=tolerance)


class Called(NamedTuple):
    """One call of a method.

    Args:
        out: [B, H, S, D].
        density: float32 [B, H], computed share of the map.
        kind: int8 [B, H], or None for methods without head kinds.
        reused: whether an earlier call's choice was taken.
        outcome: what the guard saw, or None where it was off or nothing was quantised.
        plan: the method's, or None where the call was captured.
        sums: of q, k and v, where a captured call has taken them.
    """

    out: Tensor
    density: Tensor
    kind: Tensor | None
    reused: bool
    outcome: GuardOutcome | None
    plan: CallPlan | None
    sums: Tensor | None = None


def _planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RunState,
    layer: int,
    settings: MethodConfig,
    precision: str,
    text_mask: Tensor | None,
    watch: bool,
) -> Called:
    config, layout = state.config, state.layout
    if precision != "native":
        target.refuse_gradients(f"{config.method} attention in fewer bits", q, k, v)
    elif target.use_triton(q):
        target.refuse_gradients(f"{config.method} attention", q, k, v)
    memory = state.layer(layer)
    memory.match(q.shape, layout, q.device, memory.halves)
    guard = config if precision != "native" and isinstance(config, GuardedConfig) and config.guard else None
    quantized = guard is not None
    probe = None if guard is None else state.probe_generator(layer, guard.probe_every)
    steady = None
    if probe is None and state.observer is None and state.peers is None and is_launch_bound(q, config.cuda_graphs):
        find = getattr(planner(settings), "steady", None)
        steady = None if find is None else find(q, settings, memory, layout, text_mask)
    if steady is not None:
        found = _captured(q, k, v, state, memory, precision, text_mask, quantized, watch, steady)
        if found.sums is not None:
            state.watch(layer, found.sums)
    else:
        if watch:
            state.watch(layer, sums_of(q, k, v))
        found = _run(q, k, v, text_mask, settings, memory, layout, precision, quantized, probe)
    at_least: float | None = getattr(config, "min_cosine", None)
    if at_least is not None and found.outcome is not None and found.outcome.cosine is not None:
        cosine = found.outcome.cosine
        if state.peers is not None:  # all take the safer precision, or none
            cosine = -state.peers.largest(-cosine)
        state.note_cosine(layer, cosine, at_least)
    return found


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_mask: Tensor | None,
    settings: MethodConfig,
    memory: LayerState,
    layout: TokenLayout,
    precision: str,
    quantized: bool,
    probe: Random | None = None,
) -> Called:
    """Plan and execute; `quantized`: whether the guard watches."""
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        plan = planner(settings).plan(q, k, v, settings, memory, layout, text_mask)
    if not quantized:
        out, outcome = plan.execute(q, k, v, precision), None
    else:

        def run(failed: Tensor) -> Tensor:
            return plan.execute(q, k, v, precision, failed)

        tolerance = getattr(settings, "tolerance", GuardedConfig.tolerance)
        with torch.no_grad():
            out, outcome = guarded(run, plan, q, k, v, tolerance=tolerance, probe=probe)
    return Called(out, plan.density(), plan.kind, plan.reused, outcome, plan)


@torch.no_grad()
def _captured(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RunState,
    memory: LayerState,
    precision: str,
    text_mask: Tensor | None,
    quantized: bool,
    watch: bool,
    steady: Steady,
) -> Called:
    """The same through a CUDA graph, with the settings that serve other layers and steps too."""
    layout, constant = state.layout, steady.config
    aside = residual.set_aside(memory.cache)

    def run(q, k, v, text_mask, cache, step) -> tuple[Called, dict[str, Any], dict[str, Any] | None]:
        scratch = memory.with_contents(dict(cache), None if step is None else dict(step))
        called = _run(q, k, v, text_mask, constant, scratch, layout, precision, quantized)
        sums = sums_of(q, k, v) if watch else None
        return called._replace(plan=None, sums=sums), scratch.cache, scratch.step

    key = (constant, layout, precision, quantized, watch, memory.branch, memory.halves, memory.signature)
    arguments = (q, k, v, text_mask, memory.cache, memory.step)
    called, cache, step = state.replays.call(key, arguments, run, steady.keeps)
    memory.cache = cache | aside
    if memory.step is not None and step is not None:
        memory.step.update(step)
    return called


def _of_all_heads(
    density: Tensor, kind: Tensor | None, outcome: GuardOutcome | None, state: RunState, layer: int, dense: bool
) -> tuple[Tensor, Tensor | None, GuardOutcome | None]:
    """What every process records of a call whose heads are dealt over several."""
    peers = state.peers
    assert peers is not None
    if dense:
        return torch.ones(density.shape[0], peers.heads), None, None
    density = peers.gather(density)
    if layer not in state.deals:
        state.note_work(layer, density.mean(0))
    if kind is not None:
        kind = peers.gather(kind)
    if outcome is not None:
        outcome = replace(outcome, failed=peers.gather(outcome.failed))
    return density, kind, outcome


def _tell_of_slow_paths(method: str, q: Tensor, emulated: str | None) -> None:
    if not target.use_triton(q):
        _log.warning("%s runs in plain PyTorch on %s: right, but slower than dense attention", method, q.device)
    elif emulated is not None:
        _log.warning("%s is an exact emulation on %s: right, but its times mean nothing", emulated, q.device)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, text_mask: Tensor | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must have one shape [B, S, H, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] != layout.total_tokens:
        raise ValueError(f"q must have the layout's {layout.total_tokens} tokens in dimension 1, got {q.shape[1]}")
    if text_mask is not None and (text_mask.shape != (q.shape[0], layout.text_tokens) or text_mask.dtype != torch.bool):
        raise ValueError(
            f"text_mask must be bool [{q.shape[0]}, {layout.text_tokens}] (batch, text tokens), "
            f"got {text_mask.dtype} {tuple(text_mask.shape)}"
        )
