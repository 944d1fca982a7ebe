"""Rotated rows in INT8: their scales, the product, outliers, and rows that hold nothing or no numbers."""

import pytest
import torch

from svg.kernels import fp8_linear, quantize_rows
from svg.kernels.linears import (
    int8_rows_matmul,
    int8_rows_matmul_reference,
    quantize_int8_rows,
    quantize_int8_rows_reference,
)
from svg.kernels.linears.int8_rows import hadamard, rotation_width

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def test_rotations_are_orthogonal_and_as_wide_as_rows_allow():
    assert [rotation_width(k) for k in (16, 48, 384, 5120, 13824, 8960)] == [16, 16, 128, 128, 128, 128]
    for side in (1, 16, 128):
        h = hadamard(side, torch.device("cpu"))
        assert h.shape == (side, side) and torch.equal(h, h.t()) and torch.equal(h @ h, side * torch.eye(side))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 96), (2, 5, 80), (1, 1536), (0, 16)])
def test_rows_are_within_half_a_step_of_the_rotated(dtype, shape):
    x = torch.randn(shape).to(dtype)
    rows = quantize_int8_rows(x)
    assert rows.values.dtype == torch.int8 and rows.shape == shape and rows.scale.shape == shape[:-1]
    assert rows.dtype == dtype and rows.values.is_contiguous()
    side = rotation_width(shape[-1])
    h = hadamard(side, x.device).double() * side**-0.5
    wanted = (x.double().unflatten(-1, (-1, side)) @ h).flatten(-2)
    assert ((rows.dequantize() - wanted).abs() <= 0.5001 * rows.scale[..., None] + 1e-5).all()
    if x.numel():
        assert (rows.values.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, N", [(0, 32, 16), (1, 80, 48), (37, 384, 144), (130, 272, 16)])
def test_product_is_that_of_what_the_rows_stand_for(dtype, M, K, N):
    x, weight, bias = torch.randn(1, M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    rows, columns = quantize_int8_rows(x), quantize_int8_rows(weight)
    wanted = rows.dequantize().double() @ columns.dequantize().double().T + bias.double()
    out = int8_rows_matmul(rows, columns, bias)
    assert out.dtype == dtype and out.shape == (1, M, N)
    assert ((out - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-4).all()


def test_kernels_equal_their_specifications():
    x, weight = (torch.randn(9, 208) * torch.logspace(-4, 4, 9)[:, None]).bfloat16(), torch.randn(32, 208).bfloat16()
    got, wanted = quantize_int8_rows(x), quantize_int8_rows_reference(x)
    # Sums of the rotation may round differently.
    assert (got.values.int() - wanted.values.int()).abs().max() <= 1
    torch.testing.assert_close(got.scale, wanted.scale, rtol=1e-6, atol=0)
    columns = quantize_int8_rows_reference(weight)
    out, exact = int8_rows_matmul(wanted, columns), int8_rows_matmul_reference(wanted, columns)
    torch.testing.assert_close(out, exact, rtol=2**-7, atol=0)  # one bf16 step


def test_a_third_of_the_error_of_fp8_and_hardly_more_with_outliers():
    x, weight = torch.randn(64, 512), torch.randn(256, 512)
    int8, fp8 = (
        lambda: int8_rows_matmul(quantize_int8_rows(x), quantize_int8_rows(weight)),
        lambda: fp8_linear(quantize_rows(x), quantize_rows(weight)),
    )
    exact = x.double() @ weight.double().T
    assert error(int8(), exact) < 0.35 * error(fp8(), exact)
    x[:, 77] *= 30  # a channel of outliers
    exact = x.double() @ weight.double().T
    assert error(int8(), exact) < 0.02


def test_strided_rows():
    x = torch.randn(6, 3, 64)[:, 1]
    assert torch.equal(quantize_int8_rows(x).dequantize(), quantize_int8_rows(x.contiguous()).dequantize())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_empty_rows_are_zero_and_bad_ones_show(bad):
    x = torch.zeros(3, 32)
    x[1, 5], x[2] = bad, 1.0
    rows = quantize_int8_rows(x)
    assert 0 < rows.scale[0] < 1 and (rows.values[0] == 0).all()
    out = int8_rows_matmul(rows, quantize_int8_rows(torch.ones(16, 32)))
    assert (out[0] == 0).all() and out[1].isnan().all()
    torch.testing.assert_close(out[2], torch.full((16,), 32.0))


def test_wrong_arguments_are_named():
    rows = quantize_int8_rows(torch.zeros(4, 32))
    with pytest.raises(ValueError, match=r"x must be \[..., 16\] and bias \[8\]"):
        int8_rows_matmul(rows, quantize_int8_rows(torch.zeros(8, 16)))
    with pytest.raises(ValueError, match=r"bias \[8\]"):
        int8_rows_matmul(rows, quantize_int8_rows(torch.zeros(8, 32)), torch.zeros(9))
    with pytest.raises(TypeError, match="fp16, bf16 or fp32"):
        quantize_int8_rows(torch.zeros(4, 32, dtype=torch.float64))
