"""Block-sparse attention as a plan says, of some heads at a time where lists of all heads' blocks would be large."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svg.kernels.block_sparse.op import block_sparse_attention
from svg.kernels.block_sparse_quantised.op import block_sparse_attention_quantised
from svg.kernels.clustering.permute import gather_tokens
from svg.kernels.common import target
from svg.kernels.quantize.precision import Quantisation

if TYPE_CHECKING:
    from .plan import Plan

# Blocks of all heads that run at once: lists have 4 to 6 bytes for each, and with tiles they grow with S^2.
LISTED_BLOCKS = 1 << 25


def execute(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, precision: str = "native", failed: Tensor | None = None
) -> Tensor:
    """Block-sparse attention as planned, of some heads at a time where lists of all heads' blocks would be large.

    Args:
        plan: the plan of this call.
        q, k, v: float [B, H, S, D] in original order.
        precision: "native", "int8-fp8", "int8-fp8-acc16" or "int8-fp16".
        failed: int32 [B, H], set where a quantised head's sums are not to be trusted, or None.

    Returns:
        [B, H, S, D] in original order and q's dtype.
    """
    groups = head_groups(plan)
    if len(groups) == 1:
        return _execute(plan, q, k, v, precision, failed)
    out = torch.empty_like(q)
    for group in groups:
        part = plan.for_heads(group)
        out[group] = _execute(part, q[group], k[group], v[group], precision, None if failed is None else failed[group])
    return out


def head_groups(plan: Plan) -> list[tuple[slice, slice]]:
    """Which samples and heads run at once: all, or as many heads of a sample as keep lists of their blocks small.

    Args:
        plan: the plan of a call.

    Returns:
        Indices into [B, H], that `Plan.for_heads` takes where there are several.
    """
    B, H = plan.map_index.shape
    at_once = max(1, LISTED_BLOCKS // plan.block_map[0].numel())
    if not plan.one_map_per_head or at_once >= B * H:
        return [(slice(0, B), slice(0, H))]
    starts = itertools.product(range(B), range(0, H, at_once))
    return [(slice(sample, sample + 1), slice(first, min(first + at_once, H))) for sample, first in starts]


def _execute(plan: Plan, q: Tensor, k: Tensor, v: Tensor, precision: str, failed: Tensor | None) -> Tensor:
    if precision != "native":
        return _execute_quantized(plan, q, k, v, precision, failed)
    if plan.k_permutation is not None:
        k, v = gather_tokens(k, plan.k_permutation), gather_tokens(v, plan.k_permutation)
    blocks = replace(plan.blocks, k_permutation=None)
    return output_of(block_sparse_attention(q, k, v, blocks, sm_scale=plan.sm_scale))


def _execute_quantized(plan: Plan, q: Tensor, k: Tensor, v: Tensor, precision: str, failed: Tensor | None) -> Tensor:
    how = Quantisation(precision, pv_threshold=plan.pv_threshold)
    found = block_sparse_attention_quantised(q, k, v, plan.blocks, how=how, sm_scale=plan.sm_scale, failed=failed)
    return output_of(found)


def is_emulated(precision: str, device: torch.device) -> bool:
    """Whether a precision's numbers are computed exactly, but not by units of that width.

    Args:
        precision: "native", "nvfp4" or a precision of `quantised_attention`.
        device: where the call runs.
    """
    return precision.startswith("int4") or (precision == "nvfp4" and not target.has_fp4(device))


def output_of(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output of an attention that was not asked for its log-sum-exp."""
    assert isinstance(found, Tensor)
    return found
