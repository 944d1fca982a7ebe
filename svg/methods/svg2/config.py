"""Settings of Sparse VideoGen2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...config.base import SparseConfig, check_max_drift, choice, integer, setting, share
from ...config.tuned import TunedFor, check_head_table
from ...documents import shown

SELECTIONS = ("clusters", "tiles")


@dataclass(frozen=True, kw_only=True)
class SVG2Config(SparseConfig):
    """Sparse VideoGen2: queries and keys are clustered; a query cluster keeps the key clusters holding top_p of its mass.

    Args:
        top_p: attention mass kept per query cluster, in (0, 1].
        num_q_clusters: query clusters a head, >= 1 (never more than there are video tokens).
        num_k_clusters: key clusters a head, >= 1 (never more than there are video tokens).
        min_k_ratio: least share of the key clusters kept per query cluster, in [0, 1].
        first_iterations: k-means iterations on a layer's first sparse call of a run, >= 1.
        iterations: k-means iterations on later calls, from the cached centroids, >= 1.
        budget: upper bound on density in (0, 1], or None.
        selection: what the block map selects: "clusters" (the paper's), or "tiles", equal stretches of the tokens in
            cluster order, which attention computes without padding.
        refresh: calls of a layer that share one clustering and block map at most, >= 1; 1 clusters anew at every step.
        max_drift: with refresh, cluster anew also where queries or keys would be further from those of the clustering, as a
            share of their spread, > 0 (see `svg.methods.reuse`), or None: however far they are.
        compensate: approximate every skipped block by one key: the block's mean, weighted by its number of keys. These
            keys stay in the inputs' precision.
        head_top_p: each head's own top_p, [layers][heads], or None; a layer whose heads all have 1 runs dense.
        tuned_for: what the settings were tuned on and are refused elsewhere, or None.

    Source: Sparse VideoGen2 (arXiv 2505.18875), sections 3 and 4.
    """

    method: ClassVar[str] = "svg2"
    budget_field: ClassVar[str | None] = "top_p"
    head_field: ClassVar[str | None] = "head_top_p"
    levels: ClassVar[tuple[float, ...]] = (0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.87, 0.92, 0.96, 0.985, 1.0)
    probed_level: ClassVar[float] = 0.6

    top_p: float = setting(0.9, flag=float, help="attention mass kept per query cluster, in (0, 1].")
    num_q_clusters: int = setting(300, flag=int, help="query clusters a head.")
    num_k_clusters: int = setting(1000, flag=int, help="key clusters a head.")
    min_k_ratio: float = 0.1
    first_iterations: int = 50
    iterations: int = 2
    budget: float | None = setting(None, flag=float, help="upper bound on density, in (0, 1].", sweep="upper bounds")
    selection: str = "clusters"
    refresh: int = 1
    max_drift: float | None = None
    compensate: bool = False
    head_top_p: tuple[tuple[float, ...], ...] | None = None
    tuned_for: TunedFor | None = None

    def __post_init__(self):
        super().__post_init__()
        choice(self, "selection", SELECTIONS)
        share(self, "top_p", zero=False)
        share(self, "min_k_ratio")
        if not isinstance(self.compensate, bool):
            raise TypeError(f"compensate must be true or false, got {shown(self.compensate)}")
        for name in ("num_q_clusters", "num_k_clusters", "first_iterations", "iterations", "refresh"):
            integer(self, name, least=1)
        if self.budget is not None:
            share(self, "budget", zero=False)
        check_max_drift(self)
        check_head_table(self)

    def for_warm_up(self) -> SVG2Config:
        return replace(self, top_p=1.0, head_top_p=None if self.head_top_p is None else ((1.0,),))
