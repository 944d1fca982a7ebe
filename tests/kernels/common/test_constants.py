"""Tensors that are made once and kept."""

import torch

from svg.kernels.common.constants import constant


def test_a_constant_is_a_real_tensor_whoever_asks_first():
    @constant(maxsize=2)
    def ramp(length: int) -> torch.Tensor:
        return torch.arange(length)

    with torch.inference_mode(), torch._subclasses.fake_tensor.FakeTensorMode():
        found = ramp(3)
    assert type(found) is torch.Tensor and found.tolist() == [0, 1, 2] and not found.is_inference() and ramp(3) is found
