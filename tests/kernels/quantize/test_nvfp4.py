import pytest
import torch

from svg.kernels.common import target
from svg.kernels.quantize.nvfp4 import CODES, dequantize_nvfp4, quantize_nvfp4, quantize_nvfp4_reference, round_nvfp4

FORMS = [{"packed": packed, "transposed": transposed} for packed in (True, False) for transposed in (True, False)]


def tokens(S, D=64, dtype=torch.bfloat16):
    """[B, H, S, D] view of [B, S, H, D], with a bias a channel."""
    return (torch.randn(1, S, 2, D) + 3 * torch.randn(D)).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("S", [1, 63, 129])
def test_against_the_reference(S, form):
    x = tokens(S, 96)
    for options in ({}, {"mean": x.float().mean(2)}, {"own_mean": True}):
        got, right = (op(x, **form, **options) for op in (quantize_nvfp4, quantize_nvfp4_reference))
        assert got.values.shape == right.values.shape and torch.equal(got.head_scale, right.head_scale)
        exact = "own_mean" not in options  # sums in another order: a value at the edge of rounding may change sides
        assert (got.values != right.values).float().mean() <= (0 if exact else 0.01)
        if got.scale is not None:
            assert not exact or torch.equal(got.scale.view(torch.uint8), right.scale.view(torch.uint8))


def test_packed_is_what_fp16_holds():
    x = tokens(129)
    for transposed in (False, True):
        packed, wide = (quantize_nvfp4(x, packed=packed, transposed=transposed) for packed in (True, False))
        assert torch.equal(dequantize_nvfp4(packed), dequantize_nvfp4(wide))


def test_every_number_of_the_format_survives():
    row = torch.tensor([*CODES, *(-code for code in CODES)] * 4)
    for scale in (2.0**-5, 1.0, 448.0):
        x = (row * scale).expand(1, 1, 16, 64).contiguous()
        assert torch.equal(dequantize_nvfp4(quantize_nvfp4(x, packed=True)), x)


def test_rounding_is_to_nearest_and_ties_to_even():
    near = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 2.51, 3.5, 5.0, 5.01, -2.5, -0.75, 6.0, 0.0, 0.1, 3.0])
    right = torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, -2.0, -1.0, 6.0, 0.0, 0.0, 3.0])
    assert torch.equal(round_nvfp4(near)[0], right)
    got = dequantize_nvfp4(quantize_nvfp4(near.repeat(4).view(1, 1, 1, 64), packed=True))
    assert torch.equal(got.flatten()[:16], right)


@pytest.mark.parametrize("size", [1e-6, 1.0, 6e4])
def test_small_and_large_heads_lose_no_more_than_others(size):
    """Without the head's power of two, e4m3 scales of 1e-6 are zero and of 6e4 / 6 saturate."""
    x = torch.randn(1, 1, 64, 64).clamp(-1, 1)
    got = dequantize_nvfp4(quantize_nvfp4((size * x).contiguous(), packed=True)) / size
    assert (got - x).norm() < 0.12 * x.norm()


def test_zero_groups_and_zero_heads():
    x = tokens(40).contiguous()
    x[0, 0] = 0
    x[0, 1, 3, 16:32] = 0
    for form in FORMS:
        wide = dequantize_nvfp4(quantize_nvfp4(x, **form))
        wide = wide[..., :40].mT if form["transposed"] else wide
        assert (wide[0, 0] == 0).all() and (wide[0, 1, 3, 16:32] == 0).all() and wide.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_head(bad):
    x = tokens(40, dtype=torch.float32).contiguous()
    x[0, 1, 3, 5] = bad
    scale = quantize_nvfp4(x, packed=True).head_scale
    assert scale[0, 0].isfinite() and scale[0, 1].isnan()


def test_wrong_arguments_are_named():
    x = tokens(20)
    with pytest.raises(ValueError, match="mean and own_mean cannot both"):
        quantize_nvfp4(x, packed=True, mean=torch.zeros(1, 2, 64), own_mean=True)
    with pytest.raises(TypeError, match="x must be fp16, bf16 or fp32"):
        quantize_nvfp4(x.double(), packed=True)


def test_which_gpus_multiply_fp4(monkeypatch):
    for arch, expected in ((80, False), (89, False), (90, False), (100, True), (120, True)):
        monkeypatch.setattr(target, "arch", lambda device, arch=arch: arch)
        assert target.has_fp4(torch.device("cpu")) == expected
