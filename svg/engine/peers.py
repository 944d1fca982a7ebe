"""Processes that hold some heads of a layer each, with the whole sequence: what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

Deal = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Peers:
    """The processes of a layer and the heads that each of them has.

    Args:
        deal: indices of the heads of every process, ascending.
        rank: which of them is this one.
        group: of torch.distributed; None: the default one.
    """

    deal: Deal
    rank: int
    group: Any = field(default=None, compare=False)

    @property
    def ranks(self) -> int:
        return len(self.deal)

    @property
    def heads(self) -> int:
        """Of all processes."""
        return sum(map(len, self.deal))

    @property
    def own(self) -> list[int]:
        """Indices of this process' heads."""
        return list(self.deal[self.rank])

    def part(self, index: int, parts: int) -> Peers:
        """The processes with one stretch of everyone's heads, counted anew from 0."""
        stretches = [heads[slice(*bounds(len(heads), parts)[index])] for heads in self.deal]
        order = sorted(sum(stretches, ()))
        return Peers(tuple(tuple(map(order.index, heads)) for heads in stretches), self.rank, self.group)

    def add(self, numbers: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        dist.all_reduce(numbers, group=self.group)
        return numbers

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest of every number over the processes, in place."""
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers

    def gather(self, x: Tensor) -> Tensor:
        """Values of own heads [B, h, ...] -> of all heads [B, H, ...], by index."""
        whole = x.new_zeros(x.shape[0], self.heads, *x.shape[2:])
        whole[:, self.own] = x
        return self.add(whole)

    def before(self, numbers: Tensor) -> Tensor:
        """Integers [N] -> their sums over the processes before this one."""
        rows = numbers.new_zeros(self.ranks, *numbers.shape)
        rows[self.rank] = numbers
        return self.add(rows)[: self.rank].sum(0, dtype=numbers.dtype)


def bounds(count: int, parts: int) -> list[tuple[int, int]]:
    """(first, last + 1) of every part of `count` things, as even as whole numbers allow."""
    edges = [round(i * count / parts) for i in range(parts + 1)]
    return list(zip(edges, edges[1:]))


def even_deal(heads: int, ranks: int) -> Deal:
    """Heads in order, as `torch.tensor_split` splits them."""
    sizes = [heads // ranks + (rank < heads % ranks) for rank in range(ranks)]
    starts = [sum(sizes[:rank]) for rank in range(ranks)]
    return tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes))


def balanced_deal(work: list[float], ranks: int) -> Deal:
    """Heads dealt so that every process has about as much work, and as many heads as in `even_deal`.

    Args:
        work: of each head.
        ranks: processes.

    Returns:
        The deal; the even one where that is as good.

    Source: largest first to whoever has least (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    even = even_deal(len(work), ranks)
    hands: list[list[int]] = [[] for _ in even]
    for head in sorted(range(len(work)), key=lambda head: -work[head]):
        free = [hand for hand, full in zip(hands, even) if len(hand) < len(full)]
        min(free, key=lambda hand: sum(work[other] for other in hand)).append(head)
    found = tuple(tuple(sorted(hand)) for hand in hands)
    return found if _most(work, found) < 0.98 * _most(work, even) else even


def _most(work: list[float], deal: Deal) -> float:
    return max(sum(work[head] for head in hand) for hand in deal)
