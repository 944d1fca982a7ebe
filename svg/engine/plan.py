"""What a method decides for one attention call, and how dense it is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Protocol

from torch import Tensor

from svg.kernels.block_sparse.blocks import BlockMap, Tail
from svg.kernels.selection.computed_pairs import computed_pairs

from .execute import execute
from .repair import probe_rows, repair


class CallPlan(Protocol):
    """What `svg.attend` asks of a method's plan: a `Plan` where it is a block map, else a class of the method's own."""

    @property
    def kind(self) -> Tensor | None:
        """int8 [B, H], 0 spatial and 1 temporal, or None for methods without head kinds."""
        ...

    @property
    def reused(self) -> bool:
        """Whether an earlier call made it."""
        ...

    def density(self) -> Tensor:
        """Computed share of what dense attention computes, float32 [B, H]."""
        ...

    def execute(self, q: Tensor, k: Tensor, v: Tensor, precision: str, failed: Tensor | None = None) -> Tensor:
        """Attention as planned, [B, H, S, D]; see `svg.engine.execute.execute`."""
        ...

    def probe_rows(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, generator: Random) -> tuple[Tensor, Tensor]:
        """How far some rows are from unquantised attention; see `svg.engine.repair.probe_rows`."""
        ...

    def repair(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, failed: Tensor) -> None:
        """Compute failed heads again without quantisation, in place; see `svg.engine.repair.repair`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Permutations, cluster sizes and block maps of one call; M maps serve B x H heads.

    Args:
        q_permutation: int32 or int64 [B, H, S], sorted -> original index of queries, or None for identity.
        k_permutation: the same for keys and values.
        q_sizes: int32 [M, Cq], tokens in each query cluster in sorted order; sums to S.
        k_sizes: int32 [M, Ck], tokens in each key cluster in sorted order; sums to S.
        block_map: bool [M, Cq, Ck], which blocks are computed.
        map_index: int32 [B, H], which of the M maps a head uses.
        visible_keys: int [M], keys that dense attention would see (all but padding text).
        kind: int8 [B, H], 0 spatial and 1 temporal, or None for methods without head kinds.
        pv_threshold: fp32 [H], see `block_sparse_attention_quantised`, or None; for 8-bit precisions only.
        tail: what stands for the blocks that are not computed, or None.
        key_multiple: see `block_sparse_attention_quantised`.
        share: float32 [M], density of each map where it is known already, or None.
        reused: whether an earlier call made all of it but the tail's means.
        one_map_per_head: whether each head of each sample has a map of its own, in order, so that heads can run in turn.
        sm_scale: softmax scale; None: D ** -0.5.
    """

    q_permutation: Tensor | None
    k_permutation: Tensor | None
    q_sizes: Tensor
    k_sizes: Tensor
    block_map: Tensor
    map_index: Tensor
    visible_keys: Tensor
    kind: Tensor | None = None
    pv_threshold: Tensor | None = None
    tail: Tail | None = None
    key_multiple: int = 1
    share: Tensor | None = None
    reused: bool = False
    one_map_per_head: bool = False
    sm_scale: float | None = None
    _density: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)  # once it was asked for

    def reused_with(self, means: tuple[Tensor, Tensor] | None) -> Plan:
        """Take the plan over for a later call, with that call's means. Its density stays known.

        Args:
            means: of that call's keys and values, [B, H, C, D] in their dtype; None where there is no tail.

        Returns:
            The plan.
        """
        plan = replace(
            self, tail=None if means is None or self.tail is None else Tail(*means, self.tail.bias), reused=True
        )
        plan._density.extend(self._density)
        return plan

    def for_heads(self, group: tuple[slice, slice]) -> Plan:
        """Slice the plan to one sample's group of heads. Requires one map per head.

        Args:
            group: of `head_groups`.

        Returns:
            A plan for tensors [1, heads, S, D].
        """
        sample, heads = group
        first = sample.start * self.map_index.shape[1] + heads.start
        maps = slice(first, first + heads.stop - heads.start)

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[group]

        return replace(
            self,
            q_permutation=part(self.q_permutation),
            k_permutation=part(self.k_permutation),
            q_sizes=self.q_sizes[maps],
            k_sizes=self.k_sizes[maps],
            block_map=self.block_map[maps],
            map_index=self.map_index[group] - first,
            visible_keys=self.visible_keys[maps],
            kind=part(self.kind),
            pv_threshold=None if self.pv_threshold is None else self.pv_threshold[heads],
            tail=None if self.tail is None else Tail(self.tail.k[group], self.tail.v[group], self.tail.bias[maps]),
            share=None if self.share is None else self.share[maps],
        )

    @property
    def blocks(self) -> BlockMap:
        """The map as kernels take it."""
        return BlockMap(
            self.block_map,
            self.q_sizes,
            self.k_sizes,
            self.map_index,
            self.q_permutation,
            self.k_permutation,
            self.tail,
            self.key_multiple,
        )

    execute = execute
    probe_rows = probe_rows
    repair = repair

    def density(self) -> Tensor:
        """Computed share of what dense attention computes, token-weighted.

        Returns:
            float32 [B, H]: sum of |Q_i| |K_j| over the computed blocks / (S * visible keys); a key of the tail counts as one.
        """
        if not self._density:
            share = self.share
            if share is None:
                share = map_shares(self.block_map, self.q_sizes, self.k_sizes, self.visible_keys, self.tail)
            self._density.append(share[self.map_index.long()])
        return self._density[0]


def map_shares(
    block_map: Tensor, q_sizes: Tensor, k_sizes: Tensor, visible_keys: Tensor, tail: Tail | None = None
) -> Tensor:
    """Density of each map of a plan, float32 [M]; arguments as `Plan` has them."""
    area = computed_pairs(block_map, q_sizes, k_sizes, 0 if tail is None else tail.bias.shape[2])
    return (area.double() / (q_sizes.sum(-1) * visible_keys)).float()
