"""Activations between two linears: with their own rounding, beside other columns, and as FP8 rows."""

import pytest
import torch
import torch.nn.functional as F

from svg.kernels import activate, quantize_rows
from svg.kernels.linears import quantize_int8_rows

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


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("width", [0, 128, 32])  # 32: parts of both in one matrix, so that it takes two passes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_rotated_int8_rows(kind, width, dtype):
    x = (2 * torch.randn(2, 7, 768)).to(dtype)
    before = torch.randn(2, 7, 200).to(dtype)[..., :width] if width else None
    x[0, 3], x[1, 2, 5] = 0, torch.inf
    if before is not None:
        before[0, 3] = 0
    got = activate(x, kind, before=before, int8=True)
    wanted = quantize_int8_rows(activate(x, kind, before=before))
    assert got.dtype == dtype and got.shape == wanted.shape and got.values.dtype == torch.int8
    torch.testing.assert_close(
        got.scale, wanted.scale, rtol=2e-3, atol=0, equal_nan=True
    )  # a rounding of the largest number
    finite = got.scale.isfinite()
    assert finite.sum() == 13 and got.scale[0, 3] == 1 / 127 and not got.values[0, 3].any()
    difference = (got.values.int() - wanted.values.int()).abs()[finite]
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.05


def test_wrong_arguments_are_named():
    x = torch.zeros(1, 2, 7)
    with pytest.raises(ValueError, match="kind must be one of gelu_tanh"):
        activate(x, "relu")
    with pytest.raises(ValueError, match="W even for geglu"):
        activate(x, "geglu")
    with pytest.raises(ValueError, match=r"before \[B, S, C\]"):
        activate(x, "gelu", before=torch.zeros(1, 3, 7))
    with pytest.raises(ValueError, match="one of fp8 and int8 must be given, got both: drop one"):
        activate(x, "gelu", fp8=True, int8=True)
    with pytest.raises(TypeError, match="before must have x's dtype"):
        activate(x, "gelu", before=torch.zeros(1, 2, 7).half())
