"""Settings of SageAttention 2, 2++ and 3: dense attention in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config.base import GuardedConfig, choice, integer, share
from ...documents import shown

DENSE_PRECISIONS = {
    "sage2": ("auto", "int8-fp8", "int8-fp16", "int4-fp8", "int4-fp16"),
    "sage2++": ("int8-fp8-acc16", "int4-fp8-acc16"),
    "sage3": ("nvfp4",),
}
LAYER_PRECISIONS = ("native", *(name for names in DENSE_PRECISIONS.values() for name in names if name != "auto"))
GROUPS = ("token", "thread", "warp", "block")


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
    for_any_model: ClassVar[bool] = True

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
        choice(self, "precision", DENSE_PRECISIONS[self.method])
        choice(self, "q_groups", GROUPS)
        choice(self, "k_groups", GROUPS)
        for name in ("smooth_q", "smooth_k", "smooth_v"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "smooth_q" and value is None):
                raise TypeError(f"{name} must be true or false, got {shown(value)}")
        if self.smooth_v and self.precision.endswith("fp16"):
            raise ValueError(f"smooth_v needs FP8 values, got precision {shown(self.precision)}: leave one of them out")
        if self.min_cosine is not None:
            share(self, "min_cosine", zero=False)
            if not (self.guard and self.probe_every):
                raise ValueError("min_cosine needs guard on and probe_every >= 1, which measure it")
        if self.layers is not None and not isinstance(self.layers, str):
            raise TypeError(f"layers must be a file's path as text, got {shown(self.layers)}")
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
        integer(self, "edge_steps", least=0)
        for name in ("smooth_v", "q_groups", "k_groups"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} has no meaning in NVFP4, got {shown(getattr(self, name))}: leave it out")
