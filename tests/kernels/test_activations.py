"""Activations between two linears: with their own rounding, beside other columns, and as FP8 rows."""

import pytest
import torch
import torch.nn.functional as F

from svg.kernels import activate, quantize_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXACT = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "geglu": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
    "swiglu": lambda x: x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1]),
}


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [0, 24])
def test_within_one_rounding(kind, dtype, width):
    x = (3 * torch.randn(2, 5, 160)).to(dtype)[..., :144]
    x[0, 0, :2] = torch.tensor([-60.0, 60.0])
    before = torch.randn(2, 5, width).to(dtype) if width else None
    wanted = EXACT[kind](x.double())
    wanted = wanted if before is None else torch.cat([before.double(), wanted], -1)
    out = activate(x, kind, before=before)
    assert out.dtype == dtype and out.is_contiguous()
    assert ((out - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 2e-6).all()


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("before", [False, True])
def test_as_fp8_rows(kind, before):
    x, other = torch.randn(1, 6, 96), torch.randn(1, 6, 32) if before else None
    got = activate(x.bfloat16(), kind, before=None if other is None else other.bfloat16(), fp8=True)
    wanted = quantize_rows(
        activate(x.bfloat16().float(), kind, before=None if other is None else other.bfloat16().float())
    )
    assert got.dtype == torch.bfloat16 and got.shape == wanted.shape
    torch.testing.assert_close(got.scale, wanted.scale, rtol=1e-6, atol=0)
    difference = (got.dequantize() - wanted.dequantize()).abs()  # sums in another order may round to the neighbour
    assert (difference <= 2.0**-3 * wanted.dequantize().abs() + wanted.scale[..., None] * 2.0**-9).all()
    assert (difference > 0).float().mean() < 0.01


def test_wrong_arguments_are_named():
    x = torch.zeros(1, 2, 7)
    with pytest.raises(ValueError, match="kind must be one of gelu_tanh"):
        activate(x, "relu")
    with pytest.raises(ValueError, match="W even for geglu"):
        activate(x, "geglu")
    with pytest.raises(ValueError, match=r"before \[B, S, C\]"):
        activate(x, "gelu", before=torch.zeros(1, 3, 7))
    with pytest.raises(TypeError, match="before must have x's dtype"):
        activate(x, "gelu", before=torch.zeros(1, 2, 7).half())
