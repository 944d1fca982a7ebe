"""The activations of feed-forwards, inside of kernels."""

from . import target
from .target import tl, triton

KINDS = ("gelu_tanh", "gelu", "geglu", "swiglu")
HALVED = ("geglu", "swiglu")  # of two inputs


@triton.jit
def activation(x, KIND: tl.constexpr):
    """fp32 of any shape; of "geglu" and "swiglu" the half that is not multiplied alone."""
    if KIND == "gelu_tanh":  # (1 + tanh z) / 2 is the sigmoid of 2 z
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "swiglu":
        return x * tl.sigmoid(x)
    else:
        return 0.5 * x * (1 + tl.erf(0.7071067811865476 * x))


if target.INTERPRETED:
    quick_activation = activation
else:

    @triton.jit
    def quick_activation(x, KIND: tl.constexpr):
        """The same where an error of 2^-11 is below what follows: one instruction for a tangent instead of two for a sigmoid."""
        if KIND == "gelu_tanh":
            z = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
            half = 0.5 * x
            return half + half * _tanh(z)
        elif KIND == "swiglu":
            half = 0.5 * x
            return half + half * _tanh(half)
        else:
            return activation(x, KIND)

    @triton.jit
    def _tanh(x):
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
