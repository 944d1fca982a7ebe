"""Probing a quantised call, and computing its failed heads again, where the call was planned as a block map."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from svg.kernels.block_sparse.op import block_sparse_attention
from svg.kernels.clustering.permute import gather_tokens
from svg.kernels.common import target
from svg.kernels.common.heads import move_heads

from .execute import head_groups, output_of

if TYPE_CHECKING:
    from .plan import Plan

PROBE_ROWS = 64


def probe_rows(plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, generator: Random) -> tuple[Tensor, Tensor]:
    """Up to PROBE_ROWS neighbouring rows of every head against unquantised attention over the keys they see.

    Args:
        plan: which keys a row sees.
        q, k, v, out: float [B, H, S, D] in original order.
        generator: one draw chooses the query cluster, one the place in it.

    Returns:
        relative L2 error fp32 [B, H] (0 where the chosen cluster is empty), cosine similarity fp32 [] over all heads.
    """
    cluster, place = generator.random(), generator.random()
    cluster = int(cluster * plan.q_sizes.shape[1])
    m = plan.map_index.long()
    size = plan.q_sizes[:, cluster]  # [M]
    first = plan.q_sizes[:, :cluster].sum(1) + ((size - PROBE_ROWS).clamp_min(0) * place).long()
    count = size.clamp_max(PROBE_ROWS)
    offset = torch.arange(PROBE_ROWS, device=q.device)
    rows = (first[m][..., None] + offset).clamp_max(q.shape[2] - 1)  # [B, H, R]
    if plan.q_permutation is not None:
        rows = plan.q_permutation.gather(2, rows).long()
    index = rows[..., None].expand(-1, -1, -1, q.shape[3])
    exact = _attend_rows(plan, q.gather(2, index), k, v, cluster, count)
    there = (offset < count[m][..., None])[..., None]
    exact, got = (torch.where(there, x.float(), 0.0) for x in (exact, out.gather(2, index)))
    norm = torch.linalg.vector_norm
    error = norm(got - exact, dim=(2, 3)) / norm(exact, dim=(2, 3)).clamp_min(1e-30)
    cosine = (got * exact).sum() / (norm(got) * norm(exact)).clamp_min(1e-30)
    return torch.where(count[m] > 0, error, 0.0), cosine


def _attend_rows(plan: Plan, rows: Tensor, k: Tensor, v: Tensor, cluster: int, count: Tensor) -> Tensor:
    if plan.k_permutation is not None:
        k, v = gather_tokens(k, plan.k_permutation), gather_tokens(v, plan.k_permutation)
    # Rows beyond the cluster's end are a second cluster that sees nothing.
    sizes = torch.stack([count, PROBE_ROWS - count], 1).to(torch.int32)
    seen = plan.block_map[:, cluster : cluster + 1]
    seen = torch.cat([seen, torch.zeros_like(seen)], 1)
    tail = plan.tail
    if tail is not None:
        bias = tail.bias[:, cluster : cluster + 1]
        tail = tail._replace(bias=torch.cat([bias, torch.full_like(bias, -torch.inf)], 1))
    found = block_sparse_attention(
        rows, k, v, seen, sizes, plan.k_sizes, map_index=plan.map_index, tail=tail, sm_scale=plan.sm_scale
    )
    return output_of(found)


def repair(plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, failed: Tensor) -> None:
    """Compute failed heads again without quantisation.

    Args:
        plan: which pairs of tokens are computed.
        q, k, v: float [B, H, S, D] in original order.
        out: float [B, H, S, D], changed in place.
        failed: int32 [B, H].
    """
    if (target.INTERPRETED or not target.use_triton(q)) and not failed.any():
        return
    groups = head_groups(plan)
    if len(groups) > 1:
        for group in groups:
            repair(plan.for_heads(group), *(x[group] for x in (q, k, v, out, failed)))
        return
    if plan.k_permutation is not None:
        new = torch.empty_like if q.is_cuda else torch.zeros_like
        sorted_k, sorted_v = new(k), new(v)
        move_heads(k, sorted_k, failed, plan.k_permutation)
        move_heads(v, sorted_v, failed, plan.k_permutation)
        k, v = sorted_k, sorted_v
    only = restricted_to_heads(plan, failed, q.is_cuda)
    again = block_sparse_attention(
        q, k, v, only.block_map, only.q_sizes, only.k_sizes,
        map_index=only.map_index, q_permutation=plan.q_permutation, tail=only.tail, sm_scale=plan.sm_scale,
    )  # fmt: skip
    move_heads(output_of(again), out, failed)


def restricted_to_heads(plan: Plan, chosen: Tensor, skip: bool) -> Plan:
    """Restrict the plan to the chosen heads: all other heads point to an extra, empty block map.

    Args:
        plan: a plan.
        chosen: int32 [B, H], not 0 for a chosen head.
        skip: maps that no chosen head uses have no queries at all, so that no program starts and the other heads' output
            is not written; otherwise their queries see nothing and their output is zeros.

    Returns:
        The plan; its k_permutation is dropped.
    """
    maps = plan.block_map.shape[0]
    map_index = torch.where(chosen != 0, plan.map_index, maps)
    q_sizes = torch.cat([plan.q_sizes, plan.q_sizes[:1]])
    if skip:
        # One more map is marked, and left off: writing its mark would wait for the device.
        used = torch.zeros(maps + 1, dtype=torch.bool, device=chosen.device).scatter_(
            0, map_index.flatten().long(), True
        )
        q_sizes = F.pad(torch.where(used[:maps, None], plan.q_sizes, 0), (0, 0, 0, 1))
    tail = plan.tail
    if tail is not None:
        tail = tail._replace(bias=torch.cat([tail.bias, torch.full_like(tail.bias[:1], -torch.inf)]))
    return dataclasses.replace(
        plan,
        block_map=torch.cat([plan.block_map, torch.zeros_like(plan.block_map[:1])]),
        q_sizes=q_sizes,
        k_sizes=torch.cat([plan.k_sizes, plan.k_sizes[:1]]),
        map_index=map_index.to(torch.int32),
        k_permutation=None,
        tail=tail,
    )
