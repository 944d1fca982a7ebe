"""Block-sparse attention in plain torch: the specification of both kernels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..common.numbers import softmax_scale
from .blocks import BlockMap, Tail, as_block_map

LSE_CHUNK = 1 << 22


def block_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockMap | torch.Tensor | None = None,
    *sizes: torch.Tensor,
    sm_scale: float | None = None,
    return_lse: bool = False,
    attend: Callable[..., torch.Tensor] = F.scaled_dot_product_attention,
    **fields: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Specification of `block_sparse_attention` in plain torch; same arguments and result, any dtype and head dim.

    One dense attention for each query cluster over its selected keys, all heads of a map at once: memory stays linear.
    `attend` is that attention.
    """
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    blocks = as_block_map(blocks, sizes, fields)
    q_permutation, tail = blocks.q_permutation, blocks.tail
    B, H, S, D = q.shape
    index = None if q_permutation is None else q_permutation.long().reshape(B * H, S)
    rows, keys, values = (x.reshape(B * H, -1, D) for x in (q, k, v))
    if index is not None:
        rows = rows.gather(1, index[..., None].expand(-1, -1, D))
    out = torch.zeros_like(rows)
    lse = torch.full(rows.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    map_index = blocks.map_index.reshape(-1)
    for m in map_index.unique().tolist():
        heads = (map_index == m).nonzero().squeeze(1)
        part = None if tail is None else Tail(tail.k.flatten(0, 1)[heads], tail.v.flatten(0, 1)[heads], tail.bias[m])
        out[heads], lse[heads] = _attend_one_map(
            rows[heads],
            keys[heads],
            values[heads],
            blocks.block_map[m],
            blocks.q_sizes[m],
            blocks.k_sizes[m],
            sm_scale,
            return_lse,
            attend,
            part,
        )
    if index is not None:
        out = torch.empty_like(out).scatter_(1, index[..., None].expand(-1, -1, D), out)
        lse = torch.empty_like(lse).scatter_(1, index, lse)
    out = torch.empty_like(q).copy_(out.view(B, H, S, D))
    return (out, lse.view(B, H, S)) if return_lse else out


def _attend_one_map(q, k, v, block_map, q_sizes, k_sizes, sm_scale, with_lse, attend, tail):
    """q [N, S, D], k and v [N, Sk, D] of the N heads that share a map -> out [N, S, D], lse [N, S]."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    token_map = block_map.repeat_interleave(k_sizes, dim=1)  # [Cq, Sk]
    selected_counts = token_map.sum(1).tolist()
    stop = 0
    for i, size in enumerate(q_sizes.tolist()):
        start, stop = stop, stop + size
        if size and tail is not None:
            rows = _with_tail(q[:, start:stop], k, v, token_map[i], tail, i, sm_scale, with_lse)
            out[:, start:stop] = rows[0]
            if rows[1] is not None:
                lse[:, start:stop] = rows[1]
            continue
        if size == 0 or selected_counts[i] == 0:
            continue
        dense = selected_counts[i] == k.shape[1]
        chosen = None if dense else token_map[i].nonzero().squeeze(1)
        k_i, v_i = (k, v) if dense else (k.index_select(1, chosen), v.index_select(1, chosen))
        q_i = q[:, start:stop]
        out[:, start:stop] = attend(q_i[None], k_i[None], v_i[None], scale=sm_scale)[0]
        if with_lse:
            lse[:, start:stop] = _log_sum_exp(q_i.to(lse.dtype), k_i.to(lse.dtype), sm_scale)
    return out, lse


def _with_tail(q, k, v, selected, tail, i, sm_scale, with_lse):
    """Exact keys and the tail's in one softmax: q [N, n, D] -> out [N, n, D], lse [N, n] or None."""
    wide = torch.promote_types(q.dtype, torch.float32)  # in 16 bits the bias would lose its digits
    bias = tail.bias[i].to(wide)
    exact, counted = selected.nonzero().squeeze(1), bias.isfinite().nonzero().squeeze(1)
    if exact.numel() + counted.numel() == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    keys, values = (
        torch.cat([x.index_select(1, exact), means.index_select(1, counted)], 1).to(wide)
        for x, means in ((k, tail.k), (v, tail.v))
    )
    bias = torch.cat([bias.new_zeros(exact.numel()), bias[counted]])
    q = q.to(wide)
    out = F.scaled_dot_product_attention(q[None], keys[None], values[None], bias[None, None, None], scale=sm_scale)[0]
    return out.to(k.dtype), _log_sum_exp(q, keys, sm_scale, bias) if with_lse else None


def _log_sum_exp(q, k, sm_scale, bias: torch.Tensor | float = 0.0):
    chunk = max(1, LSE_CHUNK // (k.shape[0] * k.shape[1]))
    parts = [torch.logsumexp(part @ k.transpose(1, 2) * sm_scale + bias, dim=-1) for part in q.split(chunk, dim=1)]
    return torch.cat(parts, dim=1)
