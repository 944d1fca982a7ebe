"""Dense attention in fewer bits, as a plan: every pair of tokens is computed, in the precision of the call."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from ...engine.layout import TokenLayout
from ...engine.plan import Plan
from ...engine.replay import Steady
from ...engine.state import LayerState
from ..dense import key_mask
from . import precision as precisions
from .config import Sage2Config
from .precision import precision_of

__all__ = ["plan", "precision_of"]


@dataclass(frozen=True)
class SagePlan:
    """What one call computes.

    Args:
        config: the smoothing switches and groups.
        visible: bool [B, S], keys that are seen, or None for all.
        whole: the same pairs of tokens as a block map, for probes and repairs.
    """

    config: Sage2Config
    visible: Tensor | None
    whole: Plan
    kind: None = None
    reused: bool = False

    def density(self) -> Tensor:
        """All of the map, float32 [B, H]."""
        return torch.ones(self.whole.map_index.shape)

    def execute(self, q: Tensor, k: Tensor, v: Tensor, precision: str, failed: Tensor | None = None) -> Tensor:
        """Dense attention in a precision; see `svg.engine.execute.execute`."""
        return precisions.quantised(precision, self.config, q, k, v, self.visible)(failed)

    def probe_rows(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, generator: Random) -> tuple[Tensor, Tensor]:
        """See `svg.engine.repair.probe_rows`."""
        return self.whole.probe_rows(q, k, v, out, generator)

    def repair(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, failed: Tensor) -> None:
        """See `svg.engine.repair.repair`."""
        self.whole.repair(q, k, v, out, failed)


def steady(q: Tensor, config: Sage2Config, state: LayerState, layout: TokenLayout, text_mask: Tensor | None) -> Steady:
    """What a captured call needs (see `svg/methods/registry.py`)."""
    return Steady(config)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: Sage2Config,
    state: LayerState,
    layout: TokenLayout,
    text_mask: Tensor | None = None,
) -> SagePlan:
    """All pairs of queries and visible keys; arguments as of every method (`svg/methods/registry.py`)."""
    visible = key_mask(layout, text_mask)
    return SagePlan(config, visible, precisions.dense_plan(q, visible))
