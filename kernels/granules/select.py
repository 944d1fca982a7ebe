"""List each row group's granules: its best ones, then all above one threshold that the whole budget decides.

Scores are compared by their upper 24 bits (8 of the exponent, 15 of the mantissa), as integers; equal ones by their place,
lowest first. No scores are sorted, and none are written again:

    floors       a row in registers: bisection finds its `least`-th largest score
    histograms   of what is left of a sample, 8 bits at a time: three passes find the score that the budget ends at
    counts       how many granules of each row lie above it, and how many are equal to it
    ties         of the equal ones as many as still fit; running sums say where each list begins
    lists        a row in registers: its granules written one after the other, and as bits

Counts are added by integer atomics, so two runs are bit-equal. Nothing waits for the device: a CUDA graph can hold it.
Up to 32768 granules of a video's keys, sm80 and newer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import target
from ..common.target import tl, triton
from .reference import select_granules_reference
from .values import ROWS, SIZES, GranuleLists, longest_first

MAX_GRANULES = 32768
LOW_BITS = 7  # of a score's 31 that are not compared
DIGIT = 8  # bits of one histogram
NONE = 1 << 3 * DIGIT  # above every score
COUNTED = 1024  # scores of a row that are looked at together


def select_granules(
    scores: Tensor,
    tokens: Tensor,
    *,
    budget: float | Tensor,
    floor: float,
    size: int,
    rows: int,
    per_head: bool = False,
    most: float = 1.0,
) -> GranuleLists:
    """List each row group's granules: its best, then all above one threshold that the whole budget decides.

    Args:
        scores: fp32 [B, H, NG, T], not negative, contiguous.
        tokens: int32 [B, C], tokens of each granule, C >= T; text granules follow the video's, of which only the last
            may be partial.
        budget: granules a row group may list on average, as a share of T, in (0, 1]; or fp32 [H] on the scores' device,
            whose values are not checked, because that would wait for the device.
        floor: share of that average that every row group lists whatever the others need, in [0, 1].
        size: keys of a whole granule.
        rows: query rows of a group.
        per_head: one threshold for each head and sample; else one for all heads of a sample.
        most: the largest mean that a tensor of budgets has, known to the host: it sizes the lists. Budgets whose mean is
            larger are scaled down to it. Not used with a number.

    Returns:
        The lists. The partial video granule and the text's are in every list, on top of the budget. A row group lists one
        granule at least. `entries` is as long as the budget allows, and lists need not follow each other without gaps.

    Raises:
        ValueError: shapes disagree, or a number lies outside its range.
        TypeError: scores are not fp32, or tokens not int32.
        NotImplementedError: on the Triton path, more than 32768 video granules, or more than 2^31 scores a sample.

    Example:
        >>> lists = select_granules(scores, granules.tokens, budget=0.2, floor=0.5, size=16, rows=128)
    """
    _check(scores, tokens, budget, floor, size, rows, most)
    budget = _scaled_down(budget, most)
    options = {"floor": floor, "size": size, "rows": rows, "per_head": per_head}
    if not target.use_triton(scores):
        return select_granules_reference(scores, tokens, budget=budget, **options)
    return _select(scores, tokens, budget=budget, most=most, **options)


def _check(scores, tokens, budget, floor, size, rows, most):
    if scores.dim() != 4 or tokens.dim() != 2 or tokens.shape[0] != scores.shape[0]:
        raise ValueError(
            f"scores must be [B, H, NG, T] and tokens [B, C], got {tuple(scores.shape)} and {tuple(tokens.shape)}"
        )
    if tokens.shape[1] < scores.shape[3]:
        raise ValueError(
            f"tokens must hold all {scores.shape[3]} video granules, got {tokens.shape[1]}: pass Granules.tokens"
        )
    if scores.dtype != torch.float32 or tokens.dtype != torch.int32:
        raise TypeError(f"scores must be fp32 and tokens int32, got {scores.dtype} and {tokens.dtype}: convert them")
    if isinstance(budget, Tensor):
        if budget.shape != scores.shape[1:2] or budget.dtype != torch.float32 or budget.device != scores.device:
            raise ValueError(
                f"budget must be fp32 [H] = [{scores.shape[1]}] on {scores.device}, got {budget.dtype} "
                f"{tuple(budget.shape)} on {budget.device}: one share a head, or one number"
            )
    elif not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget}: 0.2 is the usual choice")
    for name, share, usual in (("floor", floor, "0.5 is the usual choice"), ("most", most, "1 holds any budget")):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}: {usual}")
    for name, number, choices in (("size", size, SIZES), ("rows", rows, ROWS)):
        if number not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {number}")


def _scaled_down(budget: float | Tensor, most: float) -> float | Tensor:
    if not isinstance(budget, Tensor) or most >= 1:
        return budget
    return (budget.double() * (most / budget.double().mean()).clamp_max(1)).float()


class Limits(NamedTuple):
    """What a threshold may list.

    Args:
        allowed: int32 [1], or [H] where each head has its threshold: granules of all its rows.
        least: int32 of the same shape: of each row.
        listed: granules of all video lists together, at most.
    """

    allowed: Tensor
    least: Tensor
    listed: int


def _limits(budget, most, floor, per_head, shape, device) -> Limits:
    B, H, NG, T = shape
    thresholds, heads = (H, 1) if per_head else (1, H)
    if isinstance(budget, Tensor):
        share = budget.double().view(thresholds, heads).mean(1)
        allowed = (share * (T * NG * heads) + 1e-6).floor().to(torch.int32)
        least = (floor * share * T).round().clamp(1, T).to(torch.int32)
        # A head's share can be all while the mean is `most`; floors are below budgets but for one granule a row.
        listed = B * H * NG * min(T, math.ceil(most * T * (1 + 1e-6)) + 1)
        return Limits(allowed, least, listed)
    allowed = math.floor(budget * T * NG * heads + 1e-6)
    least = min(T, max(1, round(floor * budget * T)))
    allowed_least = (torch.full((thresholds,), n, dtype=torch.int32, device=device) for n in (allowed, least))
    return Limits(*allowed_least, B * thresholds * max(allowed, NG * heads * least))


# arch -> (warps of a row up to 2048 granules wide, twice as many above and again above 8192; programs of a histogram for
# each SM). Not measured: chosen by ahead-of-time compile (no spills).
LAUNCH = {80: (4, 8), 89: (4, 8), 90: (4, 8), 100: (4, 8), 120: (4, 8)}


def _select(scores, tokens, *, budget, most, floor, size, rows, per_head):
    B, H, NG, T = scores.shape
    C, device = tokens.shape[1], scores.device
    if T > MAX_GRANULES or H * NG * T >= 1 << 31:
        raise NotImplementedError(
            f"there must be at most {MAX_GRANULES} video granules, and 2^31 scores a sample, got {T} and {H * NG * T}: "
            "use larger granules"
        )
    scores, tokens = scores.contiguous(), tokens.contiguous()
    limits = _limits(budget, most, floor, per_head, scores.shape, device)
    thresholds, members = (H, NG) if per_head else (1, H * NG)
    segments = B * thresholds
    histograms = torch.zeros(3, segments, 1 << DIGIT, dtype=torch.int32, device=device)
    # Of each row: its least-th score, how many equal to it are kept, and how many are left; above the edge, at the edge.
    floors, kept, spare, above, tied, taken, room = torch.empty(7, B * H * NG, dtype=torch.int32, device=device)
    whole, counts = torch.empty(2, B, H, NG, dtype=torch.int32, device=device)
    chosen = torch.empty(B, H, NG, triton.cdiv(T, 32), dtype=torch.int32, device=device)
    entries = torch.empty(limits.listed + B * H * NG * (1 + C - T), dtype=torch.int32, device=device)
    warps, programs = target.launch_row(LAUNCH, device)
    wide = {"BLOCK_T": max(32, triton.next_power_of_2(T)), "num_warps": warps * (1 + (T > 2048) + 2 * (T > 8192))}
    grid = (min(members, triton.cdiv(programs * target.sm_count(device), segments)), segments)
    edge = (histograms, *limits[:2], thresholds, members, segments)
    with target.on_device(scores):
        _floors_kernel[grid](scores, histograms, limits.least, floors, kept, spare, thresholds, members, T, **wide)
        for level in (1, 2):
            _histogram_kernel[grid](scores, *edge, floors, spare, T, LEVEL=level, BLOCK=COUNTED)
        _counts_kernel[grid](scores, *edge, floors, spare, above, tied, T, BLOCK=COUNTED)
        _ties_kernel[(segments,)](
            *edge, tokens, floors, kept, above, tied, taken, room, T, C, size,
            BLOCK_C=max(16, triton.next_power_of_2(C - T + 1)), BLOCK=COUNTED,
        )  # fmt: skip
        starts = room.cumsum(0, dtype=torch.int64) - room
        _lists_kernel[(members, segments)](
            scores, *edge, tokens, floors, taken, starts, entries, whole, counts, chosen, T, C, size,
            BLOCK_C=max(16, triton.next_power_of_2(C - T + 1)), **wide,
        )  # fmt: skip
    return GranuleLists(entries, starts.view(B, H, NG), whole, counts, chosen, longest_first(counts), rows)


@triton.jit
def _keys(scores, row, first, T, BLOCK: tl.constexpr):
    """What is compared of a row's scores: integers, -1 past T."""
    offs = first + tl.arange(0, BLOCK)
    bits = tl.load(scores + row.to(tl.int64) * T + offs, mask=offs < T, other=0.0).to(tl.int32, bitcast=True)
    return tl.where(offs < T, tl.maximum(bits, 0) >> 7, -1)


@triton.jit
def _count(chosen):
    return tl.sum(chosen.to(tl.int32), 0)


@triton.jit(do_not_specialize=["thresholds", "members", "T"])
def _floors_kernel(
    scores, histograms, least, floors, kept, spare, thresholds, members, T, BLOCK_T: tl.constexpr
):  # fmt: skip
    segment = tl.program_id(1)
    at_least = tl.load(least + segment % thresholds)
    bins = tl.arange(0, 256)
    histogram = tl.zeros([256], dtype=tl.int32)
    for member in range(tl.program_id(0), members, tl.num_programs(0)):
        row = segment * members + member
        key = _keys(scores, row, 0, T, BLOCK_T)
        # At least `at_least` scores are >= low, fewer are > high.
        low, high = 0, tl.max(key, 0)
        if _count(key >= high) >= at_least:
            low = high
        while low < high:
            middle = low + (high - low + 1) // 2
            number = _count(key >= middle)
            low = tl.where(number >= at_least, middle, low)
            high = tl.where(number > at_least, high, tl.where(number == at_least, middle, middle - 1))
        last = tl.min(tl.where(key >= low, key, 0x7FFFFFFF), 0)
        keep = at_least - _count(key > last)
        left = _count(key == last) - keep
        tl.store(floors + row, last)
        tl.store(kept + row, keep)
        tl.store(spare + row, left)
        histogram += tl.histogram(tl.maximum(key, 0) >> 16, 256, mask=(key >= 0) & (key < last))
        histogram += tl.where(bins == last >> 16, left, 0)
    tl.atomic_add(histograms + segment * 256 + bins, histogram, mask=histogram > 0, sem="relaxed")


@triton.jit
def _threshold(histograms, allowed, least, thresholds, members, segments, segment, LEVELS: tl.constexpr):
    """After some histograms: the upper digits of the score where the budget ends, and how many equal to it still fit.

    Above every score, or below every one, where nothing more fits or all does.
    """
    at_least = tl.load(least + segment % thresholds)
    need = tl.load(allowed + segment % thresholds) - members * at_least
    bins = tl.arange(0, 256)
    counts = tl.load(histograms + segment * 256 + bins)
    full, empty = need >= tl.sum(counts, 0), need <= 0
    prefix = 0
    for level in tl.static_range(LEVELS):
        counts = tl.load(histograms + (level * segments + segment) * 256 + bins)
        from_here = tl.cumsum(counts, 0, reverse=True)
        digit = tl.maximum(_count(from_here >= need) - 1, 0)
        need -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        prefix = prefix * 256 + digit
    prefix = tl.where(full, -1, tl.where(empty, 1 << 24, prefix))
    return prefix, tl.where(full | empty, 0, need)


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T"])
def _histogram_kernel(
    scores, histograms, allowed, least, thresholds, members, segments, floors, spare, T,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How often scores with the upper digits found so far have each next digit."""
    segment = tl.program_id(1)
    prefix, need = _threshold(histograms, allowed, least, thresholds, members, segments, segment, LEVEL)
    bins = tl.arange(0, 256)
    histogram = tl.zeros([256], dtype=tl.int32)
    SHIFT: tl.constexpr = 16 - 8 * LEVEL
    if need > 0:
        for member in range(tl.program_id(0), members, tl.num_programs(0)):
            row = segment * members + member
            last = tl.load(floors + row)
            for first in range(0, T, BLOCK):
                key = _keys(scores, row, first, T, BLOCK)
                open = (key < last) & (key >> SHIFT + 8 == prefix)
                histogram += tl.histogram((key >> SHIFT) & 255, 256, mask=open)
            left = tl.where(last >> SHIFT + 8 == prefix, tl.load(spare + row), 0)
            histogram += tl.where(bins == ((last >> SHIFT) & 255), left, 0)
    tl.atomic_add(histograms + (LEVEL * segments + segment) * 256 + bins, histogram, mask=histogram > 0, sem="relaxed")


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T"])
def _counts_kernel(
    scores, histograms, allowed, least, thresholds, members, segments, floors, spare, above, tied, T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of each row above its edge, and those at the threshold that its floor leaves."""
    segment = tl.program_id(1)
    threshold, _ = _threshold(histograms, allowed, least, thresholds, members, segments, segment, 3)
    for member in range(tl.program_id(0), members, tl.num_programs(0)):
        row = segment * members + member
        last = tl.load(floors + row)
        edge = tl.minimum(last, threshold)
        higher = tl.zeros([BLOCK], dtype=tl.int32)
        equal = tl.zeros([BLOCK], dtype=tl.int32)
        for first in range(0, T, BLOCK):
            key = _keys(scores, row, first, T, BLOCK)
            higher += (key >= 0) & (key > edge)
            equal += (key >= 0) & (key == threshold)
        tl.store(above + row, tl.sum(higher, 0))
        left = tl.where(threshold == last, tl.load(spare + row), tl.sum(equal, 0))
        tl.store(tied + row, tl.where(threshold > last, 0, left))


@triton.jit
def _extra(tokens, sample, T, C, size, BLOCK_C: tl.constexpr):
    """Tokens of the last video granule and the text's, and which of them are in every list whatever their score."""
    offs = T - 1 + tl.arange(0, BLOCK_C)
    number = tl.load(tokens + sample.to(tl.int64) * C + offs, mask=offs < C, other=0)
    is_text = offs >= T
    whole = is_text & (number == size)
    partial = (number < size) & ((number > 0) | ~is_text)
    return offs, whole, partial


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T", "C", "size"])
def _ties_kernel(
    histograms, allowed, least, thresholds, members, segments, tokens, floors, kept, above, tied, taken, room, T, C, size,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many scores at its edge each row takes, lowest index first, and how long its list may be."""
    segment = tl.program_id(0)
    threshold, need = _threshold(histograms, allowed, least, thresholds, members, segments, segment, 3)
    _, whole, partial = _extra(tokens, segment // thresholds, T, C, size, BLOCK_C)
    more = _count(whole | partial)
    for first in range(0, members, BLOCK):
        member = first + tl.arange(0, BLOCK)
        inside = member < members
        row = segment * members + member
        equal = tl.load(tied + row, mask=inside, other=0)
        before = tl.cumsum(equal, 0) - equal
        take = tl.minimum(tl.maximum(need - before, 0), equal)
        need = tl.maximum(need - tl.sum(equal, 0), 0)
        own = tl.load(floors + row, mask=inside, other=0) <= threshold
        take += tl.where(own, tl.load(kept + row, mask=inside, other=0), 0)
        tl.store(taken + row, take, mask=inside)
        tl.store(room + row, tl.load(above + row, mask=inside, other=0) + take + more, mask=inside)


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T", "C", "size"])
def _lists_kernel(
    scores, histograms, allowed, least, thresholds, members, segments, tokens, floors, taken, starts,
    entries, whole, counts, chosen, T, C, size, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    row = segment * members + tl.program_id(0)
    threshold, _ = _threshold(histograms, allowed, least, thresholds, members, segments, segment, 3)
    edge, take = tl.minimum(tl.load(floors + row), threshold), tl.load(taken + row)
    key = _keys(scores, row, 0, T, BLOCK_T)
    offs = tl.arange(0, BLOCK_T)
    tie = (key == edge) & (key >= 0)
    keep = (key > edge) & (key >= 0)
    if take >= _count(tie):
        keep = keep | tie
    elif take > 0:
        keep = keep | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= take))
    extra, extra_whole, extra_partial = _extra(tokens, segment // thresholds, T, C, size, BLOCK_C)
    cut = tl.max((extra_partial & (extra < T)).to(tl.int32), 0)  # 1 where the last video granule is partial
    words = tl.where(offs >= T - cut, 1, keep.to(tl.int32)).reshape([BLOCK_T // 32, 32]) << tl.arange(0, 32)[None, :]
    word, length = tl.arange(0, BLOCK_T // 32), (T + 31) // 32
    tl.store(chosen + row.to(tl.int64) * length + word, tl.sum(words, 1), mask=word < length)
    keep = keep & (offs < T - cut)
    entries += tl.load(starts + row)
    tl.store(entries + tl.cumsum(keep.to(tl.int32), 0) - 1, offs, mask=keep)
    number = _count(keep)
    tl.store(entries + number + tl.cumsum(extra_whole.to(tl.int32), 0) - 1, extra, mask=extra_whole)
    number += _count(extra_whole)
    tl.store(whole + row, number)
    tl.store(entries + number + tl.cumsum(extra_partial.to(tl.int32), 0) - 1, extra, mask=extra_partial)
    tl.store(counts + row, number + _count(extra_partial))
