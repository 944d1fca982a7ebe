"""Residual sharing: what a layer's last dense step would have lost by being sparse is added to its sparse steps.

    residual = dense attention - sparse attention, in the last step of the warm-up
    out      = sparse attention + residual * share * exp(-steps since / (DECAY * steps of the run))

What a sparse rule leaves out changes slowly from step to step, so most of an early step's error comes back for one addition.
It costs a tensor of q's shape in 8 bits for every layer and guidance branch, and one more sparse call of each in that dense step.

Source: residual sharing of window attention, DiTFastAttn (arXiv 2406.08552, section 3.1); the falling weight, and its use
beside means, are this project's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svg.kernels.common import target
from svg.kernels.linears import QuantizedRows, add_rows, quantize_rows

from ..config.base import count
from .state import RunState

DECAY = 0.2  # of the steps, in which the weight falls by a factor e
KEY, SCALE = "residual", "scale of residual"  # in a layer's cache, beside its centroids


def is_due(state: RunState, layer: int) -> bool:
    """Whether a dense call is a layer's last one before its sparse steps, and what sparse attention would lose is wanted.

    Args:
        state: the run's state, after `begin_forward`.
        layer: index of the layer, from 0.
    """
    config = state.scheduled
    last = count(config.warmup_steps, state.num_steps) - 1
    sparse = not config.is_dense(layer) and state.layout.total_tokens >= config.min_tokens
    sparse = sparse and layer >= count(config.warmup_layers, state.num_layers)
    return getattr(config, "residual", 0) > 0 and state.step == last and sparse


def keep(state: RunState, layer: int, dense: Tensor, sparse: Tensor) -> None:
    """Remember what a call loses by being sparse: in FP8 where attention is in 16 bits and the device has it.

    Args:
        state: the run's state, after `begin_forward`.
        layer: index of the layer, from 0.
        dense, sparse: attention of the same call, [B, H, S, D] in the same dtype.
    """
    lost, cache = (dense - sparse).detach(), state.layer(layer).cache
    if lost.dtype == torch.float32 or (lost.is_cuda and not target.has_fp8(lost.device)):
        cache[KEY] = lost
    else:
        rows = quantize_rows(lost)
        cache[KEY], cache[SCALE] = rows.values.view(torch.uint8), rows.scale  # bytes, which processes can exchange


def add(state: RunState, layer: int, out: Tensor) -> Tensor:
    """Sparse attention [B, H, S, D], changed in place: with the layer's share of its residual, if there is one.

    Args:
        state: the run's state, after `begin_forward`.
        layer: index of the layer, from 0.
        out: of this call, in the residual's dtype.
    """
    config = state.scheduled
    residual: float = getattr(config, "residual", 0.0)
    if residual == 0:
        return out
    cache = state.layer(layer).cache
    kept, scale = cache.get(KEY), cache.get(SCALE)
    if kept is None:
        return out
    since = state.step - count(config.warmup_steps, state.num_steps) + 1
    weight = residual * math.exp(-since / (DECAY * state.num_steps))
    if scale is None:
        return out.add_(kept, alpha=weight)
    return add_rows(out, QuantizedRows(kept.view(torch.float8_e4m3fn), scale, out.dtype), weight)


def set_aside(cache: dict[str, Any]) -> dict[str, Any]:
    """Take the residual out of a layer's cache; what a call plans does not depend on it."""
    return {name: cache.pop(name) for name in (KEY, SCALE) if name in cache}
