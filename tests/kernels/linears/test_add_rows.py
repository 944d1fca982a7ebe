"""Quantised rows added in place: operation against its specification, and what is refused."""

import pytest
import torch

from svg.kernels.linears import add_rows, add_rows_reference, quantize_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 70, 64), (1, 2, 33, 96), (1, 1, 1, 128)])
def test_the_operation_is_its_specification(dtype, shape):
    B, H, S, D = shape
    out = torch.randn(B, S, H, D).to(dtype).transpose(1, 2)  # as attention leaves it
    rows = quantize_rows(torch.randn(shape) * torch.logspace(-3, 3, S)[:, None])
    wanted = add_rows_reference(out.clone(), rows, 0.7)
    exact = out.float() + 0.7 * rows.dequantize()
    found = add_rows(out, rows, 0.7)
    assert found is out
    assert torch.allclose(found.float(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-10, atol=1e-6)
    assert torch.equal(found, wanted)


def test_wrong_shapes():
    rows = quantize_rows(torch.zeros(1, 2, 5, 64))
    for wrong in (torch.zeros(1, 2, 6, 64), torch.zeros(2, 5, 64), torch.zeros(1, 2, 64, 5).mT):
        with pytest.raises(ValueError, match=r"out must be \[B, H, S, D\] of the rows' \(1, 2, 5, 64\)"):
            add_rows(wrong, rows, 1.0)
