"""Settings of SpargeAttn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...config.base import ORDERS, SparseConfig, choice, number, setting, share
from ...documents import shown


@dataclass(frozen=True, kw_only=True)
class SpargeConfig(SparseConfig):
    """SpargeAttn: blocks of neighbouring tokens, and for each block of queries the key blocks that their means predict.

    Exactly one of topk, cdf and thresholds decides how much is kept; without any, topk is 0.5.

    Args:
        topk: share of the video's key blocks kept by a query block, in (0, 1].
        cdf: predicted attention mass that the kept key blocks may hold together, in (0, 1].
        thresholds: file of `svg sparge-tune` with simthresh, cdf and pv_threshold of every head.
        simthresh: a block whose self-similarity is not above it is computed whole, in [-1, 1); below 0: none is.
        pv_threshold: skip P V of a tile whose scores are all this far below the running maximum, in powers of two, >= 0;
            8-bit precisions only. None: never.
        attention_sink: always keep the first key block.
        order: in which the video's tokens are cut into blocks: "hilbert" (along a curve in space and time), "rowmajor".

    Source: SpargeAttn (arXiv 2502.18137), section 3.
    """

    method: ClassVar[str] = "sparge"
    rivals: ClassVar[tuple[str, ...]] = ("topk", "cdf", "thresholds")

    topk: float | None = setting(
        None,
        flag=float,
        help="share of the key blocks kept per query block, in (0, 1].",
        sweep="shares of key blocks",
    )
    cdf: float | None = setting(None, flag=float, help="predicted mass of the kept key blocks, in (0, 1].")
    thresholds: str | None = setting(None, flag=Path, help="file of `svg sparge-tune`, thresholds of every head.")
    simthresh: float = -0.1
    pv_threshold: float | None = None
    attention_sink: bool = False
    order: str = "hilbert"

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in self.rivals if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"one of {', '.join(self.rivals)} must be given, got {' and '.join(given)}: drop the others"
            )
        if not given:
            object.__setattr__(self, "topk", 0.5)  # the resolved setting, so that reports show it
        for name in ("topk", "cdf"):
            if getattr(self, name) is not None:
                share(self, name, zero=False)
        number(self, "simthresh")
        if not -1 <= self.simthresh < 1:
            raise ValueError(f"simthresh must be in [-1, 1), got {self.simthresh}")
        if not isinstance(self.attention_sink, bool):
            raise TypeError(f"attention_sink must be true or false, got {shown(self.attention_sink)}")
        choice(self, "order", ORDERS)
        self._check_pv_threshold()
        self._check_thresholds()

    def _check_pv_threshold(self):
        if self.pv_threshold is None:
            return
        number(self, "pv_threshold")
        if not self.pv_threshold >= 0:
            raise ValueError(f"pv_threshold must be >= 0, got {self.pv_threshold}")
        if self.precision == "native":
            raise ValueError(
                "pv_threshold must come with precision int8-fp8 or int8-fp16, got native: that kernel has no such filter"
            )

    def _check_thresholds(self):
        if self.thresholds is None:
            return
        if not isinstance(self.thresholds, str):
            raise TypeError(f"thresholds must be a file's path as text, got {shown(self.thresholds)}")
        for name in ("simthresh", "pv_threshold"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} must be left out with thresholds, which have their own, got {shown(getattr(self, name))}"
                )
