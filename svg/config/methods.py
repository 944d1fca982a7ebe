"""Method settings: frozen, validated when built, turned into and out of plain dicts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .base import GuardedConfig, MethodConfig, choice, integer, number, share
from .sage import Sage2Config, Sage2PlusConfig, Sage3Config

SELECTIONS = ("clusters", "tiles")
ORDERS = ("hilbert", "rowmajor")
QUERY_ORDERS = ("clusters", "hilbert")
GRANULES = (8, 16, 32, 64)
GRANULE_ROWS = (64, 128)
POOLS = (1, 2, 4, 8, 16)
PRECISIONS = ("native", "int8-fp8", "int8-fp8-acc16", "int8-fp16")


@dataclass(frozen=True, kw_only=True)
class DenseConfig(MethodConfig):
    """Dense attention on the best backend present: the baseline, and what warm-up runs."""

    method: ClassVar[str] = "dense"


@dataclass(frozen=True, kw_only=True)
class TunedFor:
    """What settings were tuned on; they are refused elsewhere.

    Args:
        model: hub id, directory or name of the model.
        fingerprint: of its weights, or None for a hub id.
        tokens: frames, height and width of the latent video grid, in tokens.
        device: name of the GPU, or "cpu".

    Raises:
        TypeError: a value has the wrong type.
    """

    model: str
    fingerprint: str | None
    tokens: tuple[int, int, int]
    device: str

    def __post_init__(self):
        tokens = tuple(self.tokens) if isinstance(self.tokens, (list, tuple)) else ()
        if len(tokens) != 3 or any(isinstance(n, bool) or not isinstance(n, int) for n in tokens):
            raise TypeError(f"tokens must be three integers (frames, height, width), got {self.tokens!r}")
        object.__setattr__(self, "tokens", tokens)
        for name in ("model", "device"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class SVG1Config(GuardedConfig):
    """Sparse VideoGen: every head is spatial or temporal, decided online from sampled query rows.

    Args:
        density: target for the computed share of the S x S map, everything counted, in (0, 1].
        sample_rows: video query rows profiled per call, >= 1.
        block_size: keys in a block of the map, >= 1; a block holds twice as many queries.
        precision: of the sparse attention: "native" (the inputs'), "int8-fp8" (Q K^T in INT8, P V in FP8; compute
            capability 8.9), "int8-fp8-acc16" (the same, summed in fp16), or "int8-fp16" (P V in 16 bits: the safe mode). Dense attention stays native.
        head_density: each head's own density, [layers][heads], or None; a layer whose heads all have 1 runs dense.
        tuned_for: what the settings were tuned on and are refused elsewhere, or None.

    Source: Sparse VideoGen (arXiv 2502.01776), sections 3 and 4.
    """

    method: ClassVar[str] = "svg1"
    budget_field: ClassVar[str | None] = "density"
    head_field: ClassVar[str | None] = "head_density"

    density: float = 0.25
    sample_rows: int = 64
    block_size: int = 64
    precision: str = "native"
    head_density: tuple[tuple[float, ...], ...] | None = None
    tuned_for: TunedFor | None = None

    def __post_init__(self):
        super().__post_init__()
        share(self, "density", zero=False)
        integer(self, "sample_rows", least=1)
        integer(self, "block_size", least=1)
        choice(self, "precision", PRECISIONS)
        _head_table(self)


@dataclass(frozen=True, kw_only=True)
class SVG2Config(GuardedConfig):
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
            share of their spread, > 0 (see `svg.methods.svg2.reuse`), or None: however far they are.
        compensate: let every block that is not computed take part as one key, its mean, weighed by its size; these keys
            stay in the inputs' precision.
        precision: of the sparse attention: "native" (the inputs'), "int8-fp8" (Q K^T in INT8, P V in FP8; compute
            capability 8.9), "int8-fp8-acc16" (the same, summed in fp16), or "int8-fp16" (P V in 16 bits: the safe mode). Dense attention stays native.
        head_top_p: each head's own top_p, [layers][heads], or None; a layer whose heads all have 1 runs dense.
        tuned_for: what the settings were tuned on and are refused elsewhere, or None.

    Source: Sparse VideoGen2 (arXiv 2505.18875), sections 3 and 4.
    """

    method: ClassVar[str] = "svg2"
    budget_field: ClassVar[str | None] = "top_p"
    head_field: ClassVar[str | None] = "head_top_p"

    top_p: float = 0.9
    num_q_clusters: int = 300
    num_k_clusters: int = 1000
    min_k_ratio: float = 0.1
    first_iterations: int = 50
    iterations: int = 2
    budget: float | None = None
    selection: str = "clusters"
    refresh: int = 1
    max_drift: float | None = None
    compensate: bool = False
    precision: str = "native"
    head_top_p: tuple[tuple[float, ...], ...] | None = None
    tuned_for: TunedFor | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}")
        share(self, "top_p", zero=False)
        share(self, "min_k_ratio")
        choice(self, "precision", PRECISIONS)
        if not isinstance(self.compensate, bool):
            raise TypeError(f"compensate must be true or false, got {self.compensate!r}")
        for name in ("num_q_clusters", "num_k_clusters", "first_iterations", "iterations", "refresh"):
            integer(self, name, least=1)
        if self.budget is not None:
            share(self, "budget", zero=False)
        check_max_drift(self)
        _head_table(self)


@dataclass(frozen=True, kw_only=True)
class NearConfig(GuardedConfig):
    """Near-lossless: small groups of keys are computed exactly where their means would err most; means are all the rest.

    Keys are ordered by k-means and cut into granules of a fixed size. For every group of query rows the error that each
    granule's mean would leave is estimated, and one threshold for all heads of a layer decides what is computed.

    Args:
        budget: computed share of the S x S map, the means and the text counted, in (0, 1]; 1 is dense.
        granule: keys that are computed, or replaced by their mean, together: 8, 16, 32 or 64.
        rows: query rows that share a list of granules: 64 or 128.
        floor: share of the mean number of exact granules that every group of rows gets at least, in [0, 1].
        pool: neighbouring query rows whose mean stands for them in the estimate: 1, 2, 4, 8 or 16.
        cluster_tokens: keys of a k-means cluster on average, >= 1; inside a cluster keys follow a curve through the video.
        query_order: what puts queries into groups: "clusters" (k-means) or "hilbert" (a curve through the video, free).
        query_cluster_tokens: queries of a k-means cluster on average, >= 1.
        first_iterations: k-means iterations on a layer's first sparse call of a run, >= 1.
        iterations: k-means iterations on later calls, from the cached centroids, >= 1.
        refresh: calls of a layer that share orders and lists at most, >= 1; means are always fresh.
        max_drift: with refresh, choose anew also where queries or keys would be further from those of the choice, as a
            share of their spread, > 0, or None: however far they are.
        precision: of the sparse attention: "native" (the inputs'), "int8-fp8" (Q K^T in INT8, P V in FP8; compute
            capability 8.9), or "int8-fp16" (P V in 16 bits: the safe mode). Dense attention stays native.
        head_budget: each head's own budget, [layers][heads], or None; a layer whose heads all have 1 runs dense.
        tuned_for: what the settings were tuned on and are refused elsewhere, or None.

    Source: semantic order from Sparse VideoGen2 (arXiv 2505.18875), means for what is left out and selection by their
        error from SVG-EAR (arXiv 2603.08982); granules, pooled queries and the threshold of a layer are this project's.
    """

    method: ClassVar[str] = "near"
    budget_field: ClassVar[str | None] = "budget"
    head_field: ClassVar[str | None] = "head_budget"

    budget: float = 0.25
    granule: int = 16
    rows: int = 128
    floor: float = 0.25
    pool: int = 4
    cluster_tokens: int = 64
    query_order: str = "clusters"
    query_cluster_tokens: int = 256
    first_iterations: int = 20
    iterations: int = 1
    refresh: int = 1
    max_drift: float | None = None
    precision: str = "native"
    head_budget: tuple[tuple[float, ...], ...] | None = None
    tuned_for: TunedFor | None = None

    def __post_init__(self):
        super().__post_init__()
        share(self, "budget", zero=False)
        share(self, "floor")
        choice(self, "granule", GRANULES)
        choice(self, "rows", GRANULE_ROWS)
        choice(self, "pool", POOLS)
        choice(self, "query_order", QUERY_ORDERS)
        choice(self, "precision", PRECISIONS)
        for name in ("cluster_tokens", "query_cluster_tokens", "first_iterations", "iterations", "refresh"):
            integer(self, name, least=1)
        if self.budget <= 1 / self.granule:
            raise ValueError(
                f"budget must be above 1 / granule = {1 / self.granule:g}, the share of the means, which are always "
                f"computed, got {self.budget}: raise it, or take a larger granule"
            )
        check_max_drift(self)
        _head_table(self)


@dataclass(frozen=True, kw_only=True)
class SpargeConfig(GuardedConfig):
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
        precision: of the sparse attention: "native" (the inputs'), "int8-fp8" (Q K^T in INT8, P V in FP8; compute
            capability 8.9), "int8-fp8-acc16" (the same, summed in fp16), or "int8-fp16" (P V in 16 bits: the safe mode). Dense attention stays native.

    Source: SpargeAttn (arXiv 2502.18137), section 3.
    """

    method: ClassVar[str] = "sparge"
    rivals: ClassVar[tuple[str, ...]] = ("topk", "cdf", "thresholds")

    topk: float | None = None
    cdf: float | None = None
    thresholds: str | None = None
    simthresh: float = -0.1
    pv_threshold: float | None = None
    attention_sink: bool = False
    order: str = "hilbert"
    precision: str = "native"

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in self.rivals if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"one of {', '.join(self.rivals)} must be given, got {' and '.join(given)}: drop the others")
        if not given:
            object.__setattr__(self, "topk", 0.5)  # the resolved setting, so that reports show it
        for name in ("topk", "cdf"):
            if getattr(self, name) is not None:
                share(self, name, zero=False)
        number(self, "simthresh")
        if not -1 <= self.simthresh < 1:
            raise ValueError(f"simthresh must be in [-1, 1), got {self.simthresh}")
        if not isinstance(self.attention_sink, bool):
            raise TypeError(f"attention_sink must be true or false, got {self.attention_sink!r}")
        choice(self, "order", ORDERS)
        choice(self, "precision", PRECISIONS)
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
            raise TypeError(f"thresholds must be a file's path as text, got {self.thresholds!r}")
        for name in ("simthresh", "pv_threshold"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} must be left out with thresholds, which have their own, got {getattr(self, name)}")


METHODS: dict[str, type[MethodConfig]] = {
    config.method: config
    for config in (DenseConfig, NearConfig, SVG1Config, SVG2Config, SpargeConfig, Sage2Config, Sage2PlusConfig, Sage3Config)
}


def config_from_dict(settings: dict[str, Any]) -> MethodConfig:
    """Build a method's config from a plain dict such as `to_dict` gives or a YAML file holds.

    Args:
        settings: "method" (one of METHODS) and any of that method's fields.

    Returns:
        The config.

    Raises:
        ValueError: the method or a key is unknown, or a value is outside its range.
        TypeError: a value has the wrong type.
    """
    values = dict(settings)
    method = values.pop("method", None)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    choices = [field.name for field in fields(METHODS[method])]
    for key in values:
        if key not in choices:
            raise ValueError(f"unknown key {key!r} for method {method}; choose from {', '.join(choices)}")
    return METHODS[method](**values)


def check_max_drift(config: MethodConfig) -> None:
    """Raise unless max_drift is none, or a positive number beside a refresh that it can end."""
    if config.max_drift is None:
        return
    number(config, "max_drift")
    if not config.max_drift > 0:
        raise ValueError(f"max_drift must be > 0, got {config.max_drift}")
    if config.refresh == 1:
        raise ValueError("max_drift must come with refresh > 1, got 1, which clusters anew at every step: raise it")


def _head_table(config: MethodConfig) -> None:
    """Check per-head budgets and what they are tuned for; lists become tuples, a mapping becomes TunedFor."""
    table, name = getattr(config, config.head_field), config.head_field
    if isinstance(config.tuned_for, dict):
        object.__setattr__(config, "tuned_for", _tuned_for(config.tuned_for))
    elif not isinstance(config.tuned_for, (TunedFor, type(None))):
        raise TypeError(f"tuned_for must be keys and values, or none, got {config.tuned_for!r}")
    if table is None:
        return
    if not isinstance(table, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in table):
        raise TypeError(f"{name} must be [layers][heads], got {table!r}")
    if not table or not table[0] or len({len(row) for row in table}) > 1:
        raise ValueError(f"{name} must have the same heads in every layer, got {[len(row) for row in table]}")
    for layer, row in enumerate(table):
        for head, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must hold numbers, got {value!r} in layer {layer}, head {head}")
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value} in layer {layer}, head {head}")
    object.__setattr__(config, name, tuple(tuple(float(value) for value in row) for row in table))


def _tuned_for(values: dict[str, Any]) -> TunedFor:
    choices = [field.name for field in fields(TunedFor)]
    if set(values) != set(choices):
        raise ValueError(f"tuned_for must have the keys {', '.join(choices)}, got {', '.join(map(str, values))}")
    return TunedFor(**values)
