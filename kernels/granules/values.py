"""What the operations on granules hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

SIZES = (8, 16, 32, 64)
ROWS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Granules:
    """Keys and values of one call in sorted order, cut every `size` slots.

    The first T granules hold the video's keys, the last of them perhaps fewer than `size`; text granules follow, C in
    all. A granule with `size` tokens is whole, one with fewer is partial, and one without any is padding.

    Args:
        k: [B, H, C * size, D] contiguous, or None where only the statistics were asked for; slots without a token are 0.
        v: the values in the same order, or None.
        tokens: int32 [B, C], tokens of each granule.
        k_mean: [B, H, T, D] contiguous, in the keys' dtype: the mean key of each video granule.
        v_mean: [B, H, T, D] contiguous, in the values' dtype.
        spread: fp32 [B, H, T], variance of a granule's keys, mean over the channels.
        weight: fp32 [B, H, T], |v_mean|^2 + the variance of the granule's values summed over the channels.
        size: keys a granule, one of SIZES.
    """

    k: Tensor | None
    v: Tensor | None
    tokens: Tensor
    k_mean: Tensor
    v_mean: Tensor
    spread: Tensor
    weight: Tensor
    size: int

    def of_samples(self, which: slice) -> Granules:
        """The granules of some samples of the batch."""
        if which == slice(None):
            return self
        parts = {name: x[which] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **parts)


@dataclass(frozen=True)
class GranuleLists:
    """Which granules every group of query rows computes exactly.

    Args:
        entries: int32 [N], granules of all lists one after another; in a list whole granules come first.
        starts: int64 [B, H, NG], where the list of each row group begins in `entries`.
        whole: int32 [B, H, NG], leading entries of a list that are whole granules.
        counts: int32 [B, H, NG], entries of a list.
        chosen: int32 [B, H, NG, ceil(T / 32)], bit t of word w is set where granule 32 w + t is in the list, so that
            its mean takes no part; bits past T are set.
        schedule: int32 [B * H * NG], row groups in the order in which they are computed: head by head, the longest list
            of a head first, so that no multiprocessor is left with a long one at the end.
        rows: query rows of a group, one of ROWS.
    """

    entries: Tensor
    starts: Tensor
    whole: Tensor
    counts: Tensor
    chosen: Tensor
    schedule: Tensor
    rows: int


class OtherHeads(Protocol):
    """Processes that hold more heads of the same samples, each some.

    Args:
        heads: of all processes.
        own: indices of this one's.
    """

    @property
    def heads(self) -> int: ...

    @property
    def own(self) -> list[int]: ...

    def add(self, numbers: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        ...

    def before(self, numbers: Tensor) -> Tensor:
        """Integers [N] -> their sums over the processes before this one."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Values of own heads [B, h, ...] -> of all heads [B, H, ...], by index."""
        ...


def for_both_halves(lists: GranuleLists) -> GranuleLists:
    """Lists of a batch [B, ...] for one of [2 B, ...] whose halves share them; the entries are there once.

    Example:
        >>> for_both_halves(lists).counts.shape[0] == 2 * lists.counts.shape[0]
        True
    """
    twice = {name: torch.cat([getattr(lists, name)] * 2) for name in ("starts", "whole", "counts", "chosen")}
    schedule = torch.cat([lists.schedule, lists.schedule + lists.counts.numel()])
    return replace(lists, schedule=schedule, **twice)


def longest_first(counts: Tensor) -> Tensor:
    """`GranuleLists.schedule` of counts int32 [B, H, NG]."""
    groups = counts.shape[-1]
    order = counts.flatten(0, 1).argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(0, counts.numel(), groups, device=counts.device)
    return (order + first[:, None]).flatten().to(torch.int32)
