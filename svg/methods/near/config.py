"""Settings of near."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar

from ...config.base import FEW_STEPS, SparseConfig, check_max_drift, choice, count, integer, setting, share
from ...config.tuned import TunedFor, check_head_table

QUERY_ORDERS = ("clusters", "hilbert")
GRANULES = (8, 16, 32, 64)
GRANULE_ROWS = (16, 32, 64, 128)
POOLS = (1, 2, 4, 8)
COARSE = 2.0  # ratio of one coarse budget to the next, beyond the means
DECAY = 0.15  # of the steps, in which the share that goes to early ones falls by a factor e


@dataclass(frozen=True, kw_only=True)
class NearConfig(SparseConfig):
    """Near-lossless: small groups of keys are computed exactly where their means would err most; means are all the rest.

    Keys are ordered by k-means and cut into granules of a fixed size. For every group of query rows the error that each
    granule's mean would leave is estimated, and one threshold for all heads of a layer decides what is computed.

    Args:
        budget: computed share of the S x S map, the means and the text counted, in (0, 1]; 1 is dense.
        early: share of what is computed exactly that a run without dense steps gives to its steps by how early they are, in
            [0, 1): it falls by a factor e every 15 % of the steps. Dense steps take theirs away, and of the others the mean
            stays `budget`; steps that share lists (`refresh`) have their mean. In eight steps and fewer all have the same: there
            the last ones change the video as much as the first.
        granule: keys that are computed, or replaced by their mean, together: 8, 16, 32 or 64.
        rows: query rows that share a list of granules: 16, 32, 64 or 128; fewer than 128 run on a slower kernel, and are for
            short videos.
        floor: share of the mean number of exact granules that every group of rows gets at least, in [0, 1].
        pool: neighbouring query rows whose mean stands for them in the estimate: 1, 2, 4 or 8.
        cluster_tokens: keys of a k-means cluster on average, >= 1; inside a cluster keys follow a curve through the video.
        query_order: what puts queries into groups: "clusters" (k-means) or "hilbert" (a curve through the video, free).
        query_cluster_tokens: queries of a k-means cluster on average, >= 1.
        residual: share of what the last dense step's sparse attention loses that is added to sparse steps, in [0, 1],
            falling as `svg.engine.residual` has it; memory of a tensor of q's shape in 8 bits for every layer and branch: 3 GiB
            for Wan 2.1 1.3B at 480p, 30 GiB for 14B at 720p. 0: none.
        first_iterations: k-means iterations on a layer's first sparse call of a run, >= 1.
        iterations: k-means iterations on later calls, from the cached centroids, >= 1.
        share_branches: whether the guidance branches of a step share the orders and lists of the first one. What is left
            out is then left out of all, and guidance, which multiplies what differs between branches, leaves it alone.
            Not where text shares the sequence and is masked, where the branches' layouts differ, or where each branch has a
            process of its own. Between the branches
            orders and lists of all layers are held: 3 to 5 GB for Wan 2.1 14B at 720p (75,600 tokens, granules of 32).
        refresh: calls of a layer that share orders and lists at most, >= 1; means are always fresh.
        max_drift: with refresh, choose anew also where queries or keys would be further from those of the choice, as a
            share of their spread, > 0, or None: however far they are.
        head_budget: each head's own budget, [layers][heads], or None; a layer whose heads all have 1 runs dense, and heads of a
            layer that all have the same share one threshold, as without a table.
        tuned_for: what the settings were tuned on and are refused elsewhere, or None.

    Source: semantic order from Sparse VideoGen2 (arXiv 2505.18875), means for what is left out and selection by their
        error from SVG-EAR (arXiv 2603.08982); granules, pooled queries and the threshold of a layer are this project's.
    """

    method: ClassVar[str] = "near"
    budget_field: ClassVar[str | None] = "budget"
    head_field: ClassVar[str | None] = "head_budget"
    levels: ClassVar[tuple[float, ...]] = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
    probed_level: ClassVar[float] = 0.1  # near what long videos end with
    # Where little is computed, means are much of it, of which coarser granules have fewer, or dense steps, cheaper in 8 bits.
    tuned_too: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"granule": (8, 16, 32, 64), "warmup_precision": ("native", "int8-fp8")}
    )
    tuned_by: ClassVar[str] = "one"  # its threshold gives heads and layers what they need in this very call

    budget: float = setting(0.25, flag=float, help="upper bound on density, in (0, 1].", sweep="upper bounds")
    early: float = 0.75
    granule: int = 16
    rows: int = 128
    floor: float = 0.25
    pool: int = 4
    cluster_tokens: int = 64
    query_order: str = "clusters"
    query_cluster_tokens: int = 256
    residual: float = 0.0
    first_iterations: int = 20
    iterations: int = 1
    share_branches: bool = True
    refresh: int = 1
    max_drift: float | None = None
    head_budget: tuple[tuple[float, ...], ...] | None = None
    tuned_for: TunedFor | None = None

    def __post_init__(self):
        super().__post_init__()
        share(self, "budget", zero=False)
        share(self, "floor")
        share(self, "early")
        share(self, "residual")
        choice(self, "granule", GRANULES)
        choice(self, "rows", GRANULE_ROWS)
        choice(self, "pool", POOLS)
        choice(self, "query_order", QUERY_ORDERS)
        for name in ("cluster_tokens", "query_cluster_tokens", "first_iterations", "iterations", "refresh"):
            integer(self, name, least=1)
        if self.early == 1:
            raise ValueError(
                "early must be below 1, or nothing is left for the last steps, got 1: 0.75 is the usual choice"
            )
        if self.budget <= 1 / self.granule:
            raise ValueError(
                f"budget must be above 1 / granule = {1 / self.granule:g}, the share of the means, which are always "
                f"computed, got {self.budget:g}: raise the budget, or take a larger granule"
            )
        check_max_drift(self)
        check_head_table(self)

    @property
    def always_computed(self) -> float:
        """The means' share."""
        return 1 / self.granule

    def for_branches_apart(self) -> NearConfig:
        """These settings where each guidance branch runs in a process of its own, and chooses for itself."""
        return replace(self, share_branches=False)

    def for_warm_up(self) -> NearConfig:
        table = self.head_budget
        if table is not None:  # whether a layer is sparse decides what is compiled, budgets do not
            table = ((1.0 if all(min(row) == 1 for row in table) else 0.5,),)
        return replace(self, budget=1.0, early=0.0, warmup_steps=0.0, head_budget=table)

    def pairs_in_any_case(self, video: int, total: int) -> int:
        """Pairs of a head's map that are computed whatever the budget: those with means, with text, and with a last granule.

        Args:
            video: tokens of the video.
            total: tokens in all.
        """
        return total**2 - video**2 + video * (math.ceil(video / self.granule) + video % self.granule)

    def at_step(self, step: int, num_steps: int, tokens: tuple[int, int] | None = None) -> NearConfig:
        """The settings with the budgets of one step: more at first, where errors grow longest.

        Args:
            step: index of the step, from 0.
            num_steps: steps of the run, the dense ones counted.
            tokens: of the video, and in all; None: a long video without text.

        Returns:
            Settings that do not depend on the step any more.
        """
        dense = count(self.warmup_steps, num_steps)
        if self.early == 0 or step < dense or num_steps <= FEW_STEPS:
            return self
        fixed = self.always_computed if tokens is None else self.pairs_in_any_case(*tokens) / tokens[1] ** 2
        return _scaled(self, dense, num_steps, step, fixed)

    def of_layer(self, layer: int) -> NearConfig:
        """The settings of one layer: where its heads have one budget, they share a threshold as without a table.

        Args:
            layer: index of the layer, from 0.
        """
        return self if self.head_budget is None else _of_layer(self, self.head_budget[layer])

    def rounded_up(self, layer: int) -> NearConfig:
        """One layer's settings in one step with a coarser budget: those of other steps and layers are often the same.

        Args:
            layer: index of the layer, from 0.

        Returns:
            Settings without budgets of single heads, whose budget is that of the heads' mean or a little more.
        """
        return _rounded_up(self, self.head_budgets(layer))


@lru_cache(maxsize=256)
def _of_layer(config: NearConfig, own: tuple[float, ...]) -> NearConfig:
    one = len(set(own)) == 1
    return replace(config, budget=own[0], head_budget=None, tuned_for=None) if one else config


@lru_cache(maxsize=256)
def _rounded_up(config: NearConfig, own: tuple[float, ...] | None) -> NearConfig:
    means = 1 / config.granule
    budget = config.budget
    if own is not None:  # a head that computes everything lists what the means would have been, too
        budget = sum(one if one < 1 else 1 + 2 * means for one in own) / len(own) + 1e-3
    steps = math.ceil(math.log(max(budget - means, 1e-3), COARSE) - 1e-9)
    return replace(config, budget=min(1.0, means + COARSE**steps), head_budget=None, tuned_for=None, early=0.0)


@lru_cache(maxsize=256)
def _scaled(config: NearConfig, dense: int, num_steps: int, step: int, fixed: float) -> NearConfig:
    """The budgets of a sparse step, whose share beyond what is computed in any case is multiplied."""
    most = (1 - fixed) / (config.budget - fixed) if fixed < config.budget < 1 else 1.0
    first = (step - dense) // config.refresh * config.refresh  # of the steps that share its lists
    shared = _factors(config.early, dense, num_steps, most)[first : first + config.refresh]
    factor = sum(shared) / len(shared)
    table = config.head_budget
    if table is not None:
        table = tuple(tuple(_exact(value, factor, fixed) for value in row) for row in table)
    return replace(config, budget=_exact(config.budget, factor, fixed), head_budget=table, early=0.0)


@lru_cache(maxsize=64)
def _factors(early: float, dense: int, num_steps: int, most: float) -> list[float]:
    """How much of the mean each sparse step gets: falling, at most so much."""
    falls = [math.exp(-step / (DECAY * num_steps)) for step in range(num_steps)]
    mean = sum(falls) / num_steps
    weights = [1 - early + early * fall / mean for fall in falls[dense:]]
    full, scale = 0, len(weights) / sum(weights)
    while full < len(weights) - 1 and scale * weights[full] > most:  # steps that compute everything
        full += 1
        scale = (len(weights) - full * most) / sum(weights[full:])
    return [most] * full + [scale * weight for weight in weights[full:]]


def _exact(value: float, factor: float, fixed: float) -> float:
    return value if value >= 1 or value <= fixed else min(1.0, fixed + (value - fixed) * factor)
