"""Specification of the operations on granules in plain torch: any dtype and device, memory linear in the tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import GranuleLists, Granules, OtherHeads, longest_first

AT_ONCE = 1 << 23  # logits that are held at a time
SPREAD_CAP = 6.0  # exp of a larger logit variance would let one outlier decide a row


def cut_granules_reference(
    k: Tensor,
    v: Tensor,
    k_order: Tensor,
    size: int,
    text: Tensor | None = None,
    prompt_tokens: Tensor | None = None,
    *,
    gather: bool = True,
    only: Tensor | None = None,
) -> Granules:
    """Gather keys and values in sorted order and take every granule's statistics.

    Args:
        k, v: float [B, H, S, D].
        k_order: int [B, H, V], sorted -> original index of the video's keys.
        size: keys a granule.
        text: int [B, L], original index of text tokens, the prompt's first; None: there is no text.
        prompt_tokens: int [B], how many of them belong to the prompt; None: all.
        gather: whether k and v themselves are wanted in sorted order, beside the statistics.
        only: int32 [B, H]; nothing need be there of heads that are 0 here. None: all are cut.

    Returns:
        The granules; those of the text begin at a multiple of `size`.
    """
    B, H, _, D = k.shape
    V = k_order.shape[-1]
    T = math.ceil(V / size)
    L = 0 if text is None else text.shape[-1]
    index = F.pad(k_order.long(), (0, T * size - V), value=-1)
    if text is not None and L:
        prompt = torch.full((B,), L, device=k.device) if prompt_tokens is None else prompt_tokens
        seen = torch.arange(L, device=k.device) < prompt[:, None]
        words = F.pad(torch.where(seen, text.long(), -1), (0, -L % size), value=-1)
        index = torch.cat([index, words[:, None].expand(-1, H, -1)], -1)
    inside = index >= 0  # [B, H, C * size]
    k, v = (x.gather(2, index.clamp_min(0)[..., None].expand(-1, -1, -1, D)) * inside[..., None] for x in (k, v))
    tokens = inside[:, 0].view(B, -1, size).sum(-1, dtype=torch.int32)
    k_mean, k_variance = _moments(k, tokens, T, size)
    v_mean, v_variance = _moments(v, tokens, T, size)
    weight = v_mean.square().sum(-1) + v_variance.sum(-1)
    return Granules(
        k=k.contiguous() if gather else None,
        v=v.contiguous() if gather else None,
        tokens=tokens,
        k_mean=k_mean.to(k.dtype),
        v_mean=v_mean.to(v.dtype),
        spread=k_variance.mean(-1).float(),
        weight=weight.float(),
        size=size,
    )


def _moments(x: Tensor, tokens: Tensor, T: int, size: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, H, T, D] of the first T granules, over the tokens they hold."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = x[:, :, : T * size].unflatten(2, (T, size)).to(wide)
    number = tokens[:, None, :T, None].to(wide)
    mean = parts.sum(3) / number
    inside = torch.arange(size, device=x.device) < tokens[:, None, :T, None]  # [B, 1, T, size]
    deviation = (parts - mean[:, :, :, None]) * inside[..., None]
    return mean, deviation.square().sum(3) / number


def granule_scores_reference(
    q: Tensor, q_order: Tensor | None, granules: Granules, *, rows: int, pool: int, sm_scale: float | None = None
) -> Tensor:
    """Estimate, for every row group and video granule, the error of its mean standing for it.

    With p = softmax(l), l = sm_scale q . k_mean + log(tokens) over the T granules, and s2 the variance of the logits of
    a granule's keys if their spread were the same in every channel, s2 = sm_scale^2 |q|^2 spread:

        score = mean over pooled queries of p^2 (exp(min(s2, 6)) - 1) weight / tokens

    Args:
        q: float [B, H, S, D].
        q_order: int [B, H, V], sorted -> original index of the video's queries; None: the first S in order.
        granules: of the keys.
        rows: query rows of a group.
        pool: neighbouring sorted rows whose mean counts as one query, a divisor of `rows`.
        sm_scale: softmax scale; default D ** -0.5.

    Returns:
        fp32 [B, H, NG, T], per key of a granule.

    Source: error-aware routing, arXiv 2603.08982 (SVG-EAR); importance of queries instead of centroids: PARK (2026).
    """
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    sorted_q = _in_order(q, q_order)
    V, T = sorted_q.shape[2], granules.k_mean.shape[2]
    number = granules.tokens[:, None, None, :T].float()
    k_mean = granules.k_mean.float()
    log_number, spread, weight = number.log(), granules.spread[:, :, None], granules.weight[:, :, None] / number
    step = max(1, AT_ONCE // (T * rows)) * rows  # whole groups
    out = []
    for first in range(0, V, step):
        pooled = _pools(sorted_q[:, :, first : first + step].float(), pool).to(q.dtype).float()
        p = (scale * pooled @ k_mean.mT + log_number).softmax(-1)
        logit_variance = scale**2 * pooled.square().sum(-1, keepdim=True) * spread
        error = p.square() * torch.expm1(logit_variance.clamp_max(SPREAD_CAP)) * weight
        out.append(_pools(error, rows // pool))
    return torch.cat(out, 2)


def _in_order(q: Tensor, q_order: Tensor | None) -> Tensor:
    if q_order is None:
        return q
    return q.gather(2, q_order.long()[..., None].expand(-1, -1, -1, q.shape[-1]))


def _pools(rows: Tensor, pool: int) -> Tensor:
    """Means of `pool` neighbouring rows [B, H, n, D]; the last one may be of fewer."""
    whole = rows.shape[2] // pool * pool
    parts = [rows[:, :, :whole].unflatten(2, (-1, pool)).mean(3)]
    if whole < rows.shape[2]:
        parts.append(rows[:, :, whole:].mean(2, keepdim=True))
    return torch.cat(parts, 2)


def select_granules_reference(
    scores: Tensor,
    tokens: Tensor,
    *,
    budget: float | Tensor,
    floor: float,
    size: int,
    rows: int,
    per_head: bool = False,
    others: OtherHeads | None = None,
) -> GranuleLists:
    """List each row group's granules: its best, then all above one threshold that the whole budget decides.

    Args:
        scores: fp32 [B, H, NG, T].
        tokens: int32 [B, C], tokens of each granule, C >= T; text granules follow the video's.
        budget: granules a row group may list on average, as a share of T, in (0, 1]; fp32 [H] with `per_head`.
        floor: share of that average that every row group lists whatever the others need, in [0, 1].
        size: keys of a whole granule.
        rows: query rows of a group.
        per_head: one threshold for each head and sample; else one for all heads of a sample.
        others: processes that hold more heads of the same samples and choose together; not with `per_head`.

    Returns:
        The lists. Partial video granules and the text's are in every list, on top of the budget. A row group lists one
        granule at least.
    """
    if others is not None:
        scores = others.gather(scores)
    B, H, NG, T = scores.shape
    shares = torch.as_tensor(budget, dtype=torch.float64, device=scores.device).expand(H)
    chosen = torch.zeros(B, H, NG, T, dtype=torch.bool, device=scores.device)
    for b in range(B):
        for heads in [[h] for h in range(H)] if per_head else [list(range(H))]:
            share = float(shares[heads].mean())
            allowed = math.floor(share * T * NG * len(heads) + 1e-6)
            least = min(T, max(1, round(floor * share * T)))
            chosen[b, heads] = _best(scores[b, heads], allowed, least)
    if others is not None:
        chosen = chosen[:, others.own]
    chosen |= tokens[:, None, None, :T] < size
    return lists_of(chosen, tokens, size, rows)


def _best(scores: Tensor, allowed: int, least: int) -> Tensor:
    """bool [h, NG, T]: the `least` best of every row, then the best of all rows up to `allowed`; ties: lowest index."""
    if allowed >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :least], True)
    more = allowed - int(chosen.sum())
    if more > 0:
        rest = scores.masked_fill(chosen, -1.0).flatten()
        chosen.view(-1)[rest.argsort(descending=True, stable=True)[:more]] = True
    return chosen


def lists_of(chosen: Tensor, tokens: Tensor, size: int, rows: int) -> GranuleLists:
    """The lists of a map.

    Args:
        chosen: bool [B, H, NG, T], video granules that a row group lists; partial ones must be among them.
        tokens: int32 [B, C]; text granules that hold tokens are in every list.
        size: keys of a whole granule.
        rows: query rows of a group.

    Returns:
        The lists, whole granules in ascending order before partial ones.
    """
    B, H, NG, T = chosen.shape
    text = (tokens[:, None, None, T:] > 0).expand(-1, H, NG, -1)
    listed = torch.cat([chosen, text], -1).flatten(0, 2)  # [B * H * NG, C]
    is_whole = (tokens == size)[:, None, None].expand(-1, H, NG, -1).flatten(0, 2)
    rank = torch.where(listed & is_whole, 0, torch.where(listed, 1, 2))
    order = rank.argsort(dim=-1, stable=True)
    counts = listed.sum(-1, dtype=torch.int32)
    inside = torch.arange(listed.shape[-1], device=chosen.device) < counts[:, None]
    words = F.pad(chosen, (0, -T % 32), value=True).unflatten(-1, (-1, 32)).long()
    bits = (words << torch.arange(32, device=chosen.device)).sum(-1)
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    return GranuleLists(
        entries=order[inside].to(torch.int32),
        starts=(counts.long().cumsum(0) - counts).view(B, H, NG),
        whole=(listed & is_whole).sum(-1, dtype=torch.int32).view(B, H, NG),
        counts=counts.view(B, H, NG),
        chosen=bits,
        schedule=longest_first(counts.view(B, H, NG)),
        rows=rows,
    )


def granule_attention_reference(
    q: Tensor,
    granules: Granules,
    lists: GranuleLists,
    *,
    q_order: Tensor | None = None,
    sm_scale: float | None = None,
    tail: bool = True,
    return_lse: bool = False,
    out: Tensor | None = None,
    only: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row group over the tokens of its listed granules and the means of all others.

    Args:
        q: float [B, H, S, D] in original order.
        granules: of the keys and values.
        lists: which granules each row group computes.
        q_order: int [B, H, V], sorted -> original index of the video's queries; None: all S in order.
        sm_scale: softmax scale; default D ** -0.5.
        tail: whether each unlisted granule takes part as `size` keys equal to its mean; else it is left out.
        return_lse: also return the log-sum-exp.
        out: [B, H, S, D] to write into; rows that q_order does not name are left as they are. Default: zeros.
        only: int32 [B, H]; rows of heads that are 0 here are left as they are too. None: all heads are computed.

    Returns:
        out [B, H, S, D] in q's dtype; with return_lse also lse fp32 [B, H, S], natural log, -inf for rows that q_order
        does not name. A row with nothing to attend to gives zeros, and -inf.
    """
    B, H, S, D = q.shape
    scale = D**-0.5 if sm_scale is None else sm_scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q) if out is None else out
    lse = torch.full((B, H, S), -torch.inf, dtype=wide, device=q.device)
    order = torch.arange(S, device=q.device).expand(B, H, S) if q_order is None else q_order.long()
    for b in range(B):
        held = torch.arange(granules.size, device=q.device) < granules.tokens[b][:, None]  # [C, size]
        for h in range(H):
            if only is not None and not only[b, h]:
                continue
            keys, values = _tokens_and_means(granules, b, h, held, tail, wide)
            step = max(1, AT_ONCE // (keys.shape[0] * lists.rows))
            for group in range(0, lists.counts.shape[2], step):
                index = order[b, h, group * lists.rows : (group + step) * lists.rows]
                bias = _bias(granules, lists, b, h, slice(group, group + step), held, tail, wide)
                rows = F.pad(q[b, h, index].to(wide), (0, 0, 0, -len(index) % lists.rows)).unflatten(
                    0, (-1, lists.rows)
                )
                found, logs = _attend(rows, keys, values, bias[:, None], scale, return_lse)
                out[b, h, index] = found.flatten(0, 1)[: len(index)].to(out.dtype)
                if logs is not None:
                    lse[b, h, index] = logs.flatten()[: len(index)]
    return (out, lse.float()) if return_lse else out


def _tokens_and_means(granules: Granules, b: int, h: int, held: Tensor, tail: bool, wide: torch.dtype):
    """Keys and values of every slot, zeros where it holds no token, then the means: [C * size + T, D]."""
    parts = ((granules.k, granules.k_mean), (granules.v, granules.v_mean))
    inside = held.flatten()[:, None]
    both = (
        [torch.where(inside, x[b, h].to(wide), 0), mean[b, h].to(wide)][: 1 + tail]
        for x, mean in parts
        if x is not None
    )
    return tuple(torch.cat(pair) for pair in both)


def _bias(
    granules: Granules, lists: GranuleLists, b: int, h: int, groups: slice, held: Tensor, tail: bool, wide: torch.dtype
) -> Tensor:
    """What some row groups add to their logits [groups, C * size + T]: -inf hides; a mean weighs as its granule's keys."""
    starts, counts = lists.starts[b, h, groups], lists.counts[b, h, groups]
    group = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    entry = torch.arange(len(group), device=counts.device) - (counts.cumsum(0) - counts)[group] + starts[group]
    listed = torch.zeros(len(counts), held.shape[0], dtype=torch.bool, device=counts.device)
    listed[group, lists.entries[entry].long()] = True
    seen = [(listed[:, :, None] & held).flatten(1)]
    if tail:
        words = lists.chosen[b, h, groups].long()
        bits = (words[:, :, None] >> torch.arange(32, device=words.device)) & 1
        seen.append(bits.flatten(1)[:, : granules.k_mean.shape[2]] == 0)
    bias = torch.zeros(len(counts), sum(part.shape[1] for part in seen), dtype=wide, device=counts.device)
    bias[:, held.numel() :] = math.log(granules.size)
    return bias.masked_fill_(~torch.cat(seen, 1), -torch.inf)


def _attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, return_lse: bool):
    """Attention of row groups [n, rows, D] with their biases [n, 1, K], and log-sum-exps [n, rows] where they are wanted.

    Rows that see nothing give zeros and -inf.
    """
    if return_lse:
        logits = scale * q @ keys.T + bias
        lse = logits.logsumexp(-1)
        return (logits - lse.clamp_min(-1e30)[..., None]).exp() @ values, lse
    k, v = (x.expand(len(q), 1, *x.shape) for x in (keys, values))
    mask = bias[:, None].expand(-1, 1, q.shape[1], -1)
    out = F.scaled_dot_product_attention(q[:, None], k, v, mask, scale=scale)[:, 0]
    return torch.where((bias > -torch.inf).any(-1, keepdim=True), out, 0), None
