"""SageAttention 2, 2++ and 3 in the place of dense attention: which precision a call takes, and the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from svg.kernels import fp4_attention, quantised_attention
from svg.kernels.common import target
from svg.kernels.quantize.precision import PRECISIONS, default_precision

from ...engine.execute import output_of
from ...engine.plan import Plan
from ...engine.state import RunState
from .config import Sage2Config, Sage3Config
from .layers_file import choice


def precision_of(config: Sage2Config, state: RunState, layer: int, device: torch.device) -> str:
    """The precision of one call.

    Args:
        config: the method's settings.
        state: the run, which knows the step and the layers that took a safer precision.
        layer: index of the layer.
        device: where the call runs.

    Returns:
        "nvfp4", a precision of `quantised_attention`, or "native".

    Raises:
        ValueError: the file of precisions is not there, or has no such layer.
    """
    precision = config.precision if config.layers is None else choice(config.layers, state.name, layer)
    if isinstance(config, Sage3Config) and precision == config.precision:
        left = state.num_steps - 1 - state.step
        if min(state.step, left) < config.edge_steps:
            precision = "auto"
    if precision == "auto":
        precision = default_precision(device)
    for _ in range(state.safer.get(layer, 0)):
        precision = safer(precision)
    return precision


def safer(precision: str) -> str:
    """The next safer precision: P V in 16 bits, then nothing quantised."""
    return "native" if precision in ("int8-fp16", "native") else "int8-fp16"


def quantised(
    precision: str, config: Sage2Config, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None
) -> Callable[[Tensor | None], Tensor]:
    """Dense attention in a precision, to be run by the guard.

    Args:
        precision: "nvfp4" or a precision of `quantised_attention`.
        config: the smoothing switches and groups.
        q, k, v: float [B, H, S, D].
        visible: bool [B, S], keys that are seen, or None for all.

    Returns:
        failed int32 [B, H] or None -> out [B, H, S, D].

    Raises:
        NotImplementedError: a GPU without FP8.
    """
    mask = None if visible is None else visible[:, None, None]
    if precision == "nvfp4":
        smooth_q = config.smooth_q is not False
        return lambda failed: output_of(
            fp4_attention(q, k, v, mask=mask, smooth_q=smooth_q, smooth_k=config.smooth_k, failed=failed)
        )
    if PRECISIONS[precision].fp8:
        target.require_fp8(q.device)
    run = partial(
        quantised_attention, q, k, v, precision=precision, mask=mask, smooth_q=config.smooth_q,
        smooth_k=config.smooth_k, smooth_v=config.smooth_v and not precision.endswith("fp16"),
        q_groups=config.q_groups, k_groups=config.k_groups,
    )  # fmt: skip
    return lambda failed: output_of(run(failed=failed))


def dense_plan(q: Tensor, visible: Tensor | None) -> Plan:
    """Dense attention as a plan: one query cluster, and the visible keys and the hidden ones as two key clusters.

    Args:
        q: float [B, H, S, D].
        visible: bool [B, S], keys that are seen, or None for all.
    """
    B, H, S, _ = q.shape
    if visible is None:
        counts, order = torch.full((1,), S, device=q.device), None
        index = torch.zeros(B, H, dtype=torch.int32, device=q.device)
    else:
        counts = visible.sum(1)  # [B]
        order = visible.logical_not().to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
        order = order[:, None].expand(B, H, S)
        index = torch.arange(B, dtype=torch.int32, device=q.device)[:, None].expand(B, H)
    M = counts.shape[0]
    return Plan(
        q_permutation=None,
        k_permutation=order,
        q_sizes=torch.full((M, 1), S, dtype=torch.int32, device=q.device),
        k_sizes=torch.stack([counts, S - counts], 1).to(torch.int32),
        block_map=(torch.arange(2, device=q.device) == 0).expand(M, 1, 2),
        map_index=index,
        visible_keys=counts,
    )
