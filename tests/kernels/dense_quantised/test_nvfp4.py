import pytest
import quantised_inputs
import torch
from quantised_inputs import cosine, exact, outliers

from svg.kernels.common import target
from svg.kernels.dense_quantised.nvfp4 import fp4_attention, fp4_attention_reference
from svg.kernels.quantize.nvfp4 import dequantize_nvfp4, quantize_nvfp4, round_nvfp4

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")


@pytest.fixture(params=["emulated", pytest.param("native", marks=in_interpreter)])
def hardware(request, monkeypatch):
    """The kernel as sm90 and as sm100 run it; the native products are computed by the corrected interpreter."""
    if request.param == "native":
        monkeypatch.setattr(target, "arch", lambda device: 100)


def assert_accurate(arguments, at_least=0.995, **options):
    found = fp4_attention(*arguments, return_lse=True, **options)
    spec = fp4_attention_reference(*arguments, **options)
    quantised_inputs.assert_accurate(found, exact(*arguments, **options), spec, arguments[0], at_least, 0.1)


@pytest.mark.parametrize("S", [1, 63, 65, 127, 129])
def test_odd_lengths(S, hardware):
    assert_accurate(outliers(S))


@pytest.mark.parametrize("tail", [65, 127])
def test_key_tails(tail, hardware):
    assert_accurate(outliers(63, 128 + tail))


@pytest.mark.parametrize(("D", "dtype"), [(16, torch.float32), (96, torch.bfloat16), (128, torch.float16)])
def test_head_dims(D, dtype, hardware):
    assert_accurate(outliers(129, D=D, dtype=dtype))


@pytest.mark.parametrize("shape", [(129, 129), (63, 200), (200, 63)])
def test_causal_with_shared_key_heads(shape, hardware):
    assert_accurate(outliers(*shape, H=4, kv_heads=2), is_causal=True)


def test_masks(hardware):
    q, k, v = outliers(70, 129, B=2)
    keys = torch.rand(2, 1, 1, 129) < 0.5
    pairs = torch.rand(1, 2, 70, 129) < 0.5
    pairs[:, :, 3] = False
    for mask in (keys, pairs):
        assert_accurate((q, k, v), mask=mask)
    assert (fp4_attention(q, k, v, mask=pairs)[:, :, 3] == 0).all()


def error(arguments, **options):
    right, _ = exact(*arguments, sm_scale=options.get("sm_scale"))
    return (fp4_attention(*arguments, **options) - right).norm().item()


def test_smoothing_matters():
    q, k, _ = outliers(129, 200)
    v = torch.randn(1, 2, 200, 64).sign().bfloat16()  # e2m1 holds it: only the scores' error is left
    assert error((q, k, v)) < 0.6 * error((q, k, v), smooth_k=False)
    q = (q + 12 * torch.randn(64)).bfloat16()
    assert error((q, k, v), sm_scale=0.03) < 0.7 * error((q, k, v), sm_scale=0.03, smooth_q=False)


def test_two_levels_of_p_matter():
    """Scales of P itself, at most 1/6, leave e4m3's normal range for all but a row's largest; 2688 P uses all of it."""
    p = 0.006 * torch.rand(64, 4096)
    p[:, 0] = 1.0  # an attention sink

    def lost(factor):
        values, scale = round_nvfp4(p * factor)
        near = (values.unflatten(-1, (-1, 16)) * scale[..., None]).flatten(-2)
        return 1 - cosine(near[:, 16:], p[:, 16:])

    assert lost(6 * 448.0) < 0.01 < lost(1.0)


def test_zero_inputs_and_a_failed_head(hardware):
    q, k, v = outliers(65, 100)
    zeros = torch.zeros_like(q)
    assert (fp4_attention(zeros, zeros, zeros) == 0).all()
    failed = torch.zeros(1, 2, dtype=torch.int32)
    fp4_attention(q, k, v, failed=failed)
    assert failed.sum() == 0
    q = q.clone()
    q[0, 1, 3, 5] = torch.inf
    fp4_attention(q, k, v, failed=failed)
    assert failed.tolist() == [[0, 1]]


def test_equals_attention_on_the_dequantised_inputs():
    """The emulation is exact: with queries that see one key only, out is that key's quantised value."""
    q, k, v = outliers(32, 32, dtype=torch.float32)
    mask = torch.eye(32, dtype=torch.bool)[None, None]
    values = dequantize_nvfp4(quantize_nvfp4(v.contiguous(), transposed=True, packed=True)).mT[:, :, :32]
    torch.testing.assert_close(fp4_attention(q, k, v, mask=mask), values, rtol=1e-6, atol=1e-6)


@in_interpreter
def test_gradients_are_refused():
    q, k, v = outliers(63)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        fp4_attention(q.clone().requires_grad_(), k, v)
