import pytest
import quantised_inputs
import torch
from quantised_inputs import cosine, exact, outliers

from svg.kernels import quantised_attention, quantised_attention_reference
from svg.kernels.common import target
from svg.kernels.common.launch import Launch
from svg.kernels.dense_quantised.triton import LAUNCH
from svg.kernels.quantize.precision import PRECISIONS

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")


def assert_accurate(arguments, at_least, **options):
    found = quantised_attention(*arguments, return_lse=True, **options)
    given = {name: options[name] for name in ("is_causal", "sm_scale", "mask") if name in options}
    spec = quantised_attention_reference(*arguments, **options)
    lse_within = 0.01 if "int8" in options["precision"] else 0.1
    quantised_inputs.assert_accurate(found, exact(*arguments, **given), spec, arguments[0], at_least, lse_within)


@pytest.mark.parametrize("S", [1, 63, 65, 127, 129])
@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp8-acc16", "int8-fp16"])
def test_odd_lengths(S, precision):
    assert_accurate(outliers(S), 0.9999, precision=precision)


@pytest.mark.parametrize("tail", [65, 96, 127])
def test_key_tails(tail):
    assert_accurate(outliers(63, 128 + tail), 0.9999, precision="int8-fp8")


@pytest.mark.parametrize("D", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_head_dims(D, precision):
    assert_accurate(outliers(129, D=D), 0.9999 if "int8" in precision else 0.994, precision=precision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
def test_dtypes(dtype, precision):
    assert_accurate(outliers(111, dtype=dtype), 0.9999, precision=precision)


@pytest.mark.parametrize("shape", [(129, 129), (63, 200), (200, 63)])
@pytest.mark.parametrize("precision", ["int8-fp8", "int4-fp16"])
def test_causal(shape, precision):
    bar = 0.9999 if "int8" in precision else 0.994
    assert_accurate(outliers(*shape), bar, precision=precision, is_causal=True)


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp8-acc16", "int4-fp16"])
def test_masks(precision):
    arguments = outliers(70, 200, B=2, H=2, kv_heads=1)
    keys = torch.rand(2, 1, 1, 200) < 0.8
    pairs = torch.rand(1, 2, 70, 200) < 0.8
    pairs[:, :, 3] = False
    pairs[:, :, 4] = torch.arange(200) >= 128  # the first tile hides everything
    bar = 0.9999 if "int8" in precision else 0.994
    for mask in (keys, pairs):
        assert_accurate(arguments, bar, precision=precision, mask=mask)
    assert (quantised_attention(*arguments, precision=precision, mask=pairs)[:, :, 3] == 0).all()
    assert_accurate(arguments, bar, precision=precision, mask=keys, is_causal=True)


def test_sums_in_fp16_stay_in_range():
    """P V of 64 keys at the largest value, all of one sign: 64 x 448 x 2.25 = 64,512."""
    q, k, _ = outliers(129, 300)
    v = torch.full_like(k, 7.0)
    out = quantised_attention(torch.zeros_like(q), k, v, precision="int8-fp8-acc16")
    torch.testing.assert_close(out, v[:, :, :129], rtol=0.005, atol=0)


def test_failed_heads_are_named():
    q, k, v = (x.clone() for x in outliers(65, 129))
    for precision in PRECISIONS:
        failed = torch.zeros(1, 2, dtype=torch.int32)
        quantised_attention(q, k, v, precision=precision, failed=failed)
        assert failed.tolist() == [[0, 0]]
    q[0, 1, 3, 5] = torch.inf
    for precision in PRECISIONS:
        failed = torch.zeros(1, 2, dtype=torch.int32)
        quantised_attention(q, k, v, precision=precision, failed=failed)
        assert failed.tolist() == [[0, 1]]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_key_heads(kv_heads):
    for precision in ("int8-fp8", "int4-fp16"):
        bar = 0.9999 if "int8" in precision else 0.994
        assert_accurate(outliers(70, 129, B=2, H=4, kv_heads=kv_heads), bar, precision=precision)


@pytest.mark.parametrize("groups", ["token", "thread", "warp", "block"])
def test_groups(groups):
    arguments = outliers(129, 200)
    assert_accurate(arguments, 0.9998, precision="int8-fp8", q_groups=groups, k_groups=groups)


def test_given_scale():
    assert_accurate(outliers(129), 0.9999, precision="int8-fp8", sm_scale=0.3)


def test_mean_free_values_cost_what_e4m3_rounds():
    """Without channel means in V nothing averages out: 3e-4 of cosine similarity for P and as much for V."""
    q, k, _ = outliers(129, 300)
    v = torch.randn(1, 2, 300, 64).bfloat16()
    right = exact(q, k, v)[0]
    assert 0.999 < cosine(quantised_attention(q, k, v, precision="int8-fp8"), right) < 0.9999
    assert cosine(quantised_attention(q, k, v, precision="int8-fp16"), right) > 0.9999


def error(arguments, **options):
    return (quantised_attention(*arguments, **options) - exact(*arguments)[0]).norm().item()


def test_smoothing_k_matters():
    for precision in ("int8-fp16", "int4-fp16"):
        arguments = outliers(129, 200)
        assert error(arguments, precision=precision) < 0.6 * error(arguments, precision=precision, smooth_k=False)


def test_smoothing_q_matters():
    q, k, v = outliers(129, 200)
    q = (q + 3 * torch.randn(64)).bfloat16()
    with_it, without = (error((q, k, v), precision="int4-fp16", smooth_q=smooth) for smooth in (True, False))
    assert with_it < 0.7 * without


def test_smoothing_v_matters():
    q, k, v = outliers(129, 200)
    v = (v + 30).bfloat16()
    with_it, without = (error((q, k, v), precision="int8-fp8", smooth_v=smooth) for smooth in (True, False))
    assert with_it < 0.7 * without
    assert_accurate((q, k, v), 0.9999, precision="int8-fp8", smooth_v=True)


@pytest.mark.parametrize("smooth_k", [True, False])
@pytest.mark.parametrize("smooth_q", [True, False])
def test_smoothing_leaves_the_lse(smooth_k, smooth_q):
    arguments = outliers(129, 200)
    _, lse = quantised_attention(
        *arguments, precision="int8-fp16", smooth_q=smooth_q, smooth_k=smooth_k, return_lse=True
    )
    assert (lse - exact(*arguments)[1]).abs().mean() < 0.1


def test_zero_blocks_and_channels():
    q, k, v = outliers(200, 300)
    q[:, :, :128], k[:, :, 128:256], v[..., 7] = 0, 0, 0
    for precision in PRECISIONS:
        out = quantised_attention(q, k, v, precision=precision, smooth_k=False)
        assert out.isfinite().all() and (out[..., 7] == 0).all()
        right = exact(q, k, v)[0]
        assert cosine(out, right) > 0.98
    zeros = torch.zeros_like(q)
    out, lse = quantised_attention(zeros, zeros, zeros, return_lse=True)
    assert (out == 0).all() and torch.allclose(lse, torch.tensor(200.0).log(), atol=1e-5)


def test_values_near_the_largest_fp16():
    q, k, _ = outliers(129, dtype=torch.float16)
    v = torch.full_like(k, 65504.0)
    for precision in ("int8-fp8", "int8-fp16"):
        out = quantised_attention(q * 1000, k, v, precision=precision)
        torch.testing.assert_close(out, v, rtol=0.04, atol=0)  # P's rounding, but never infinity


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_shows(bad, which):
    arguments = [x.clone() for x in outliers(129)]
    arguments[which][0, 0, 3, 5] = bad
    out = quantised_attention(*arguments)
    assert out[0, 0, 3, 5].isnan() and out[0, 1].isfinite().all()


def test_inputs_are_not_changed():
    arguments = outliers(129)
    before = [x.clone() for x in arguments]
    quantised_attention(*arguments, smooth_v=True, smooth_q=True)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


def test_two_runs_are_bit_equal():
    arguments = outliers(129, 200)
    assert torch.equal(quantised_attention(*arguments), quantised_attention(*arguments))


@in_interpreter
@pytest.mark.parametrize("row", [Launch(64, 64, 4, 2), Launch(128, 128, 8, 2), Launch(128, 64, 8, 2, tma=True)])
def test_every_way_to_launch(row, monkeypatch):
    """Tile sizes and tricks change the order of sums and of P's rounding, nothing else."""
    arguments = outliers(200, 300, dtype=torch.float32)
    for precision in ("int8-fp8", "int8-fp16"):
        with monkeypatch.context() as changed:
            changed.setitem(LAUNCH[90], (precision == "int8-fp8", 64), row)
            assert_accurate(arguments, 0.9999, precision=precision)
            assert_accurate(arguments, 0.9999, precision=precision, is_causal=True, k_groups="thread")


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "precision must be one of int8-fp8", {"precision": "fp4"}),
        (ValueError, "q_groups must be one of token", {"q_groups": "tensor"}),
        (ValueError, "smooth_v needs FP8", {"smooth_v": True, "precision": "int8-fp16"}),
        (ValueError, "sm_scale must be positive", {"sm_scale": -1.0}),
        (ValueError, r"k, v \[B, Hkv, Sk, D\]", {"k": torch.zeros(1, 2, 70, 64)}),
        (ValueError, "heads must divide", {name: torch.zeros(1, 3, 63, 64).bfloat16() for name in "kv"}),
        (TypeError, "share one dtype", {"v": torch.zeros(1, 2, 63, 64)}),
        (TypeError, "mask must be bool", {"mask": torch.zeros(1, 1, 1, 63)}),
        (ValueError, r"mask must be \[B, H, S, Sk\]", {"mask": torch.ones(1, 1, 1, 64, dtype=torch.bool)}),
        (TypeError, "unexpected keyword argument", {"attn_mask": None}),
        (NotImplementedError, "at most 128, got 160", {name: torch.zeros(1, 2, 63, 160) for name in "qkv"}),
    ],
)
def test_wrong_arguments_are_named(error, match, change):
    with pytest.raises(error, match=match):
        quantised_attention(**dict(zip("qkv", outliers(63), strict=True)) | change)


@in_interpreter
def test_limits_of_the_kernel_are_named(monkeypatch):
    q, k, v = outliers(63)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        quantised_attention(q.clone().requires_grad_(), k, v)
    monkeypatch.setattr(target, "arch", lambda device: 80)
    with pytest.raises(NotImplementedError, match="FP8 needs compute capability 8.9"):
        quantised_attention(q, k, v)
    assert cosine(quantised_attention(q, k, v, precision="int8-fp16"), exact(q, k, v)[0]) > 0.9999
