"""Rotated rows in INT8: their scales, the product, outliers, and rows that hold nothing or no numbers."""

import pytest
import torch

from svg.kernels import QuantizedRows, fp8_linear, quantize_rows
from svg.kernels.common import target
from svg.kernels.linears import (
    int8_rows_matmul,
    int8_rows_matmul_reference,
    quantize_int8_rows,
    quantize_int8_rows_reference,
)
from svg.kernels.linears.int8_rows import hadamard, hopper, rotation_width

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
    side = rotation_width(shape[-1])
    h = hadamard(side, x.device).double() * side**-0.5
    wanted = (x.double().unflatten(-1, (-1, side)) @ h).flatten(-2)
    assert ((rows.dequantize() - wanted).abs() <= 0.5001 * rows.scale[..., None] + 1e-5).all()
    if x.numel():
        assert (rows.values.abs().amax(-1) == 127).all()


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


@pytest.mark.skipif(not hopper.LOADABLE, reason="Gluon cannot be loaded")
@pytest.mark.parametrize(
    "M, K, N, arch, takes",
    [(75_600, 5120, 5120, 90, True), (2112, 320, 3072, 90, True), (2112, 320, 2816, 90, False),
     (75_600, 5120, 5112, 90, False), (75_600, 328, 5120, 90, False), (75_600, 5120, 5120, 100, False)],
)  # fmt: skip
def test_which_products_hopper_takes(M, K, N, arch, takes, monkeypatch):
    """Sides of 16 bytes, and a tile of 192 x 256 for every multiprocessor."""
    monkeypatch.setattr(target, "arch", lambda device: arch)
    monkeypatch.setattr(target, "sm_count", lambda device: 132)
    rows, columns = (
        QuantizedRows(torch.empty(n, K, dtype=torch.int8, device="meta"), torch.empty(n, device="meta"), torch.bfloat16)
        for n in (M, N)
    )
    assert hopper.supports(rows, columns) == takes
