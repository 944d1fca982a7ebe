"""Linears in INT8 with fallback: blocks, products, gradients against fp64, and the rate at which blocks fall back."""

import pytest
import torch

from svg.kernels.linears import (
    Steering,
    int8_linear,
    int8_matmul,
    int8_matmul_reference,
    quantize_blocks,
    quantize_blocks_reference,
)
from svg.kernels.linears.blocks import block_absmax, random_share, spread, steered

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(128, 256), (130, 200), (1, 7), (300, 129)]


def outliers(M, K, dtype=torch.float32, share=0.02):
    x = torch.randn(M, K)
    return torch.where(torch.rand(M, K) < share / 100, 60 * x.sign(), x).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_within_half_a_level(dtype, shape):
    x = torch.randn(shape).to(dtype)
    threshold = torch.tensor([2.5])
    got = quantize_blocks(x, threshold)
    largest = block_absmax(x)
    assert torch.equal(got.flagged != 0, largest > threshold)
    second = torch.where(got.flagged != 0, 127.0, 1.0)
    allowed = spread(largest / 254 / second, x.shape) * 1.01
    assert ((got.dequantize() - x.float()).abs() <= allowed + 1e-7).all()
    assert quantize_blocks(x).residual is None and got.dtype == dtype


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_its_specification(shape, seed):
    x, threshold = torch.randn(shape), torch.tensor([2.8])
    got, wanted = quantize_blocks(x, threshold, seed=seed), quantize_blocks_reference(x, threshold, seed=seed)
    assert torch.equal(got.values, wanted.values) and torch.equal(got.scale, wanted.scale)
    assert torch.equal(got.flagged, wanted.flagged) and torch.equal(got.residual_scale, wanted.residual_scale)
    flagged = spread(got.flagged, x.shape) != 0
    assert torch.equal(got.residual[flagged], wanted.residual[flagged])


def test_rounding_at_random_is_right_on_average():
    x = torch.full((128, 128), 0.3)
    x[0, 0] = 127  # scale 1
    mean = torch.stack([quantize_blocks(x, seed=seed).dequantize()[1:] for seed in range(20)]).mean()
    assert abs(mean - 0.3) < 0.004  # 325,000 draws: 5 standard deviations
    assert torch.equal(quantize_blocks(x, seed=3).values, quantize_blocks(x, seed=3).values)
    assert not torch.equal(quantize_blocks(x, seed=3).values, quantize_blocks(x, seed=4).values)
    share = random_share((200, 200), 1, x.device)
    assert share.min() >= 0 and share.max() < 1 and abs(share.mean() - 0.5) < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_zero_blocks_are_zero_and_bad_ones_show(bad):
    x = torch.zeros(130, 140)
    x[129, 5] = bad
    blocks = quantize_blocks(x, torch.tensor([1.0]))
    assert (blocks.values[:128] == 0).all() and blocks.scale[1, 0].isnan() and blocks.scale.isnan().sum() == 1
    out = int8_matmul(blocks, quantize_blocks(torch.ones(16, 140)))
    assert (out[:128] == 0).all() and out[128:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(130, 140, 300), (1, 5, 128), (257, 16, 40)])
def test_product_is_that_of_the_dequantised(dtype, M, N, K):
    a, b = outliers(M, K, dtype), torch.randn(N, K)
    bias = torch.randn(N)
    rows, columns = quantize_blocks(a, torch.tensor([3.0])), quantize_blocks(b)
    out = int8_matmul(rows, columns, bias)
    wanted = rows.dequantize().double() @ columns.dequantize().double().T + bias
    assert out.dtype == dtype
    torch.testing.assert_close(out, int8_matmul_reference(rows, columns, bias), rtol=1e-6, atol=1e-5)
    assert ((out - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-4).all()


def test_fallback_is_worth_it():
    x, weight = outliers(512, 512, share=1), torch.randn(256, 512)
    exact = x.double() @ weight.double().T
    errors = [
        (int8_matmul(quantize_blocks(x, t), quantize_blocks(weight)) - exact).norm() / exact.norm()
        for t in (None, torch.tensor([10.0]))
    ]
    assert errors[1] < 0.6 * errors[0]


def test_the_rate_is_steered():
    torch.manual_seed(3)
    threshold = torch.tensor([100.0])
    for _ in range(60):
        x = torch.randn(1024, 1024) * torch.randn(8, 8).exp().repeat_interleave(128, 0).repeat_interleave(128, 1)
        blocks = quantize_blocks(x, threshold)
        threshold = steered(threshold, blocks)
    rates = []
    for _ in range(20):
        x = torch.randn(1024, 1024) * torch.randn(8, 8).exp().repeat_interleave(128, 0).repeat_interleave(128, 1)
        blocks = quantize_blocks(x, threshold)
        rates.append((blocks.flagged != 0).float().mean().item())
        threshold = steered(threshold, blocks)
    assert 0.08 < sum(rates) / len(rates) < 0.32


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_against_fp64(dtype):
    weight, bias = torch.randn(140, 200).to(dtype), torch.randn(140).to(dtype)
    x = torch.cat([torch.cat([outliers(128, 128, share=1), torch.randn(128, 72)], 1), torch.randn(172, 200)])
    x = x.to(dtype).view(2, 150, 200)  # one of six blocks
    given = torch.randn(2, 150, 140)
    found, exact = [], []
    for wide in (False, True):
        own = [t.double().requires_grad_() if wide else t.clone().requires_grad_() for t in (x, weight, bias)]
        out = torch.nn.functional.linear(*own) if wide else int8_linear(*own, Steering())
        (out * given.to(out.dtype)).sum().backward()
        (exact if wide else found).extend([out.detach(), *(t.grad for t in own)])
    for name, got, wanted, allowed in zip(("out", "x", "weight", "bias"), found, exact, (0.02, 0.025, 0.025, 0.003)):
        assert (got - wanted).norm() <= allowed * wanted.norm(), name
    assert found[0].dtype == dtype and found[1].dtype == dtype and found[2].dtype == dtype


def test_the_same_step_gives_the_same_gradients_and_the_next_others():
    x, weight = torch.randn(40, 64), torch.randn(48, 64)

    def gradient(steering):
        own = weight.clone().requires_grad_()
        int8_linear(x, own, None, steering).square().sum().backward()
        return own.grad

    steering = Steering()
    first, second = gradient(steering), gradient(steering)
    assert torch.equal(first, gradient(Steering())) and not torch.equal(first, second)
    assert steering.steps == 2


def test_wrong_arguments_are_named():
    blocks, other = quantize_blocks(torch.zeros(8, 32)), quantize_blocks(torch.zeros(8, 32), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="without second values"):
        int8_matmul(blocks, other)
    with pytest.raises(ValueError, match=r"b must be \[N, 32\]"):
        int8_matmul(blocks, quantize_blocks(torch.zeros(8, 16)))
    with pytest.raises(ValueError, match=r"x must be \[M, K\]"):
        quantize_blocks(torch.zeros(2, 8, 32))
    with pytest.raises(TypeError, match="x must be fp16, bf16 or fp32"):
        quantize_blocks(torch.zeros(8, 32).double())
    with pytest.raises(ValueError, match=r"x must be \[..., 32\]"):
        int8_linear(torch.zeros(2, 16), torch.zeros(8, 32), None, Steering())
