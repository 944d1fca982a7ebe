"""Method settings: frozen, validated when built, turned into and out of plain dicts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

SELECTIONS = ("clusters", "tiles")
ORDERS = ("hilbert", "rowmajor")
PRECISIONS = ("native", "int8-fp8", "int8-fp8-acc16", "int8-fp16")
DENSE_PRECISIONS = {
    "sage2": ("auto", "int8-fp8", "int8-fp16", "int4-fp8", "int4-fp16"),
    "sage2++": ("int8-fp8-acc16", "int4-fp8-acc16"),
    "sage3": ("nvfp4",),
}
LAYER_PRECISIONS = ("native", *(name for names in DENSE_PRECISIONS.values() for name in names if name != "auto"))
GROUPS = ("token", "thread", "warp", "block")
DENSE_BACKENDS = ("auto", "cudnn", "flash", "efficient", "math")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every method has: which steps and layers stay dense, the seed, and how dense attention runs.

    Args:
        warmup_steps: share of the steps, from the first on, that stays dense, in [0, 1].
        warmup_layers: share of the layers, from the first on, that stays dense in every step, in [0, 1].
        seed: seed of the method's private generators, >= 0; the global generator is never touched.
        dense_backend: SDPA backend of dense attention: "auto" (best present), "cudnn", "flash", "efficient", "math".
        check_finite: raise FloatingPointError when q, k or v hold NaN or infinity.
        fused: elementwise work in single kernels, in dense and sparse calls alike: QK-norm with RoPE, and in Wan's and
            HunyuanVideo's single-stream blocks norm with modulation and gate with residual.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value has the wrong type.
    """

    method: ClassVar[str] = ""
    rivals: ClassVar[tuple[str, ...]] = ()  # settings of which one is given: a flag drops a preset's others
    # The setting that decides how much is computed, and the field that holds each head's own; None: there is none.
    budget_field: ClassVar[str | None] = None
    head_field: ClassVar[str | None] = None

    warmup_steps: float = 0.2
    warmup_layers: float = 0.03
    seed: int = 0
    dense_backend: str = "auto"
    check_finite: bool = True
    fused: bool = False

    def __post_init__(self):
        _share(self, "warmup_steps")
        _share(self, "warmup_layers")
        _integer(self, "seed", least=0)
        if self.dense_backend not in DENSE_BACKENDS:
            raise ValueError(f"dense_backend must be one of {', '.join(DENSE_BACKENDS)}, got {self.dense_backend!r}")
        for name in ("check_finite", "fused"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def is_warmup(self, step: int, num_steps: int, layer: int, num_layers: int) -> bool:
        """Whether a layer stays dense in a step.

        Args:
            step: index of the step, from 0.
            num_steps: steps of the run.
            layer: index of the layer, from 0.
            num_layers: attention layers of the transformer.

        Returns:
            True iff step < ceil(warmup_steps * num_steps) or layer < ceil(warmup_layers * num_layers).
        """
        return step < _count(self.warmup_steps, num_steps) or layer < _count(self.warmup_layers, num_layers)

    def head_budgets(self, layer: int) -> tuple[float, ...] | None:
        """Each head's own value of `budget_field`.

        Args:
            layer: index of the layer, from 0.

        Returns:
            One value a head, or None where all heads share the setting.
        """
        table = getattr(self, self.head_field) if self.head_field else None
        return None if table is None else table[layer]

    def is_dense(self, layer: int) -> bool:
        """Whether a layer's budgets ask for all of its map, which dense attention computes without planning."""
        budgets = self.head_budgets(layer)
        return self.method == "dense" or (budgets is not None and min(budgets) == 1)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dict, `method` first.

        Returns:
            What `config_from_dict` takes back.
        """
        return {"method": self.method, **asdict(self)}


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
class GuardedConfig(MethodConfig):
    """What every method that may compute in fewer bits has.

    Args:
        guard: compute a head again without quantisation, in the same call, where its sums are not finite or left the
            range of the quantised values, or its probed rows are over the tolerance; the report counts such heads.
        probe_every: steps from one probe of a layer to the next, >= 1; 0: never probe.
        tolerance: relative L2 error of a head's probed rows, > 0, above which it is computed again.
    """

    guard: bool = True
    probe_every: int = 10
    tolerance: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.guard, bool):
            raise TypeError(f"guard must be true or false, got {self.guard!r}")
        _integer(self, "probe_every", least=0)
        _number(self, "tolerance")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got {self.tolerance}")


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
        _share(self, "density", zero=False)
        _integer(self, "sample_rows", least=1)
        _integer(self, "block_size", least=1)
        _choice(self, "precision", PRECISIONS)
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
        refresh: calls of a layer that share one clustering and block map, >= 1; 1 clusters anew at every step.
        compensate: let every block that is not computed take part as one key, its mean, weighed by its size.
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
    compensate: bool = False
    precision: str = "native"
    head_top_p: tuple[tuple[float, ...], ...] | None = None
    tuned_for: TunedFor | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}")
        _share(self, "top_p", zero=False)
        _share(self, "min_k_ratio")
        _choice(self, "precision", PRECISIONS)
        if not isinstance(self.compensate, bool):
            raise TypeError(f"compensate must be true or false, got {self.compensate!r}")
        if self.compensate and self.precision != "native":
            raise ValueError(f'compensate needs precision "native", got {self.precision!r}; change one of the two')
        for name in ("num_q_clusters", "num_k_clusters", "first_iterations", "iterations", "refresh"):
            _integer(self, name, least=1)
        if self.budget is not None:
            _share(self, "budget", zero=False)
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
                _share(self, name, zero=False)
        _number(self, "simthresh")
        if not -1 <= self.simthresh < 1:
            raise ValueError(f"simthresh must be in [-1, 1), got {self.simthresh}")
        if not isinstance(self.attention_sink, bool):
            raise TypeError(f"attention_sink must be true or false, got {self.attention_sink!r}")
        _choice(self, "order", ORDERS)
        _choice(self, "precision", PRECISIONS)
        self._check_pv_threshold()
        self._check_thresholds()

    def _check_pv_threshold(self):
        if self.pv_threshold is None:
            return
        _number(self, "pv_threshold")
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


@dataclass(frozen=True, kw_only=True)
class Sage2Config(GuardedConfig):
    """SageAttention2: dense attention with Q K^T in INT8 (or INT4) and P V in FP8 (or 16 bits).

    Args:
        precision: "int8-fp8", "int8-fp16" (P V in 16 bits: the safe mode), "int4-fp8", "int4-fp16" (INT4 is an exact
            emulation for accuracy work, not faster), or "auto": int8-fp8 where the GPU has FP8, else int8-fp16.
        smooth_q: take the mean of every 128 queries off; None: with INT4 only.
        smooth_k: take K's mean over all tokens off.
        smooth_v: take V's channel means off (FP8 only).
        q_groups, k_groups: which tokens share a scale: "token", "thread", "warp" or "block".
        min_cosine: least cosine similarity of a layer's probed rows in (0, 1]; a layer below it takes the next safer
            precision (int8-fp16, then native) from the next step on. None: no such choice.
        layers: file of `svg adapt` with a precision for every layer, or None.

    Source: SageAttention2 (arXiv 2411.10958); choice by cosine similarity: SageAttention (arXiv 2410.02367).
    """

    method: ClassVar[str] = "sage2"

    warmup_steps: float = 0.0
    warmup_layers: float = 0.0
    precision: str = "auto"
    smooth_q: bool | None = None
    smooth_k: bool = True
    smooth_v: bool = False
    q_groups: str = "token"
    k_groups: str = "block"
    min_cosine: float | None = None
    layers: str | None = None

    def __post_init__(self):
        super().__post_init__()
        _choice(self, "precision", DENSE_PRECISIONS[self.method])
        _choice(self, "q_groups", GROUPS)
        _choice(self, "k_groups", GROUPS)
        for name in ("smooth_q", "smooth_k", "smooth_v"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "smooth_q" and value is None):
                raise TypeError(f"{name} must be true or false, got {value!r}")
        if self.smooth_v and self.precision.endswith("fp16"):
            raise ValueError(f"smooth_v needs FP8 values, got precision {self.precision!r}: leave one of them out")
        if self.min_cosine is not None:
            _share(self, "min_cosine", zero=False)
            if not (self.guard and self.probe_every):
                raise ValueError("min_cosine needs guard on and probe_every >= 1, which measure it")
        if self.layers is not None and not isinstance(self.layers, str):
            raise TypeError(f"layers must be a file's path as text, got {self.layers!r}")
        if self.layers is not None and self.min_cosine is not None:
            raise ValueError("one of layers and min_cosine must be given, got both: drop one")


@dataclass(frozen=True, kw_only=True)
class Sage2PlusConfig(Sage2Config):
    """SageAttention2++: as SageAttention2, FP8 products summed in fp16 over 64 keys, with V's range narrowed to 2.25.

    Twice the rate of sums in fp32 on compute capabilities 8.9 and 12; no faster on Hopper, which has the instruction.

    Args:
        precision: "int8-fp8-acc16", or "int4-fp8-acc16" (INT4 is an exact emulation for accuracy work, not faster).

    Source: SageAttention2++ (arXiv 2505.21136).
    """

    method: ClassVar[str] = "sage2++"

    precision: str = "int8-fp8-acc16"


@dataclass(frozen=True, kw_only=True)
class Sage3Config(Sage2Config):
    """SageAttention3: Q K^T and P V in NVFP4, and in 8 bits in the first and last steps.

    Native on compute capabilities 10 and 12; elsewhere an exact emulation for accuracy work, slower than 8 bits.

    Args:
        precision: "nvfp4".
        smooth_q, smooth_k: as in SageAttention2; None: on. smooth_v and the groups have no meaning in NVFP4.
        edge_steps: steps at each end of the run that take sage2's "auto" precision instead, >= 0.

    Source: SageAttention3 (arXiv 2505.11594).
    """

    method: ClassVar[str] = "sage3"

    precision: str = "nvfp4"
    edge_steps: int = 1

    def __post_init__(self):
        super().__post_init__()
        _integer(self, "edge_steps", least=0)
        for name in ("smooth_v", "q_groups", "k_groups"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} has no meaning in NVFP4, got {getattr(self, name)!r}: leave it out")


METHODS: dict[str, type[MethodConfig]] = {
    config.method: config
    for config in (DenseConfig, SVG1Config, SVG2Config, SpargeConfig, Sage2Config, Sage2PlusConfig, Sage3Config)
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


def _count(share: float, total: int) -> int:
    # 0.2 * 15 is 3.0000000000000004 in binary: it must be 3 items, not 4.
    return math.ceil(share * total - 1e-9)


def _share(config: MethodConfig, name: str, zero: bool = True) -> None:
    _number(config, name)
    value = getattr(config, name)
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1], got {value}")


def _number(config: MethodConfig, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _choice(config: MethodConfig, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


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


def _integer(config: MethodConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
