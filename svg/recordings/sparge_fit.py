"""SpargeAttn's thresholds from recorded calls, without running attention once a candidate.

For some query blocks, the output of a few rows is split by key block once:

    l_b = sum of exp over the keys of block b        o_b = sum of exp * v        out(kept) = sum o_b / sum l_b over kept b

Kept blocks are always a prefix of an order (heaviest predicted mass first; for the filter of P V: least of what it would
add first), so prefix sums give the error of every candidate cdf, and of every candidate pv_threshold, at once. A candidate
simthresh costs one reordering. The errors are of the selection in fp32: what 8 bits cost comes on top.

Source: SpargeAttn (arXiv 2502.18137), section 3.5 (hyper-parameters of a model layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from svg.kernels.selection.sparge import BlockStatistics, block_masses, block_statistics

from ..config import SpargeConfig
from ..engine.layout import TokenLayout
from ..methods.sparge.plan import K_BLOCK, Q_BLOCK, video_blocks
from ..methods.sparge.thresholds_file import Thresholds

# The paper's grid is [-1, 1) by 1/16; similarity is never negative, so that all candidates below 0 do the same.
SIMTHRESH = (-1.0, *(i / 16 for i in range(16)))
PV_ROWS = 64  # the smallest query tile of the kernels: what is skipped for all of 128 rows is skipped for both halves
PV_LIMIT = 50.0
MIN_SPARSITY = 0.1
BISECTIONS = 10
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How much of a head is looked at.

    Args:
        blocks: query blocks of a head and call, spread evenly, >= 1; all of them if there are fewer.
        rows: rows of each block whose output is compared, spread evenly, even, in [2, 128].
    """

    blocks: int = 32
    rows: int = 8

    def __post_init__(self):
        if self.blocks < 1:
            raise ValueError(f"blocks must be >= 1, got {self.blocks}")
        if not 2 <= self.rows <= Q_BLOCK or self.rows % 2:  # as many in each half: see PV_ROWS
            raise ValueError(f"rows must be even and in [2, {Q_BLOCK}], got {self.rows}")


class Call(NamedTuple):
    """One recorded call of one sample, cut into blocks.

    Args:
        q: float [H, S, D].
        k, v: float [H, Nb, K_BLOCK, D]: video blocks, then the prompt's; what is not there is 0.
        there: bool [Nb, K_BLOCK], which keys exist.
        rows: int64 [I, Q_BLOCK], tokens of the sampled query blocks; -1 past the end of the video.
        q_blocks, k_blocks: statistics of the sampled query blocks [H, I] and of the video's key blocks [H, Nk].
        sink: whether key block 0 always stays.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    there: Tensor
    rows: Tensor
    q_blocks: BlockStatistics
    k_blocks: BlockStatistics
    sink: bool

    @property
    def always(self) -> Tensor:
        """bool [Nb], blocks that are no candidates: the prompt's, and the sink."""
        place = torch.arange(self.there.shape[0], device=self.there.device)
        return (place >= self.k_blocks.similarity.shape[1]) | ((place == 0) & self.sink)


class Parts(NamedTuple):
    """The output of the sampled rows of one head, by key block.

    Args:
        weight: fp32 [I, Nb, r], l_b relative to the row's largest score.
        value: fp32 [I, Nb, r, D], o_b.
        dense: fp32 [I, r, D], the exact output.
        real: bool [I, r], rows that exist.
        peaks: fp32 [I, Nb, Q_BLOCK / PV_ROWS, PV_ROWS], each row's largest score of each block, base 2; empty unless asked.
    """

    weight: Tensor
    value: Tensor
    dense: Tensor
    real: Tensor
    peaks: Tensor


class Curves(NamedTuple):
    """Errors of a head in one call for every prefix of an order.

    Args:
        at: fp32 [T, I, N], ascending, what a threshold is compared with.
        error: fp32 [T, I, N + 1], sum of |difference| with the first 0 ... N of the order.
        size: fp32 [T, I, N + 1], keys computed; N - n of n skipped for the filter of P V.
        norm: sum of |dense output|.
        keys: keys that dense attention would compute.
    """

    at: Tensor
    error: Tensor
    size: Tensor
    norm: float
    keys: int


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    text_mask: Tensor | None,
    config: SpargeConfig,
    sampling: Sampling,
) -> list[Call]:
    """Cut a recorded call into blocks.

    Args:
        q, k, v: float [B, H, S, D].
        layout: where video and text are.
        text_mask: bool [B, text_tokens], or None for all.
        config: order and attention_sink are used.
        sampling: how much to look at.

    Returns:
        One Call a sample.
    """
    video = video_blocks(layout, config.order, q.device)
    order = torch.arange(layout.video_tokens, device=q.device) if video.order is None else video.order.long()
    rows = _padded(order, Q_BLOCK) + layout.video_slice.start
    chosen = torch.linspace(0, len(rows) - 1, min(sampling.blocks, len(rows)), device=q.device).round().long()
    q_blocks, k_blocks = (
        block_statistics(x[:, :, layout.video_slice], size, video.order) for x, size in ((q, Q_BLOCK), (k, K_BLOCK))
    )
    rows = torch.where(_padded(order, Q_BLOCK) < 0, -1, rows)[chosen]
    calls = []
    for b in range(q.shape[0]):
        keys = _padded(order, K_BLOCK)
        keys = torch.where(keys < 0, -1, keys + layout.video_slice.start)
        text = torch.arange(layout.text_tokens, device=q.device) + layout.text_slice.start
        text = text if text_mask is None else text[text_mask[b]]
        keys = torch.cat([keys, _padded(text, K_BLOCK)])  # [Nb, K_BLOCK]
        there = keys >= 0
        k_b, v_b = (x[b][:, keys.clamp_min(0)] * there[..., None] for x in (k, v))
        q_stats = BlockStatistics(*(x[b][:, chosen] for x in q_blocks))
        k_stats = BlockStatistics(*(x[b] for x in k_blocks))
        calls.append(Call(q[b], k_b, v_b, there, rows, q_stats, k_stats, config.attention_sink))
    return calls


def _padded(tokens: Tensor, block: int) -> Tensor:
    """Tokens in rows of `block`, -1 past the end."""
    blocks = -(-tokens.numel() // block)
    return torch.nn.functional.pad(tokens, (0, blocks * block - tokens.numel()), value=-1).view(blocks, block)


def split_output(call: Call, head: int, rows: int, peaks: bool = False) -> Parts:
    """The output of some rows of a head, by key block.

    Args:
        call: the call.
        head: which head.
        rows: rows of each block.
        peaks: also give every row's largest score of every block.

    Returns:
        The parts.
    """
    picked = torch.linspace(0, Q_BLOCK - 1, rows, device=call.rows.device).round().long()
    places = call.rows if peaks else call.rows[:, picked]  # [I, R]
    scale = call.q.shape[-1] ** -0.5 * LOG2_E
    keys, values = call.k[head].float(), call.v[head].float()  # [Nb, K, D]
    scores = torch.einsum("ird,nkd->inrk", call.q[head][places.clamp_min(0)].float() * scale, keys)
    scores.masked_fill_(~call.there[:, None], -torch.inf)
    largest = scores.new_empty(0)
    if peaks:
        largest = scores.amax(-1).masked_fill((places < 0)[:, None], torch.nan)  # [I, Nb, Q_BLOCK]
        scores, places = scores[:, :, picked], places[:, picked]
        largest = largest.unflatten(-1, (Q_BLOCK // PV_ROWS, PV_ROWS))
    weights = torch.exp2(scores - scores.amax((1, 3), keepdim=True))
    value = torch.einsum("inrk,nkd->inrd", weights, values)
    weight = weights.sum(-1)
    dense = value.sum(1) / weight.sum(1)[..., None]
    return Parts(weight, value, dense, places >= 0, largest)


def selection_curves(call: Call, head: int, sampling: Sampling) -> Curves:
    """Errors for every simthresh of SIMTHRESH and every cdf.

    Args:
        call: the call.
        head: which head.
        sampling: how much to look at.

    Returns:
        Curves with T = len(SIMTHRESH); `at` is the predicted mass of a prefix.
    """
    parts = split_output(call, head, sampling.rows)
    means, similarity = call.k_blocks.means[head], call.k_blocks.similarity[head]
    scores = call.q_blocks.means[head] @ means.T * call.q.shape[-1] ** -0.5  # [I, Nk]
    q_similarity = call.q_blocks.similarity[head]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    before = None
    for limit in SIMTHRESH:
        judged = torch.cat([similarity > limit, q_similarity > limit])
        if before is None or not torch.equal(judged, before):
            curve = _of_simthresh(call, parts, scores, similarity > limit, q_similarity > limit)
        found.append(curve)
        before = judged
    at, error, size = (torch.stack(part) for part in zip(*found))
    return Curves(at, error, size, _norm(parts), int(call.there.sum()))


def _of_simthresh(call, parts, scores, k_similar, q_similar):
    blocks = len(call.there)
    similar = torch.nn.functional.pad(k_similar, (0, blocks - len(k_similar)))  # the prompt is no candidate
    mass = block_masses(scores, k_similar)
    index = scores.masked_fill(~k_similar, -torch.inf).sort(descending=True, stable=True).indices  # [I, Nk]
    at = mass.gather(1, index).cumsum(1).masked_fill(~k_similar[index], torch.inf)
    always = ~similar | call.always
    error, size = _prefix_errors(call, parts, index, always)
    whole = ~q_similar[:, None]
    return at, error.masked_fill(whole, 0), size.masked_fill(whole, call.there.sum())


def _prefix_errors(call: Call, parts: Parts, index: Tensor, always: Tensor) -> tuple[Tensor, Tensor]:
    """Errors and keys with the blocks that always stay and the first 0 ... N of `index` [I, N]."""
    picked = torch.arange(len(index), device=index.device)[:, None]
    sizes = call.there.sum(1)

    def grown(x, base):  # x [I, Nb, ...] -> its sums over the growing set [I, N + 1, ...]
        added = x[picked, index] * ~always[index].view(*index.shape, *[1] * (x.ndim - 2))
        return torch.cat([base[:, None], added], 1).cumsum(1)

    weight = grown(parts.weight, parts.weight[:, always].sum(1))
    value = grown(parts.value, parts.value[:, always].sum(1))
    out = value / torch.where(weight == 0, 1.0, weight)[..., None]
    size = grown(sizes.float().expand(len(index), -1), sizes[always].sum().float().expand(len(index)))
    return _l1(out, parts), size


def _l1(out: Tensor, parts: Parts) -> Tensor:
    """Sum of |difference| to the dense output: out [I, N, r, D] -> [I, N]."""
    difference = (out - parts.dense[:, None]).abs().sum(-1)  # [I, N, r]
    return difference.masked_fill(~parts.real[:, None], 0).sum(-1)


def _norm(parts: Parts) -> float:
    return parts.dense.abs().sum(-1)[parts.real].sum().item()


def filter_curves(call: Call, head: int, sampling: Sampling, simthresh: float, cdf: float) -> Curves:
    """Errors for every pv_threshold, with the selection that simthresh and cdf give.

    Args:
        call: the call.
        head: which head.
        sampling: how much to look at.
        simthresh, cdf: of the head.

    Returns:
        Curves with T = 1, its blocks those of PV_ROWS rows; `at` is how much a block's largest score, in any of these rows,
        raised the running maximum (negative: stayed below), and the n skipped ones are the first of that order.
    """
    parts = split_output(call, head, sampling.rows, peaks=True)
    kept = _kept(call, head, simthresh, cdf)  # [I, Nb]
    sampled, _, groups, _ = parts.peaks.shape
    peaks = parts.peaks.masked_fill(~kept[:, :, None, None], -torch.inf)
    running = torch.cat(
        [torch.full_like(peaks[:, :1], -torch.inf), peaks.nan_to_num(-torch.inf).cummax(1).values[:, :-1]], 1
    )
    above = (peaks - running).nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(-1)  # [I, Nb, groups]
    above = above.masked_fill(~kept[..., None], torch.inf)  # not computed, so not skipped
    at, index = above.transpose(1, 2).flatten(0, 1).sort(-1)  # [I * groups, Nb]
    rows = {"weight": 2, "value": 2, "dense": 1, "real": 1}  # the dim of the rows
    split = parts._replace(**{name: _by_group(getattr(parts, name), groups, dim) for name, dim in rows.items()})
    kept = kept.repeat_interleave(groups, 0)
    total = (split.weight * kept[..., None]).sum(1)  # [I * groups, r / groups]
    picked = torch.arange(sampled * groups, device=index.device)[:, None]
    value = (split.value * kept[..., None, None])[picked, index]
    left = value.sum(1, keepdim=True) - torch.nn.functional.pad(value.cumsum(1), (0, 0, 0, 0, 1, 0))
    error = _l1(left / total[:, None, :, None], split)
    sizes = (kept * call.there.sum(1))[picked, index].float()
    size = sizes.sum(1, keepdim=True) - torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
    return Curves(at[None], error[None], size[None], _norm(parts), int(call.there.sum()))


def _by_group(x: Tensor, groups: int, dim: int) -> Tensor:
    """[I, ..., r, ...] -> [I * groups, ..., r / groups, ...]."""
    return x.unflatten(dim, (groups, -1)).movedim(dim, 1).flatten(0, 1)


def _kept(call: Call, head: int, simthresh: float, cdf: float) -> Tensor:
    """bool [I, Nb], the blocks that the sampled query blocks compute."""
    similar = call.k_blocks.similarity[head] > simthresh
    scores = call.q_blocks.means[head] @ call.k_blocks.means[head].T * call.q.shape[-1] ** -0.5
    index = scores.masked_fill(~similar, -torch.inf).sort(descending=True, stable=True).indices
    keep = block_masses(scores, similar).gather(1, index).cumsum(1) <= (cdf if cdf < 1 else torch.inf)
    keep[:, 0] = True
    keep = torch.zeros_like(keep).scatter(1, index, keep) | ~similar
    keep = torch.nn.functional.pad(keep, (0, len(call.there) - keep.shape[1])) | call.always
    return keep | ~(call.q_blocks.similarity[head] > simthresh)[:, None]


def fit_selection(curves: list[Curves], bound: float) -> tuple[float, float, float]:
    """The simthresh and the cdf that compute least with a relative L1 below the bound in every call.

    Args:
        curves: of one head, one a call.
        bound: relative L1, > 0.

    Returns:
        simthresh (the largest of those that do equally well), cdf, and the density, mean over the calls.
    """
    low = curves[0].error.new_zeros(len(SIMTHRESH))
    high = torch.ones_like(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = torch.stack([_at(c, c.error, middle).sum(1) / c.norm for c in curves]).amax(0) < bound
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    density = torch.stack([_at(c, c.size, high).mean(1) / c.keys for c in curves]).mean(0)
    best = (density <= density.min() + 1e-6).nonzero().max()
    return SIMTHRESH[int(best)], high[best].item(), density[best].item()


def _at(curves: Curves, values: Tensor, cdf: Tensor) -> Tensor:
    """Values [T, I] where a cdf [T] cuts the order."""
    limit = torch.where(cdf >= 1, torch.finfo(cdf.dtype).max, cdf)[:, None, None]
    count = (curves.at <= limit).sum(-1, keepdim=True).clamp_min(1)
    return values.gather(-1, count).squeeze(-1)


def fit_filter(curves: list[Curves], bound: float) -> tuple[float, float]:
    """The least pv_threshold whose relative L1, the selection's included, is below the bound in every call.

    Args:
        curves: of one head, one a call.
        bound: relative L1, > 0.

    Returns:
        pv_threshold in [0, 50], or infinity where none will do; and the share of the selected P V that stays.
    """

    def worst(limit: float) -> tuple[float, float]:
        errors, stays = [], []
        for c in curves:
            count = (c.at < -limit).sum(-1, keepdim=True)
            errors.append(c.error.gather(-1, count).sum().item() / c.norm)
            stays.append((c.size.gather(-1, count).sum() / c.size[..., 0].sum()).item())
        return max(errors), sum(stays) / len(stays)

    if worst(PV_LIMIT)[0] >= bound:
        return torch.inf, 1.0
    low, high = 0.0, PV_LIMIT
    if worst(low)[0] < bound:
        high = low
    else:
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if worst(middle)[0] < bound else (middle, high)
    return high, worst(high)[1]


def dense_head() -> tuple[float, float, float]:
    """simthresh, cdf and pv_threshold of a head that computes everything."""
    return -1.0, 1.0, torch.inf


def as_thresholds(heads: list[tuple[float, float, float]]) -> Thresholds:
    """One layer's thresholds from (simthresh, cdf, pv_threshold) of each head."""
    return Thresholds(**dict(zip(Thresholds.__dataclass_fields__, torch.tensor(heads).T.contiguous())))
