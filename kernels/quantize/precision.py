"""Names of what a quantised attention multiplies, and what they mean."""

from dataclasses import dataclass

import torch

from ..common import target

# fp16's largest number must hold a sum of 64 products: 64 x 448 x 2.25 = 64 512.
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
