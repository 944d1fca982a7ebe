"""Settings of Sparse VideoGen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config.base import SparseConfig, integer, setting, share
from ...config.tuned import TunedFor, check_head_table


@dataclass(frozen=True, kw_only=True)
class SVG1Config(SparseConfig):
    """Sparse VideoGen: every head is spatial or temporal, decided online from sampled query rows.

    Args:
        density: target for the computed share of the S x S map, everything counted, in (0, 1].
        sample_rows: video query rows profiled per call, >= 1.
        block_size: keys in a block of the map, >= 1; a block holds twice as many queries.
        head_density: each head's own density, [layers][heads], or None; a layer whose heads all have 1 runs dense.
        tuned_for: what the settings were tuned on and are refused elsewhere, or None.

    Source: Sparse VideoGen (arXiv 2502.01776), sections 3 and 4.
    """

    method: ClassVar[str] = "svg1"
    budget_field: ClassVar[str | None] = "density"
    head_field: ClassVar[str | None] = "head_density"
    levels: ClassVar[tuple[float, ...]] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
    probed_level: ClassVar[float] = 0.3

    density: float = setting(
        0.25, flag=float, help="share of the attention map to compute, in (0, 1].", sweep="densities"
    )
    sample_rows: int = 64
    block_size: int = 64
    head_density: tuple[tuple[float, ...], ...] | None = None
    tuned_for: TunedFor | None = None

    def __post_init__(self):
        super().__post_init__()
        share(self, "density", zero=False)
        integer(self, "sample_rows", least=1)
        integer(self, "block_size", least=1)
        check_head_table(self)
