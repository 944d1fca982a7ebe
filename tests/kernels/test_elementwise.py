import pytest
import torch
import torch.nn.functional as F

from svg.kernels import gate_residual, modulate, norm_rope, quantize_rows, residual_modulate
from svg.kernels.linears import quantize_int8_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def angles(T, D):
    turn = torch.randn(T, D // 2).repeat_interleave(2, -1)
    return turn.cos(), turn.sin()


def stepwise(x, weight, bias, eps, cos, sin, rms, first, D):
    """Separate modules in x's dtype: norm, then RoPE in fp32 as complex numbers."""
    W = x.shape[-1]
    out = F.rms_norm(x, (W,), weight, eps) if rms else F.layer_norm(x, (W,), weight, bias, eps)
    T = cos.shape[0]
    heads = out[:, first : first + T].unflatten(-1, (-1, D // 2, 2))
    wide = heads.double() if x.dtype == torch.float64 else heads.float()
    turn = torch.complex(cos[:, 0::2], sin[:, 0::2])[:, None, None]
    turned = torch.view_as_real(torch.view_as_complex(wide.contiguous()) * turn).flatten(-3)
    out = out.clone()
    out[:, first : first + T] = turned.to(x.dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("G", "W", "D", "rms"), [(1, 96, 32, True), (3, 64, 64, True), (5, 32, 32, False)])
def test_norm_and_rope_within_the_error_of_separate_modules(dtype, G, W, D, rms):
    B, S, T, first = 2, 11, 7, 3
    x = torch.randn(B, S, 3, G, W).to(dtype)[:, :, 1] + 0.5  # a strided projection
    weight, bias = torch.randn(W).to(dtype), None if rms else torch.randn(W).to(dtype)
    cos, sin = angles(T, D)
    out = norm_rope(x, weight, bias, 1e-6, cos, sin, rms=rms, first=first)
    double = (None if p is None else p.double() for p in (weight, bias))
    exact = stepwise(x.double(), *double, 1e-6, cos.double(), sin.double(), rms, first, D)
    plain = stepwise(x, weight, bias, 1e-6, cos, sin, rms, first, D)
    assert out.dtype == dtype and out.is_contiguous()
    assert (out - exact).abs().max() <= 1.5 * (plain - exact).abs().max() + 1e-6


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modulate(dtype, tokens):
    x = torch.randn(2, 9, 96).to(dtype)
    scale, shift = torch.randn(2, 2, tokens, 96).unbind(0)
    exact = F.layer_norm(x.double(), (96,), eps=1e-6) * (1 + scale) + shift
    rounding = torch.finfo(dtype).eps * exact.abs() + 2e-6
    assert ((modulate(x, scale, shift, 1e-6) - exact).abs() <= rounding).all()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_residual(dtype, tokens):
    x, update = torch.randn(2, 2, 9, 96).to(dtype).unbind(0)
    gate = torch.randn(2, tokens, 96)
    exact = x.double() + update.double() * gate
    rounding = torch.finfo(dtype).eps * exact.abs() + 2e-6
    assert ((gate_residual(x, update, gate) - exact).abs() <= rounding).all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_and_norm_in_one_pass(dtype, affine, gated):
    x, update = torch.randn(2, 2, 9, 96).to(dtype).unbind(0)
    gate, scale, shift = torch.randn(3, 2, 1, 96).unbind(0)
    total, out = residual_modulate(x, update, gate if gated else None, scale, shift, 1e-6, affine=affine)
    assert torch.equal(total, gate_residual(x, update, gate if gated else torch.ones_like(gate)))
    exact = F.layer_norm(total.double(), (96,), eps=1e-6) * (scale if affine else 1 + scale) + shift
    assert ((out - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 2e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_as_fp8_rows(dtype):
    x, update = torch.randn(2, 2, 9, 96).to(dtype).unbind(0)
    gate, scale, shift = torch.randn(3, 2, 1, 96).unbind(0)
    total, rows = residual_modulate(x, update, gate, scale, shift, 1e-6, fp8=True)
    wanted = quantize_rows(modulate(total.float(), scale, shift, 1e-6))
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.scale, wanted.scale, rtol=1e-6, atol=0)
    assert (rows.values.float() != wanted.values.float()).float().mean() < 0.01


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("width", [256, 96, 640, 40])  # 40: parts of 8, which no kernel turns
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_as_rotated_int8_rows(dtype, width, gated):
    x, update = torch.randn(2, 2, 9, width).to(dtype).unbind(0)
    gate, scale, shift = torch.randn(3, 2, 1, width).unbind(0)
    x[0, 3, 5], x[1, 2] = torch.inf, 0.0
    update[1, 2], shift[1] = 0.0, 0.0
    gate = gate if gated else None
    total, rows = residual_modulate(x, update, gate, scale, shift, 1e-6, int8=True)
    wanted_total, out = residual_modulate(x, update, gate, scale, shift, 1e-6)
    wanted = quantize_int8_rows(out)
    assert rows.dtype == dtype and torch.equal(total.isnan(), wanted_total.isnan())
    torch.testing.assert_close(total, wanted_total, rtol=0, atol=0, equal_nan=True)
    assert rows.scale[0, 3].isnan() and rows.scale[1, 2] == 1 / 127 and not rows.values[1, 2].any()
    fine = rows.scale.isfinite()
    torch.testing.assert_close(rows.scale, wanted.scale, rtol=0.008, atol=0, equal_nan=True)
    assert (rows.values.int() - wanted.values.int())[fine].abs().max() <= 1
    whole = modulate(x[:, :, ::1], scale, shift, 1e-6, int8=True)  # without an update nothing is added
    assert whole.values.shape == x.shape


def test_wrong_arguments_are_named():
    x, (cos, sin) = torch.zeros(1, 5, 2, 8), angles(5, 8)
    with pytest.raises(ValueError, match="cos and sin must be"):
        norm_rope(x, None, None, 1e-6, cos, sin, rms=True, first=1)
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        norm_rope(x, torch.ones(16), None, 1e-6, cos, sin, rms=True)
    with pytest.raises(ValueError, match=r"gate must be \[B, 1, C\]"):
        gate_residual(x[:, :, 0], x[:, :, 0], torch.zeros(1, 8))
    row = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="update must be .* give it with its gate"):
        residual_modulate(x[:, :, 0], None, row, row, row, 1e-6)
    with pytest.raises(ValueError, match="one of fp8 and int8"):
        modulate(x[:, :, 0], row, row, 1e-6, fp8=True, int8=True)
    with pytest.raises(ValueError, match="update must be"):
        gate_residual(x[:, :, 0], x[:, :2, 0], torch.zeros(1, 1, 8))
