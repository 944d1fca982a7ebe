"""Method settings: frozen, validated when built, turned into and out of plain dicts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

SELECTIONS = ("clusters", "tiles")
PRECISIONS = ("native", "int8-fp8", "int8-fp16")
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
        fused: QK-norm and RoPE in one kernel, in dense and sparse calls alike.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value has the wrong type.
    """

    method: ClassVar[str] = ""

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
class SVG1Config(MethodConfig):
    """Sparse VideoGen: every head is spatial or temporal, decided online from sampled query rows.

    Args:
        density: target for the computed share of the S x S map, everything counted, in (0, 1].
        sample_rows: video query rows profiled per call, >= 1.
        block_size: tokens in a block of the map, >= 1.
        precision: of the sparse attention: "native" (the inputs'), "int8-fp8" (Q K^T in INT8, P V in FP8; compute
            capability 8.9), or "int8-fp16" (P V in 16 bits: the safe mode). Dense attention stays native.

    Source: Sparse VideoGen (arXiv 2502.01776), sections 3 and 4.
    """

    method: ClassVar[str] = "svg1"

    density: float = 0.25
    sample_rows: int = 64
    block_size: int = 64
    precision: str = "native"

    def __post_init__(self):
        super().__post_init__()
        _share(self, "density", zero=False)
        _integer(self, "sample_rows", least=1)
        _integer(self, "block_size", least=1)
        _choice(self, "precision", PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class SVG2Config(MethodConfig):
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
        precision: of the sparse attention: "native" (the inputs'), "int8-fp8" (Q K^T in INT8, P V in FP8; compute
            capability 8.9), or "int8-fp16" (P V in 16 bits: the safe mode). Dense attention stays native.

    Source: Sparse VideoGen2 (arXiv 2505.18875), sections 3 and 4.
    """

    method: ClassVar[str] = "svg2"

    top_p: float = 0.9
    num_q_clusters: int = 300
    num_k_clusters: int = 1000
    min_k_ratio: float = 0.1
    first_iterations: int = 50
    iterations: int = 2
    budget: float | None = None
    selection: str = "clusters"
    precision: str = "native"

    def __post_init__(self):
        super().__post_init__()
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}")
        _share(self, "top_p", zero=False)
        _share(self, "min_k_ratio")
        _choice(self, "precision", PRECISIONS)
        for name in ("num_q_clusters", "num_k_clusters", "first_iterations", "iterations"):
            _integer(self, name, least=1)
        if self.budget is not None:
            _share(self, "budget", zero=False)


METHODS: dict[str, type[MethodConfig]] = {config.method: config for config in (DenseConfig, SVG1Config, SVG2Config)}


def config_from_dict(settings: dict[str, Any]) -> MethodConfig:
    """Build a method's config from a plain dict such as `to_dict` gives or a YAML file holds.

    Args:
        settings: "method" (one of dense, svg1, svg2) and any of that method's fields.

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
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1], got {value}")


def _choice(config: MethodConfig, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _integer(config: MethodConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
