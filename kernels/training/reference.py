"""Forward and backward of INT8 training attention in plain torch: the specifications of all kernels."""

import math
from collections.abc import Iterator

import torch

from ..common.numbers import softmax_scale
from ..quantize.channels import statistics_reference
from .inputs import (
    SavedForBackward,
    channel_scale,
    empty_gradients,
    pack_gradients_reference,
    pack_keys_reference,
    pack_queries_reference,
)
from .sequences import Sequences, layouts, operand_order, unpack

LN_2 = math.log(2)
GROUPS = {"q": 64, "k": 64, "v": 64}  # scores that share a scale in a row, by whose gradient they make
P_GROUP = 128  # keys that share a scale of P in a row; a launch may take fewer


def training_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    sm_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SavedForBackward]:
    """Specification of `training_attention` in plain torch; same arguments and result."""
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    rows, columns = layouts(q, k, cu_seqlens_q, cu_seqlens_k)
    stats = statistics_reference(k, v)
    packed = pack_keys_reference(k, v, stats, columns)
    queries, q_scale = pack_queries_reference(q, rows, sm_scale)
    lse = torch.full_like(q_scale, torch.inf)
    kept = SavedForBackward(queries, q_scale, packed.keys, packed.scale, packed.values, stats.v_mean, lse)
    assert packed.values8 is not None
    steps = packed.values8[:, :, operand_order(columns.tokens, q.device).argsort()].transpose(1, 2)  # [Hkv, T, Dp]
    v_scale, total = channel_scale(stats), q.new_zeros(*queries.shape[:2], q.shape[3], dtype=torch.float32)
    for b, h, kv, m, n in pairs(kept, rows, columns):
        scores = scores_of(kept, h, kv, m, n, is_causal)
        seen = ~scores.isneginf().all(1)
        lse[h, m] = torch.where(seen, (scores * LN_2).logsumexp(1) / LN_2, torch.inf)
        means = rounded(torch.exp2(scores - lse[h, m, None]), P_GROUP) @ steps[kv, n, : q.shape[3]].float()
        total[h, m] = (means * v_scale[b, kv] + stats.v_mean[b, kv]) * seen[:, None]
    return unpack(total, rows, torch.empty_like(q)), kept


def pairs(kept: SavedForBackward, rows: Sequences, columns: Sequences) -> Iterator[tuple[int, int, int, slice, slice]]:
    """Batch, head, key head, packed rows and packed columns of every sequence and head."""
    heads = kept.queries.shape[0]
    group = heads // kept.keys.shape[0]
    for (b, _, count, start), (_, _, keys, first) in zip(rows.table.tolist(), columns.table.tolist(), strict=True):
        for h in range(heads if count and keys else 0):
            yield b, h, h // group, slice(start, start + count), slice(first, first + keys)


def scores_of(kept: SavedForBackward, h: int, kv: int, m: slice, n: slice, is_causal: bool) -> torch.Tensor:
    """Scores of one head and sequence, base 2: fp32 [queries, keys]."""
    scores = kept.queries[h, m].float() @ kept.keys[kv, n].float().T
    scores = scores * kept.k_scale[kv, n] * kept.q_scale[h, m, None]
    if is_causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """A matrix in INT8 and back, with one scale for `group` neighbours in a row."""
    parts = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((parts / scale).round() * scale).flatten(1)[:, : x.shape[1]]


def training_attention_backward_reference(
    grad: torch.Tensor,
    out: torch.Tensor,
    kept: SavedForBackward,
    *,
    key_tokens: int,
    is_causal: bool = False,
    sm_scale: float,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    products: str = "int8",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Specification of `training_attention_backward` in plain torch; same arguments and result."""
    dq, dk, dv = empty_gradients(out, kept.keys.shape[0], key_tokens)
    rows, columns = layouts(out, dk, cu_seqlens_q, cu_seqlens_k)
    inputs = grad, out, kept.v_mean, kept.queries, kept.q_scale, kept.lse, rows
    packed = pack_gradients_reference(*inputs, products == "bf16")
    steps = None
    if packed.turned is not None:
        steps = packed.turned[:, :, operand_order(rows.tokens, out.device).argsort()].transpose(1, 2)  # [H, T, Dp]
    sum_q, sum_k, sum_v = (x.new_zeros(x.shape, dtype=torch.float32) for x in (kept.queries, kept.keys, kept.keys))
    for _, h, kv, m, n in pairs(kept, rows, columns):
        keys, k_scale, q_scale = kept.keys[kv, n].float(), kept.k_scale[kv, n], kept.q_scale[h, m, None]
        scores = scores_of(kept, h, kv, m, n, is_causal)
        wide = packed.values[h, m].float() @ kept.values[kv, n].float().T - packed.delta[h, m, None] * k_scale
        p, ds = (torch.exp2(scores - lse[h, m, None]) * x for lse, x in ((packed.lse, 1), (kept.lse, wide)))
        factor, back = sm_scale * packed.scale[h, m, None], (LN_2 / k_scale)[:, None]
        if steps is not None:
            sum_q[h, m] = rounded(ds, GROUPS["q"]) @ keys * (factor / q_scale)
            sum_k[kv, n] += rounded((ds * packed.scale[h, m, None]).T, GROUPS["k"]) @ kept.queries[h, m].float() * back
            sum_v[kv, n] += rounded(p.T, GROUPS["v"]) @ steps[h, m].float()
        else:
            sum_q[h, m] = ds.bfloat16().float() @ keys * factor
            assert packed.queries is not None
            queries = packed.queries[h, m].float()
            sum_k[kv, n] += (ds * packed.scale[h, m, None]).bfloat16().float().T @ queries * back
            sum_v[kv, n] += p.bfloat16().float().T @ packed.values[h, m].float()
    return unpack(sum_q, rows, dq), unpack(sum_k, columns, dk), unpack(sum_v, columns, dv)
