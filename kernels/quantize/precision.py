"""Names of what a quantised attention multiplies, and what they mean."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..common import target

# fp16's largest number must hold a sum of 64 products: 64 x 448 x 2.25 = 64,512.
V_RANGE, V_RANGE_ACC16 = 448.0, 2.25


@dataclass(frozen=True)
class Precision:
    """Types of the two products of quantised attention.

    Args:
        bits: of Q and K: 8, or 4 (the range of INT4 in INT8, an emulation).
        fp8: P and V in e4m3; otherwise in 16 bits.
        acc16: sum FP8 products in fp16, 64 keys at a time.
    """

    bits: int
    fp8: bool
    acc16: bool = False

    @property
    def v_range(self) -> float:
        """Largest quantised value of V."""
        return V_RANGE_ACC16 if self.acc16 else V_RANGE

    def p_dtype(self, v: torch.Tensor) -> torch.dtype:
        """Type of P for these values."""
        return torch.float8_e4m3fn if self.fp8 else pv_dtype(v)


PRECISIONS = {
    "int8-fp8": Precision(8, True),
    "int8-fp8-acc16": Precision(8, True, True),
    "int8-fp16": Precision(8, False),
    "int4-fp8": Precision(4, True),
    "int4-fp8-acc16": Precision(4, True, True),
    "int4-fp16": Precision(4, False),
}
SPARSE_PRECISIONS = tuple(name for name in PRECISIONS if name.startswith("int8"))


def find_precision(name: str, among: tuple[str, ...] = tuple(PRECISIONS), smooth_v: bool = False) -> Precision:
    """What a name such as "int8-fp8" means.

    Args:
        name: bits of Q K^T, then of P V, then of its sums where they are not fp32.
        among: names to choose from.
        smooth_v: whether V's channel means are to be taken off.

    Raises:
        ValueError: an unknown name, or smooth_v without FP8.
    """
    if name not in among:
        raise ValueError(f"precision must be one of {', '.join(among)}, got {name!r}")
    if smooth_v and not PRECISIONS[name].fp8:
        raise ValueError(f"smooth_v needs FP8 values, got precision {name!r}: leave it off")
    return PRECISIONS[name]


@dataclass(frozen=True)
class Quantisation:
    """How an attention is quantised.

    Args:
        precision: one of `PRECISIONS`: bits of Q K^T, then of P V, then of its sums where they are not fp32.
        smooth_q: take the mean of every 128 queries off and add its scores back; None: with INT4 only. Costs 4 bytes
            for each (128 queries, key) and head. Dense attention only.
        smooth_k: take K's mean over all tokens off.
        smooth_v: take V's channel means off and add them to the output (FP8 only).
        q_groups, k_groups: which tokens share a scale, see `quantize_tokens`. Single queries cost nothing extra, keys
            in groups other than "block" one multiplication a score. Dense attention only.
        pv_threshold: fp32 [H], >= 0: skip P V of a tile of keys where in no row of the query tile the tile's largest
            score comes within this many powers of two of the running maximum; None: never. Block-sparse attention only.
    """

    precision: str = "int8-fp8"
    smooth_q: bool | None = None
    smooth_k: bool = True
    smooth_v: bool = False
    q_groups: str = "token"
    k_groups: str = "block"
    pv_threshold: torch.Tensor | None = None

    @property
    def kind(self) -> Precision:
        """Types of the two products."""
        return PRECISIONS[self.precision]

    @property
    def smooths_q(self) -> bool:
        """Whether queries lose their means: as asked for, else with INT4."""
        return self.kind.bits == 4 if self.smooth_q is None else self.smooth_q

    def refuse(self, op: str, *names: str) -> None:
        """Raises ValueError where one of these fields is not its default, which `op` has no use for."""
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if field.name in names and given is not field.default and given != field.default:
                raise ValueError(f"{op} has no {field.name}, got {given!r}: leave it out")


def as_quantisation(how: Quantisation | None, fields: dict[str, Any]) -> Quantisation:
    """A `Quantisation`, also from its fields one by one.

    Args:
        how: the value, or None: made of the fields.
        fields: keywords of a call; those that are fields of it are taken out.

    Raises:
        TypeError: fields beside a value.
    """
    names = {field.name for field in dataclasses.fields(Quantisation)}
    own = {name: fields.pop(name) for name in list(fields) if name in names}
    if how is None:
        return Quantisation(**own)
    if own:
        raise TypeError(f"how is a Quantisation already, got {', '.join(own)} beside it: replace its field")
    return how


def refuse_keywords(op: str, fields: dict[str, Any]) -> None:
    """Raises TypeError where keywords of a call are left that nothing takes."""
    if fields:
        raise TypeError(f"{op} got an unexpected keyword argument: {', '.join(fields)}")


def default_precision(device: torch.device) -> str:
    """The precision "auto" stands for: int8-fp8 where products run in FP8, else int8-fp16.

    Args:
        device: where the tensors are.
    """
    return "int8-fp8" if target.has_fp8(device) else "int8-fp16"


def pv_dtype(v: torch.Tensor) -> torch.dtype:
    """Type of P and V in the 16-bit P V of a precision such as "int8-fp16".

    Args:
        v: the values.

    Returns:
        fp16 for fp16, bf16 for bf16 and fp32, whose range fp16 does not have.
    """
    return torch.float16 if v.dtype == torch.float16 else torch.bfloat16
