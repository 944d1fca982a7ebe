"""Linears in FP8, and what rows in INT8 have in common with them: rows and their scales, the product, and rows that hold nothing or no numbers."""

import pytest
import torch

from svg.kernels import fp8_linear, quantize_rows, quantize_rows_reference
from svg.kernels.linears import int8_rows_matmul, quantize_int8_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_STEP = 2.0**-4  # of e4m3: 3 bits after the leading one
KINDS = [(quantize_rows, fp8_linear), (quantize_int8_rows, int8_rows_matmul)]


@pytest.mark.parametrize("quantize, number", [(quantize_rows, torch.float8_e4m3fn), (quantize_int8_rows, torch.int8)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 96), (2, 5, 80), (0, 16)])
def test_shapes_and_dtypes_of_rows(dtype, shape, quantize, number):
    rows = quantize(torch.randn(shape).to(dtype))
    assert rows.values.dtype == number and rows.shape == shape and rows.scale.shape == shape[:-1]
    assert rows.dtype == dtype and rows.values.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 96), (2, 5, 80), (1, 1000), (0, 16)])
def test_rows_are_within_half_a_step(dtype, shape):
    x = torch.randn(shape).to(dtype)
    rows = quantize_rows(x)
    wide = x.float()
    smallest = rows.scale[..., None] * 2.0**-10  # half a step of the subnormal numbers
    assert ((rows.dequantize() - wide).abs() <= HALF_STEP * wide.abs() + smallest).all()
    if x.numel():
        assert torch.allclose(rows.dequantize().abs().amax(-1), wide.abs().amax(-1), rtol=1e-6)


def test_kernel_equals_its_specification():
    x = torch.randn(9, 200) * torch.logspace(-4, 4, 9)[:, None]
    got, wanted = quantize_rows(x), quantize_rows_reference(x)
    assert torch.equal(got.values.float(), wanted.values.float()) and torch.equal(got.scale, wanted.scale)


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_int8_rows])
def test_strided_rows(quantize):
    x = torch.randn(6, 3, 64)[:, 1]
    assert torch.equal(quantize(x).dequantize(), quantize(x.contiguous()).dequantize())


@pytest.mark.parametrize(("quantize", "multiply"), KINDS, ids=["fp8", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_empty_rows_are_zero_and_bad_ones_show(bad, quantize, multiply):
    x = torch.zeros(3, 32)
    x[1, 5], x[2] = bad, 1.0
    rows = quantize(x)
    assert 0 < rows.scale[0] < 1 and (rows.values[0].float() == 0).all()
    out = multiply(rows, quantize(torch.ones(16, 32)))
    assert (out[0] == 0).all() and out[1].isnan().all()
    torch.testing.assert_close(out[2], torch.full((16,), 32.0))


@pytest.mark.parametrize(("quantize", "multiply"), KINDS, ids=["fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, N", [(0, 32, 16), (1, 80, 48), (37, 384, 144), (130, 272, 16)])
def test_product_is_that_of_the_dequantised(dtype, M, K, N, quantize, multiply):
    x, weight, bias = torch.randn(1, M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    rows, columns = quantize(x), quantize(weight)
    wanted = rows.dequantize().double() @ columns.dequantize().double().T + bias.double()
    out = multiply(rows, columns, bias)
    assert out.dtype == dtype and out.shape == (1, M, N)
    assert ((out - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-4).all()


def test_eight_bits_cost_four_percent():
    x, weight = torch.randn(64, 512), torch.randn(256, 512)
    exact = x.double() @ weight.double().T
    error = (fp8_linear(quantize_rows(x), quantize_rows(weight)) - exact).norm() / exact.norm()
    assert 0.02 < error < 0.045  # two roundings of 2.6 % each, at random


@pytest.mark.parametrize(("quantize", "multiply"), KINDS, ids=["fp8", "int8"])
def test_wrong_arguments_are_named(quantize, multiply):
    rows = quantize(torch.zeros(4, 32))
    with pytest.raises(ValueError, match=r"x must be \[..., 16\] and bias \[8\]"):
        multiply(rows, quantize(torch.zeros(8, 16)))
    with pytest.raises(ValueError, match=r"bias \[8\]"):
        multiply(rows, quantize(torch.zeros(8, 32)), torch.zeros(9))
    with pytest.raises(TypeError, match="x must be fp16, bf16 or fp32, got torch.float64"):
        quantize(torch.zeros(4, 32).double())
