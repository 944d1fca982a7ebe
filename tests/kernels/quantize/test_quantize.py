import pytest
import torch

from svg.kernels import (
    quantize_channels,
    quantize_channels_reference,
    quantize_tokens,
    quantize_tokens_reference,
    statistics,
    statistics_reference,
)
from svg.kernels.common import target
from svg.kernels.quantize.channels import dequantize_channels
from svg.kernels.quantize.tokens import GROUPS, dequantize_tokens


def tokens(S, D=64, dtype=torch.bfloat16, B=1, H=2):
    """[B, H, S, D] view of [B, S, H, D], with a bias a channel."""
    x = torch.randn(B, S, H, D) + 3 * torch.randn(D)
    return x.to(dtype).transpose(1, 2)


def order(x):
    return torch.rand(x.shape[:3]).argsort(-1).to(torch.int32)


def same(a, b):
    assert torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8))
    torch.testing.assert_close(a.scale, b.scale, rtol=1e-6, atol=0)
    assert (a.mean is None) == (b.mean is None)
    if a.mean is not None:
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("S", [1, 63, 129, 300])
@pytest.mark.parametrize("D", [32, 96, 128])
def test_statistics(S, D):
    k, v = tokens(S, D), tokens(S, D)
    stats = statistics(k, v)
    torch.testing.assert_close(stats.k_mean, k.float().mean(2))
    torch.testing.assert_close(stats.v_mean, v.float().mean(2))
    assert torch.equal(stats.v_low, v.float().amin(2)) and torch.equal(stats.v_high, v.float().amax(2))


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("groups", GROUPS["q"])
@pytest.mark.parametrize("S", [63, 129])
def test_tokens_against_the_reference(side, groups, S):
    x = tokens(S, 96)
    mean, permutation = x.float().mean(2), order(x)
    for options in ({}, {"mean": mean, "bits": 4}, {"permutation": permutation}):
        got = quantize_tokens(x, side=side, groups=groups, **options)
        same(got, quantize_tokens_reference(x, side=side, groups=groups, **options))
    got = quantize_tokens(x, side=side, groups=groups, own_mean=True)
    expected = quantize_tokens_reference(x, side=side, groups=groups, own_mean=True)
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-5, atol=1e-5)
    # Block means are sums in another order: a value at the edge of rounding may fall to the other side.
    assert (got.values.int() - expected.values.int()).abs().max() <= 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("groups", GROUPS["q"])
def test_error_is_half_a_step(bits, side, groups):
    x = tokens(300, 64, torch.float32)
    got = quantize_tokens(x, side=side, groups=groups, bits=bits)
    scale = got.scale if got.scale.shape[2] == 300 else got.scale.repeat_interleave(128, 2)[:, :, :300]
    assert got.values.abs().max() == (127 if bits == 8 else 7)
    error = (dequantize_tokens(got, 64) - x).abs()
    assert (error <= 0.5001 * scale[..., None]).all()


@pytest.mark.parametrize("side", ["q", "k"])
def test_the_papers_groups_share_a_scale(side):
    """Every token's scale is the largest value of its group over 127, the group spelled out as in the paper."""
    x = tokens(128, 64, torch.float32, H=1)
    group = {
        ("q", "warp"): lambda t: t // 32,
        ("k", "warp"): lambda t: t // 64,
        ("q", "thread"): lambda t: (t // 32, t % 8),
        ("k", "thread"): lambda t: (t // 64, t % 8 // 2),
        (side, "token"): lambda t: t,
    }
    for groups in ("token", "warp", "thread"):
        scale = quantize_tokens(x, side=side, groups=groups).scale[0, 0]
        key = group[side, groups]
        for t in range(0, 128, 7):
            members = [s for s in range(128) if key(s) == key(t)]
            assert scale[t] == pytest.approx(x[0, 0, members].abs().max().item() / 127, rel=1e-6)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("S", [1, 63, 129])
def test_channels_against_the_reference(smooth, S):
    v = tokens(S, 96)
    stats, permutation = statistics_reference(v, v), order(v)
    got = quantize_channels(v, stats, smooth=smooth, permutation=permutation)
    same(got, quantize_channels_reference(v, stats, smooth=smooth, permutation=permutation))
    assert got.values.shape == (1, 2, 128, 128 * -(-S // 128))
    tail, pad = got.values[:, :, :, S:].float(), got.values[:, :, 96:].float()
    assert (tail == 0).all() and (pad == 0).all()  # NaN there would reach the output, whatever its weight
    back = dequantize_channels(got, S, 96) + (got.mean[:, :, None, :96] if smooth else 0)
    exact = v.float().gather(2, permutation.long()[..., None].expand_as(v))
    unit = got.scale[:, :, None, :96]
    assert (
        (back - exact).abs() <= (exact.abs() + (got.mean[:, :, None, :96].abs() if smooth else 0)) / 16 + unit
    ).all()


def test_zero_groups_and_channels():
    x = tokens(200)
    x[:, :, :128] = 0
    for groups in GROUPS["q"]:
        got = quantize_tokens(x, side="k", groups=groups)
        assert got.scale.isfinite().all() and (got.scale > 0).all()
        assert (got.values[:, :, :128] == 0).all() and (got.values[:, :, 128:] != 0).any()
    v = tokens(200)
    v[..., 5] = 0
    got = quantize_channels(v, statistics(v, v))
    assert got.scale.isfinite().all() and (got.values.float()[:, :, 5] == 0).all()


@pytest.mark.parametrize("value", [1e-38, 6e-8, 65504.0, 3e38])
def test_extreme_magnitudes(value):
    x = torch.full((1, 1, 130, 64), value, dtype=torch.float16 if value == 65504.0 else torch.float32)
    got = quantize_tokens(x, side="q")
    assert got.scale.isfinite().all()
    torch.testing.assert_close(dequantize_tokens(got, 64), x.float(), rtol=1e-5, atol=1e-30)
    channels = quantize_channels(x, statistics_reference(x * 1e-3, x * 1e-3)) if value > 1e30 else None
    if channels is not None:
        assert channels.values.float().isfinite().all()  # saturated, not NaN


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scale(bad):
    x = tokens(70)
    x[0, 1, 3, 7] = bad
    scale = quantize_tokens(x, side="q").scale
    assert scale[0, 1, 3].isnan() and scale.isnan().sum() == 1
    assert quantize_tokens(x, side="k", groups="block").scale.isnan().sum() == 1
    scale = quantize_channels(x, statistics(x, x)).scale
    assert scale[0, 1, 7].isnan() and scale.isnan().sum() == 1


def test_inputs_are_not_changed():
    x = tokens(70)
    before = x.clone()
    quantize_tokens(x, side="k", mean=x.float().mean(2))
    quantize_channels(x, statistics(x, x), smooth=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "side must be q or k", {"side": "v"}),
        (ValueError, "groups one of token, thread, warp, block", {"groups": "tensor"}),
        (ValueError, "bits must be 8 or 4, got 2", {"bits": 2}),
        (ValueError, "cannot both", {"mean": torch.zeros(1, 2, 64), "own_mean": True}),
        (ValueError, "permutation must be", {"permutation": torch.zeros(1, 2, 3)}),
        (ValueError, r"x must be \[B, H, S, D\]", {"x": torch.zeros(2, 3)}),
        (TypeError, "fp16, bf16 or fp32", {"x": torch.zeros(1, 2, 70, 64, dtype=torch.float64)}),
        (NotImplementedError, "at most 128, got 160", {"x": torch.zeros(1, 2, 70, 160)}),
    ],
)
def test_wrong_arguments_are_named(error, match, change):
    with pytest.raises(error, match=match):
        quantize_tokens(**{"x": tokens(70), "side": "q"} | change)


def test_gpus_without_fp8_are_refused(monkeypatch):
    v = tokens(70)
    monkeypatch.setattr(target, "arch", lambda device: 80)
    with pytest.raises(NotImplementedError, match=r"FP8 needs compute capability 8.9 or newer, got 8.0.*int8-fp16"):
        quantize_channels(v, statistics_reference(v, v))


@pytest.mark.parametrize("S", [16, 100, 131])
def test_interleaved_channels(S):
    """Columns (2t, 2t + 1) and (8 + 2t, 9 + 2t) of every 16 lie side by side; nothing is lost at the end."""
    k, v = (torch.randn(2, 3, S, 64) for _ in range(2))
    order = torch.rand(2, 3, S).argsort(-1).int()
    stats = statistics(k, v)
    plain = quantize_channels(v, stats, permutation=order)
    mixed = quantize_channels(v, stats, permutation=order, interleave=True)
    assert torch.equal(mixed.scale, plain.scale) and mixed.values.shape == plain.values.shape
    for t in range(4):
        for source, goal in ((2 * t, 4 * t), (8 + 2 * t, 4 * t + 2)):
            for e in range(2):
                got, expected = mixed.values[..., goal + e :: 16], plain.values[..., source + e :: 16]
                assert torch.equal(got.float(), expected.float())
