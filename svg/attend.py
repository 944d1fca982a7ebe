"""One attention call: dense in warm-up, the configured method otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svg.kernels.common import target

from .config import Sage2Config
from .engine.guard import Guarded, guarded
from .engine.layout import TokenLayout
from .engine.plan import Plan
from .engine.state import CallRecord, ObservedCall, RunState, Timer
from .methods.dense import dense_attention, key_mask
from .methods.near import plan as near
from .methods.sage import precision as sage
from .methods.sparge import plan as sparge
from .methods.svg1 import plan as svg1
from .methods.svg2 import plan as svg2

__all__ = ["attend", "dense_attention"]

_PLAN = {"near": near.plan, "svg1": svg1.plan, "svg2": svg2.plan, "sparge": sparge.plan}


@torch.compiler.disable
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RunState,
    layer: int,
    text_mask: Tensor | None = None,
    dense_backend: str | None = None,
) -> Tensor:
    """Self-attention of one layer by the state's method, recorded in the state.

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
    if layout is None:
        raise RuntimeError("attend needs to know the step and layout: call state.begin_forward(...) first")
    if not 0 <= layer < state.num_layers:
        raise ValueError(f"layer must be in [0, {state.num_layers}), got {layer}")
    _check(q, k, v, layout, text_mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    if config.check_finite:
        state.watch(layer, q, k, v)
    if not state.records:
        state.check_tuned(q.shape[1], q.device)
    timer = Timer(q.device) if state.timing else None
    dense = config.is_dense(layer) or state.is_warmup(layer)
    visible = key_mask(layout, text_mask)
    kind, density, plan, precision, seen = None, torch.ones(q.shape[:2]), None, None, None
    if not dense and isinstance(config, Sage2Config):
        precision = sage.precision_of(config, state, layer, q.device)
        dense = precision == "native"
    if dense:
        out = dense_attention(q, k, v, visible, dense_backend or config.dense_backend)
    elif precision is not None:
        out, seen = _quantised(q, k, v, state, layer, precision, visible)
    else:
        out, plan, seen = _sparse(q, k, v, state, layer, text_mask)
        density, kind = plan.density(), plan.kind
        precision = config.precision if config.precision != "native" else None
    if timer is not None:
        timer.stop()
    emulated = precision is not None and sage.is_emulated(precision, q.device)
    reused = plan is not None and plan.reused
    state.records.append(
        CallRecord(state.step, layer, state.branch, density, kind, dense, timer, precision, emulated, seen, reused)
    )
    if state.observer is not None:
        state.observer(ObservedCall(layer, q, k, v, text_mask, out, plan))
    return out.transpose(1, 2)


def _sparse(q: Tensor, k: Tensor, v: Tensor, state: RunState, layer: int, text_mask: Tensor | None):
    config, layout = state.config, state.layout
    if target.use_triton(q):
        target.refuse_gradients(f"{config.method} attention", q, k, v)
    memory = state.layer(layer)
    memory.match(q.shape, layout, q.device)
    with torch.no_grad():
        plan = _PLAN[config.method](q, k, v, config, memory, layout, text_mask)
    if config.precision == "native":
        return plan.execute(q, k, v), plan, None

    def run(failed: Tensor | None) -> Tensor:
        return plan.execute(q, k, v, config.precision, failed)

    out, seen = _guard(run, plan, q, k, v, state, layer)
    return out, plan, seen


def _quantised(
    q: Tensor, k: Tensor, v: Tensor, state: RunState, layer: int, precision: str, visible: Tensor | None
) -> tuple[Tensor, Guarded | None]:
    run = sage.quantised(precision, state.config, q, k, v, visible)
    return _guard(run, sage.dense_plan(q, visible), q, k, v, state, layer)


def _guard(
    run: Callable[[Tensor | None], Tensor], plan: Plan, q: Tensor, k: Tensor, v: Tensor, state: RunState, layer: int
) -> tuple[Tensor, Guarded | None]:
    config = state.config
    target.refuse_gradients(f"{config.method} attention in fewer bits", q, k, v)
    if not config.guard:
        return run(None), None
    with torch.no_grad():
        out, seen = guarded(run, plan, q, k, v, tolerance=config.tolerance, probe=state.probe_generator(layer))
    if getattr(config, "min_cosine", None) is not None and seen.cosine is not None:
        state.note_cosine(layer, seen.cosine)
    return out, seen


def _check(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, text_mask: Tensor | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must have one shape [B, S, H, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] != layout.total_tokens:
        raise ValueError(f"q must have the layout's {layout.total_tokens} tokens in dimension 1, got {q.shape[1]}")
    if text_mask is not None and (
        text_mask.shape != (q.shape[0], layout.text_tokens) or text_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"text_mask must be bool [{q.shape[0]}, {layout.text_tokens}] (batch, text tokens), "
            f"got {text_mask.dtype} {tuple(text_mask.shape)}"
        )
