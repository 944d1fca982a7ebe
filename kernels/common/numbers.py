"""Numbers that several kernels share, as the compiler wants them; `base2` is for the host."""

import math

from .target import tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FP8_MAX = tl.constexpr(448.0)  # of e4m3
LOG2_FP8_MAX = tl.constexpr(8.807354922057604)
INT8_MAX = tl.constexpr(127.0)
LOG2_FP4_RANGE = tl.constexpr(11.392317422778762)  # of 6 * 448: e2m1 times e4m3
SMALLEST = 1e-30  # what is smaller counts as zero: its scale's inverse would overflow
TINY = tl.constexpr(SMALLEST)
# 1.5 * 2^23: a float to which an integer below 2^22 is added has the integer in its low bits, rounded to nearest even; and its
# bits, to which an integer can be added as one.
INT_AS_FLOAT = tl.constexpr(12582912.0)
INT_AS_FLOAT_BITS = tl.constexpr(0x4B400000)


def base2(sm_scale: float) -> float:
    """A softmax scale as kernels take it: their exponentials have base 2."""
    return sm_scale * math.log2(math.e)


def softmax_scale(sm_scale: float | None, dim: int) -> float:
    """The scale of scores that is given, or that of a head dim."""
    return float(dim) ** -0.5 if sm_scale is None else float(sm_scale)
