"""Residual sharing: what a layer's last dense step would have lost by being sparse is added to its sparse steps.

    residual = dense attention - sparse attention, in the last step of the warm-up
    out      = sparse attention + residual * share * exp(-steps since / (DECAY * steps of the run))

What a sparse rule leaves out changes slowly from step to step, so most of an early step's error comes back for one addition.
It costs a tensor like q for every layer and guidance branch, and one more sparse call of each in that dense step.

Source: residual sharing of window attention, DiTFastAttn (arXiv 2406.08552, section 3.1); the falling weight, and its use
beside means, are this project's.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..config.base import count
from .state import RunState

DECAY = 0.2  # of the steps, in which the weight falls by a factor e
KEY = "residual"  # in a layer's cache, beside its centroids


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
    """Remember what a call loses by being sparse.

    Args:
        state: the run's state, after `begin_forward`.
        layer: index of the layer, from 0.
        dense, sparse: attention of the same call, [B, H, S, D] in the same dtype.
    """
    state.layer(layer).cache[KEY] = (dense - sparse).detach()


def add(state: RunState, layer: int, out: Tensor) -> Tensor:
    """Sparse attention [B, H, S, D], changed in place: with the layer's share of its residual, if there is one.

    Args:
        state: the run's state, after `begin_forward`.
        layer: index of the layer, from 0.
        out: of this call, in the residual's dtype.
    """
    kept = state.layer(layer).cache.get(KEY)
    if kept is None:
        return out
    config = state.scheduled
    since = state.step - count(config.warmup_steps, state.num_steps) + 1
    residual: float = getattr(config, "residual", 0.0)
    return out.add_(kept, alpha=residual * math.exp(-since / (DECAY * state.num_steps)))
