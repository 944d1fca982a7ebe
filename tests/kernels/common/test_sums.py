import pytest
import torch

from svg.kernels.common.sums import sums_of, sums_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 2, 5), (2, 70, 3, 64)])
def test_against_sums_in_plain_torch(shape, dtype):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = [x[0], x[1].transpose(1, 2), x[2]]
    torch.testing.assert_close(sums_of(*views), sums_reference(*views), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", range(3))
def test_one_value_that_is_not_finite_shows_in_its_tensor_alone(value, which):
    tensors = [torch.ones(2, 600, 3, 8) for _ in range(3)]
    tensors[which][1, 599, 2, 7] = value
    assert torch.isfinite(sums_of(*tensors)).tolist() == [i != which for i in range(3)]


def test_strided_empty_and_unequal_tensors():
    x = torch.arange(24.0).view(4, 6)
    assert sums_of(x[:, ::2], x[:, 1::2]).tolist() == [x[:, ::2].sum(), x[:, 1::2].sum()]
    assert sums_of(x, x[:2]).tolist() == [x.sum(), x[:2].sum()]
    assert sums_of(torch.zeros(0)).tolist() == [0]
