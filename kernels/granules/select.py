"""List each row group's granules: its best ones, then all above one threshold that the whole budget decides.

Scores are compared by their upper 24 bits (8 of the exponent, 15 of the mantissa), as integers; equal ones by their place,
lowest first. No scores are sorted, and none are written again:

    floors       a row in registers: bisection finds its `least`-th largest score
    histograms   of what is left of a sample, some bits at a time: the score that the budget ends at
    counts       from the last one: how many granules of each row lie above that score, and how many are equal to it
    ties         of the equal ones as many as still fit; running sums say where each list begins
    lists        granules written one after the other, and as bits

Counts are added by integer atomics, so two runs are bit-equal. Nothing waits for the device: a CUDA graph can hold it.
Up to 32768 granules of a video's keys, sm80 and newer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common import target
from ..common.launch import LaunchTable
from ..common.target import tl, triton
from .reference import select_granules_reference
from .values import ROWS, SIZES, GranuleLists, OtherHeads, longest_first

MAX_GRANULES, KEY_BITS = 32768, 24  # of a video's keys; of a score that are compared


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
    others: OtherHeads | None = None,
) -> GranuleLists:
    """List each row group's granules: its best, then all above one threshold that the whole budget decides.

    Args:
        scores: fp32 [B, H, NG, T], not negative, contiguous.
        tokens: int32 [B, C], tokens of each granule, C >= T; text granules follow the video's, of which only the last
            may be partial.
        budget: granules a row group may list on average, as a share of T, in (0, 1]; or on the scores' device fp32 [H],
            or fp64 [] for all heads, whose values are not checked, because that would wait for the device.
        floor: share of that average that every row group lists whatever the others need, in [0, 1].
        size: keys of a whole granule.
        rows: query rows of a group.
        per_head: one threshold for each head and sample; else one for all heads of a sample.
        most: the largest mean that a tensor of budgets has, known to the host: it sizes the lists. Budgets whose mean is
            larger are scaled down to it; one for all heads must not be larger. Not used with a number.
        others: processes that hold more heads of the same samples and choose together; not with `per_head`.

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
        return select_granules_reference(scores, tokens, budget=budget, others=others, **options)
    return _select(scores, tokens, budget=budget, most=most, others=others, **options)


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
        wanted = ((), torch.float64) if budget.dim() == 0 else (scores.shape[1:2], torch.float32)
        if (budget.shape, budget.dtype, budget.device) != (*wanted, scores.device):
            raise ValueError(
                f"budget must be fp32 [H] = [{scores.shape[1]}] or fp64 [] on {scores.device}, got {budget.dtype} "
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
    if not isinstance(budget, Tensor) or budget.dim() == 0 or most >= 1:
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


def _limits(budget, most, floor, per_head, shape, device, others) -> Limits:
    B, H, NG, T = shape
    thresholds, heads = (H, 1) if per_head else (1, H)
    if isinstance(budget, Tensor) and budget.dim() == 0:  # one threshold; as a number below, operation by operation
        least = (floor * budget * T).round().clamp(1, T).to(torch.int32)
        allowed = (budget * T * NG * heads + 1e-6).floor().to(torch.int32)
        listed = B * min(NG * H * T, math.ceil(most * T * NG * H) + NG * H)
        return Limits(allowed[None], least[None], listed)
    if isinstance(budget, Tensor):
        share = budget.double().view(thresholds, heads).mean(1)
        allowed = (share * (T * NG * heads) + 1e-6).floor().to(torch.int32)
        least = (floor * share * T).round().clamp(1, T).to(torch.int32)
        # A head's share can be all while the mean is `most`; floors are below budgets but for one granule a row.
        listed = B * H * NG * min(T, math.ceil(most * T * (1 + 1e-6)) + 1)
        return Limits(allowed, least, listed)
    everyone = heads if others is None else others.heads
    least = min(T, max(1, round(floor * budget * T)))
    # Kernels count the floors of the heads that are here; those of other processes are taken off before.
    allowed = math.floor(budget * T * NG * everyone + 1e-6) - NG * (everyone - heads) * least
    allowed_least = (torch.full((thresholds,), n, dtype=torch.int32, device=device) for n in (allowed, least))
    return Limits(*allowed_least, B * thresholds * min(NG * heads * T, max(allowed, NG * heads * least)))


# arch -> (bits of a digit, programs of a histogram for each SM). Not measured: chosen by ahead-of-time compile.
LAUNCH = LaunchTable({80: (6, 16), 89: (6, 16), 90: (6, 16), 100: (6, 16), 120: (6, 16)})


def _select(scores, tokens, *, budget, most, floor, size, rows, per_head, others=None, launch=None):
    B, H, NG, T = scores.shape
    C, device = tokens.shape[1], scores.device
    if T > MAX_GRANULES or H * NG * T >= 1 << 31:
        raise NotImplementedError(
            f"there must be at most {MAX_GRANULES} video granules, and 2^31 scores a sample, got {T} and {H * NG * T}: "
            "use larger granules"
        )
    scores, tokens = scores.contiguous(), tokens.contiguous()
    limits = _limits(budget, most, floor, per_head, scores.shape, device, others)
    digit, programs = launch or LAUNCH.row(device)
    thresholds, members = (H, NG) if per_head else (1, H * NG)
    levels, segments = KEY_BITS // digit, B * thresholds
    histograms = torch.zeros(levels, segments, 1 << digit, dtype=torch.int32, device=device)
    row_histograms = torch.empty(B * H * NG, 1 << digit, dtype=torch.int32, device=device)
    # Of each row: its floor, the keys equal to it that are kept and left; beyond the floor, the keys above the last digit's,
    # above the threshold and at it; the keys taken at its edge, and the room of its list.
    floors, kept, spare, higher, above, tied, taken, room = torch.empty(8, B * H * NG, dtype=torch.int32, device=device)
    whole, counts = torch.empty(2, B, H, NG, dtype=torch.int32, device=device)
    chosen = torch.empty(B, H, NG, triton.cdiv(T, 32), dtype=torch.int32, device=device)
    entries = torch.empty(limits.listed + B * H * NG * (1 + C - T), dtype=torch.int32, device=device)
    part = 1024 if T <= 8192 else 4096
    grid = (min(members, triton.cdiv(programs * target.sm_count(device), segments)), segments)
    edge = (histograms, *limits[:2], thresholds, members, segments)
    extra = {"BLOCK_C": max(16, triton.next_power_of_2(C - T + 1)), "LEVELS": levels, "DIGIT": digit, "BLOCK": 1024}
    with target.on_device(scores):
        _floors_kernel[grid](
            scores, *edge, floors, kept, spare, T,
            DIGIT=digit, BLOCK=part, PARTS=triton.cdiv(T, part), num_warps=part // 256,
        )  # fmt: skip
        if others is not None:
            others.add(histograms[0])
        for level in range(1, levels):
            _histogram_kernel[grid](
                scores, *edge, floors, spare, higher, row_histograms if level == levels - 1 else None, T,
                LEVEL=level, DIGIT=digit, BLOCK=1024,
            )  # fmt: skip
            if others is not None:
                others.add(histograms[level])
        _counts_kernel[(triton.cdiv(members, 32), segments)](
            *edge, higher, row_histograms, above, tied, T, LEVELS=levels, DIGIT=digit, BLOCK=32
        )
        before = None if others is None else others.before(tied.view(segments, members).sum(1, dtype=torch.int32))
        _ties_kernel[(segments,)](*edge, before, tokens, floors, kept, above, tied, taken, room, T, C, size, **extra)
        starts = room.cumsum(0, dtype=torch.int64) - room
        _lists_kernel[(members, segments)](
            scores, *edge, tokens, floors, taken, starts, entries, whole, counts, chosen, T, C, size, **extra
        )
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


@triton.jit
def _row(scores, row, T, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """All keys of a row, in parts of BLOCK."""
    parts = (_keys(scores, row, 0, T, BLOCK),)
    for i in tl.static_range(1, PARTS):
        parts = parts + (_keys(scores, row, i * BLOCK, T, BLOCK),)
    return parts


@triton.jit
def _count_from(parts, key, PARTS: tl.constexpr):
    """How many keys of a row are at least `key`."""
    number = (parts[0] >= key).to(tl.int32)
    for i in tl.static_range(1, PARTS):
        number += (parts[i] >= key).to(tl.int32)
    return tl.sum(number, 0)


@triton.jit
def _smallest_from(parts, key, PARTS: tl.constexpr):
    """The smallest key of a row that is at least `key`."""
    smallest = tl.where(parts[0] >= key, parts[0], 0x7FFFFFFF)
    for i in tl.static_range(1, PARTS):
        smallest = tl.minimum(smallest, tl.where(parts[i] >= key, parts[i], 0x7FFFFFFF))
    return tl.min(smallest, 0)


@triton.jit
def _largest(parts, PARTS: tl.constexpr):
    largest = parts[0]
    for i in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, parts[i])
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T"])
def _floors_kernel(
    scores, histograms, allowed, least, thresholds, members, segments, floors, kept, spare, T,
    DIGIT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Each row's `least`-th key, how many equal to it its floor keeps and leaves, and the first histogram of what is left."""
    segment = tl.program_id(1)
    at_least = tl.load(least + segment % thresholds)
    bins = tl.arange(0, 1 << DIGIT)
    histogram = tl.zeros([1 << DIGIT], dtype=tl.int32)
    SHIFT: tl.constexpr = 24 - DIGIT
    for member in range(tl.program_id(0), members, tl.num_programs(0)):
        row = segment * members + member
        parts = _row(scores, row, T, BLOCK, PARTS)
        # At least `at_least` keys are >= low, fewer are > high.
        low, high = 0, _largest(parts, PARTS)
        if _count_from(parts, high, PARTS) >= at_least:
            low = high
        while low < high:
            middle = low + (high - low + 1) // 2
            number = _count_from(parts, middle, PARTS)
            low = tl.where(number >= at_least, middle, low)
            high = tl.where(number > at_least, high, tl.where(number == at_least, middle, middle - 1))
        last = _smallest_from(parts, low, PARTS)
        keep = at_least - _count_from(parts, last + 1, PARTS)
        left = _count_from(parts, last, PARTS) - at_least
        tl.store(floors + row, last)
        tl.store(kept + row, keep)
        tl.store(spare + row, left)
        for i in tl.static_range(PARTS):
            open = (parts[i] >= 0) & (parts[i] < last)
            histogram += tl.histogram(tl.maximum(parts[i], 0) >> SHIFT, 1 << DIGIT, mask=open)
        histogram += tl.where(bins == last >> SHIFT, left, 0)
    tl.atomic_add(histograms + (segment << DIGIT) + bins, histogram, mask=histogram > 0, sem="relaxed")


@triton.jit
def _threshold(
    histograms, allowed, least, thresholds, members, segments, segment, LEVELS: tl.constexpr, DIGIT: tl.constexpr
):
    """After some histograms: the upper digits of the key where the budget ends, and how many equal to it still fit.

    Above every key, or below every one, where nothing more fits or all does.
    """
    at_least = tl.load(least + segment % thresholds)
    need = tl.load(allowed + segment % thresholds) - members * at_least
    bins = tl.arange(0, 1 << DIGIT)
    counts = tl.load(histograms + (segment << DIGIT) + bins)
    full, empty = need >= tl.sum(counts, 0), need <= 0
    prefix = 0
    for level in tl.static_range(LEVELS):
        counts = tl.load(histograms + (level * segments + segment << DIGIT) + bins)
        from_here = tl.cumsum(counts, 0, reverse=True)
        digit = tl.maximum(_count(from_here >= need) - 1, 0)
        need -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        prefix = (prefix << DIGIT) + digit
    prefix = tl.where(full, -1, tl.where(empty, 1 << 24, prefix))
    return prefix, tl.where(full | empty, 0, need)


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T"])
def _histogram_kernel(
    scores, histograms, allowed, least, thresholds, members, segments, floors, spare, higher, row_histograms, T,
    LEVEL: tl.constexpr, DIGIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How often keys with the upper digits found so far have each next digit, of those that floors leave.

    The last level keeps each row's histogram, and how many keys lie above what it looks at.
    """
    segment = tl.program_id(1)
    prefix, need = _threshold(histograms, allowed, least, thresholds, members, segments, segment, LEVEL, DIGIT)
    bins = tl.arange(0, 1 << DIGIT)
    histogram = tl.zeros([1 << DIGIT], dtype=tl.int32)
    SHIFT: tl.constexpr = 24 - DIGIT - DIGIT * LEVEL
    if need > 0:
        for member in range(tl.program_id(0), members, tl.num_programs(0)):
            row = segment * members + member
            last = tl.load(floors + row)
            left = tl.where(last >> SHIFT + DIGIT == prefix, tl.load(spare + row), 0)
            own = tl.where(bins == ((last >> SHIFT) & (1 << DIGIT) - 1), left, 0)
            above = tl.zeros([BLOCK], dtype=tl.int32)
            for first in range(0, T, BLOCK):
                key = _keys(scores, row, first, T, BLOCK)
                upper = key >> SHIFT + DIGIT
                own += tl.histogram(
                    (key >> SHIFT) & (1 << DIGIT) - 1, 1 << DIGIT, mask=(key < last) & (upper == prefix)
                )
                if row_histograms is not None:
                    above += ((key < last) & (upper > prefix)).to(tl.int32)
            histogram += own
            if row_histograms is not None:
                tl.store(row_histograms + (row.to(tl.int64) << DIGIT) + bins, own)
                number = tl.sum(above, 0) + tl.where(last >> SHIFT + DIGIT > prefix, tl.load(spare + row), 0)
                tl.store(higher + row, number)
    into = histograms + (LEVEL * segments + segment << DIGIT) + bins
    tl.atomic_add(into, histogram, mask=histogram > 0, sem="relaxed")


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T"])
def _counts_kernel(
    histograms, allowed, least, thresholds, members, segments, higher, row_histograms, above, tied, T,
    LEVELS: tl.constexpr, DIGIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys of each row above the threshold, beyond its floor, and those at it."""
    segment = tl.program_id(1)
    threshold, need = _threshold(histograms, allowed, least, thresholds, members, segments, segment, LEVELS, DIGIT)
    at_least = tl.load(least + segment % thresholds)
    member = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = segment * members + member
    inside = member < members
    bins = tl.arange(0, 1 << DIGIT)[None, :]
    cell = (row.to(tl.int64) << DIGIT)[:, None] + bins
    counts = tl.load(row_histograms + cell, mask=inside[:, None] & (need > 0), other=0)
    digit = threshold & (1 << DIGIT) - 1
    number = tl.load(higher + row, mask=inside & (need > 0), other=0) + tl.sum(tl.where(bins > digit, counts, 0), 1)
    tl.store(above + row, tl.where(threshold < 0, T - at_least, number), mask=inside)
    tl.store(tied + row, tl.sum(tl.where(bins == digit, counts, 0), 1), mask=inside)


@triton.jit
def _extra(tokens, sample, T, C, size, BLOCK_C: tl.constexpr):
    """The last video granule and the text's, and which of them are in every list: whole ones of the text, partial ones."""
    offs = T - 1 + tl.arange(0, BLOCK_C)
    number = tl.load(tokens + sample.to(tl.int64) * C + offs, mask=offs < C, other=0)
    is_text = offs >= T
    whole = is_text & (number == size)
    partial = (offs < C) & (number < size) & ((number > 0) | (offs < T))
    return offs, whole, partial


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T", "C", "size"])
def _ties_kernel(
    histograms, allowed, least, thresholds, members, segments, before, tokens, floors, kept, above, tied, taken, room, T, C, size,
    LEVELS: tl.constexpr, DIGIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many keys at its edge each row takes, lowest index first, and how long its list may be."""
    segment = tl.program_id(0)
    threshold, need = _threshold(histograms, allowed, least, thresholds, members, segments, segment, LEVELS, DIGIT)
    if before is not None:  # equal keys of other processes come first
        need -= tl.load(before + segment)
    at_least = tl.load(least + segment % thresholds)
    _, whole, partial = _extra(tokens, segment // thresholds, T, C, size, BLOCK_C)
    length = at_least + _count(whole | partial)
    for first in range(0, members, BLOCK):
        member = first + tl.arange(0, BLOCK)
        inside = member < members
        row = segment * members + member
        equal = tl.load(tied + row, mask=inside, other=0)
        take = tl.minimum(tl.maximum(need - (tl.cumsum(equal, 0) - equal), 0), equal)
        need = tl.maximum(need - tl.sum(equal, 0), 0)
        tl.store(room + row, length + tl.load(above + row, mask=inside, other=0) + take, mask=inside)
        at_floor = tl.load(floors + row, mask=inside, other=0) <= threshold
        take += tl.where(at_floor, tl.load(kept + row, mask=inside, other=0), 0)
        tl.store(taken + row, take, mask=inside)


@triton.jit(do_not_specialize=["thresholds", "members", "segments", "T", "C", "size"])
def _lists_kernel(
    scores, histograms, allowed, least, thresholds, members, segments, tokens, floors, taken, starts,
    entries, whole, counts, chosen, T, C, size,
    LEVELS: tl.constexpr, DIGIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's list, its lengths and its bits."""
    segment = tl.program_id(1)
    row = segment * members + tl.program_id(0)
    threshold, _ = _threshold(histograms, allowed, least, thresholds, members, segments, segment, LEVELS, DIGIT)
    edge, take = tl.minimum(tl.load(floors + row), threshold), tl.load(taken + row)
    extra, extra_whole, extra_partial = _extra(tokens, segment // thresholds, T, C, size, BLOCK_C)
    limit = T - tl.max((extra_partial & (extra < T)).to(tl.int32), 0)  # a partial granule is not in its place
    entries += tl.load(starts + row)
    words = (T + 31) // 32
    chosen += row.to(tl.int64) * words
    number = 0
    for first in range(0, T, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        key = _keys(scores, row, first, T, BLOCK)
        keep = (key > edge) & (key >= 0)
        tie = (key == edge) & (key >= 0)
        ties = _count(tie)
        if take >= ties:
            keep = keep | tie
        elif take > 0:
            keep = keep | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= take))
        take -= ties
        bits = (keep | (offs >= limit)).to(tl.int32).reshape([BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
        word = first // 32 + tl.arange(0, BLOCK // 32)
        tl.store(chosen + word, tl.sum(bits, 1), mask=word < words)
        keep = keep & (offs < limit)
        place = tl.cumsum(keep.to(tl.int32), 0)
        tl.store(entries + number + place - 1, offs, mask=keep)
        number += tl.max(place, 0)
    tl.store(entries + number + tl.cumsum(extra_whole.to(tl.int32), 0) - 1, extra, mask=extra_whole)
    number += _count(extra_whole)
    tl.store(whole + row, number)
    tl.store(entries + number + tl.cumsum(extra_partial.to(tl.int32), 0) - 1, extra, mask=extra_partial)
    tl.store(counts + row, number + _count(extra_partial))
