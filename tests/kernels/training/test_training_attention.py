import pytest
import torch

from svg.kernels import (
    block_sparse_attention,
    block_sparse_attention_quantised,
    gather_tokens,
    probe_attention,
    quantised_attention,
    scatter_tokens,
    training_attention,
    training_attention_backward,
    training_attention_reference,
)
from svg.kernels.common import target
from svg.kernels.dense_quantised.nvfp4 import fp4_attention
from svg.kernels.training import backward
from svg.kernels.training.backward import BackwardLaunch
from svg.kernels.training.forward import LAUNCH, Launch

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")
BARS = {"out": 0.0195, "dq": 0.020, "dk": 0.024, "dv": 0.018}  # of the relative l2 error, at N(0, 1)


def normal(S, Sk=None, D=64, dtype=torch.float32, B=1, H=2, kv_heads=2):
    """q, k, v and the gradient of the output, as views of [B, S, H, D]."""
    shapes = ((S, H), (Sk or S, kv_heads), (Sk or S, kv_heads), (S, H))
    return tuple(torch.randn(B, tokens, heads, D).to(dtype).transpose(1, 2) for tokens, heads in shapes)


def one(q, k, v, is_causal, sm_scale):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * sm_scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -torch.inf)
    return scores.softmax(-1) @ v


def exact(q, k, v, grad, is_causal=False, sm_scale=None, cu_seqlens_q=None, cu_seqlens_k=None):
    """out, dq, dk, dv of attention from the definition, in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    starts_q, starts_k = (
        [0, x.shape[2]] if c is None else c.tolist() for x, c in ((q, cu_seqlens_q), (k, cu_seqlens_k))
    )
    parts = [
        one(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], is_causal, sm_scale) if d > c else torch.zeros_like(q[:, :, a:b])
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    ]
    out = torch.cat(parts, 2)
    out.backward(grad.double())
    return out.detach(), q.grad, k.grad, v.grad


def computed(q, k, v, grad, products="int8", **options):
    """out, dq, dk, dv in INT8."""
    out, kept = training_attention(q, k, v, **options)
    options = {"sm_scale": q.shape[-1] ** -0.5} | options
    gradients = training_attention_backward(grad, out, kept, key_tokens=k.shape[2], products=products, **options)
    for result, like in zip((out, *gradients), (q, q, k, v), strict=True):
        assert result.shape == like.shape and result.dtype == like.dtype and result.transpose(1, 2).is_contiguous()
    return out, *gradients


def errors(results, right):
    """Relative l2 errors by name; an exact zero asks for zero."""
    return {
        name: ((a.double() - b).norm() / b.norm().clamp(min=1e-3)).item()
        for name, a, b in zip(BARS, results, right, strict=True)
    }


def assert_accurate(arguments, products="int8", **options):
    found = errors(computed(*arguments, products, **options), exact(*arguments, **options))
    bars = BARS if products == "int8" else BARS | {"dq": 0.0135, "dk": 0.0135, "dv": 0.0115}
    assert all(found[name] <= bar for name, bar in bars.items()), found


@pytest.mark.parametrize("D", [64, 128])
def test_errors_at_unit_normal_inputs(D):
    assert_accurate(normal(384, D=D, H=1, kv_heads=1))


def test_errors_at_unit_normal_inputs_of_more_tokens():
    if target.INTERPRETED:
        pytest.skip("the interpreter would take a minute")
    assert_accurate(normal(2048, D=128, H=1, kv_heads=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("S", [1, 63, 65, 129])
def test_odd_lengths(S):
    assert_accurate(normal(S, H=1, kv_heads=1))


@pytest.mark.parametrize(("S", "Sk", "D"), [(70, 130, 96), (130, 70, 16), (40, 193, 80)])
def test_other_shapes(S, Sk, D):
    assert_accurate(normal(S, Sk, D, H=1, kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    assert_accurate(normal(80, dtype=dtype))


@pytest.mark.parametrize(("S", "Sk"), [(150, 150), (70, 130), (130, 70)])
def test_causal(S, Sk):
    assert_accurate(normal(S, Sk, H=1, kv_heads=1), is_causal=True)


def test_shared_key_heads_and_a_batch():
    assert_accurate(normal(70, 90, B=2, H=4, kv_heads=2))


@pytest.mark.parametrize("is_causal", [False, True])
def test_sequences_of_different_lengths(is_causal):
    """One is empty, one has no keys, one no queries; each sees itself only."""
    starts_q, starts_k = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 70, 70, 73, 73, 203], [0, 130, 130, 130, 135, 200])
    )
    assert_accurate(normal(203, 200, kv_heads=1), is_causal=is_causal, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)


def test_packed_sequences_equal_a_batch_of_each():
    arguments = normal(140)
    starts = torch.tensor([0, 60, 140], dtype=torch.int32)
    packed = computed(*arguments, cu_seqlens_q=starts, cu_seqlens_k=starts)
    for part in (slice(0, 60), slice(60, 140)):
        alone = computed(*(x[:, :, part].transpose(1, 2).contiguous().transpose(1, 2) for x in arguments))
        for a, b in zip(packed, alone, strict=True):
            assert (a[:, :, part] - b).norm() <= 0.02 * b.norm()  # the means are those of all tokens


def test_gradients_summed_in_bf16_are_more_accurate():
    assert_accurate(normal(200, D=128, H=1, kv_heads=1), "bf16")
    assert_accurate(normal(70, 130, D=80, H=4, B=2), "bf16", is_causal=True)
    starts = torch.tensor([0, 70, 150], dtype=torch.int32)
    assert_accurate(normal(150, kv_heads=1), "bf16", cu_seqlens_q=starts, cu_seqlens_k=starts)


def test_given_scale():
    assert_accurate(normal(70), sm_scale=0.3 / 8)


def test_means_of_keys_and_values_cost_nothing():
    q, k, v, grad = normal(150)
    k, v = k + 8 * torch.randn(64), v + 20 * torch.randn(64)
    right, found = exact(q, k, v, grad), computed(q, k, v, grad)
    assert torch.nn.functional.cosine_similarity(found[0].double().flatten(), right[0].flatten(), dim=0) > 0.9999
    got = errors(found, right)
    assert all(got[name] <= BARS[name] for name in ("dq", "dk", "dv")), got


def test_gradients_of_any_size():
    q, k, v, grad = normal(70)
    for products in ("int8", "bf16"):
        right = computed(q, k, v, grad, products)[1:]
        for size in (2.0**-40, 2.0**40):
            for a, b in zip(computed(q, k, v, grad * size, products)[1:], right, strict=True):
                assert (a / size - b).norm() <= 1e-3 * b.norm()


def test_tokens_without_a_gradient_and_zero_inputs():
    q, k, v, grad = normal(150)
    grad[:, :, :130], k[:, :, 10:20], q[:, :, 100:] = 0, 0, 0
    assert_accurate((q, k, v, grad))
    zeros = torch.zeros_like(q)
    assert all((x == 0).all() for x in computed(zeros, zeros, zeros, zeros))


@pytest.mark.parametrize("products", ["int8", "bf16"])
@pytest.mark.parametrize("which", range(4))
def test_what_is_not_finite_shows(which, products):
    arguments = [x.clone() for x in normal(70)]
    arguments[which][0, 0, 3, 5] = float("nan")
    out, dq, dk, dv = computed(*arguments, products)
    assert out[0, 0, 3].isnan().any() or which == 3
    assert dq[0, 0, 3].isnan().any() and dk[0, 0].isnan().any()
    assert dv[0, 0].isnan().any() or which == 2  # V has no part in dV
    assert all(x[0, 1].isfinite().all() for x in (out, dq, dk, dv))


def test_two_runs_are_bit_equal_and_inputs_stay():
    arguments = normal(150, dtype=torch.bfloat16)
    before = [x.clone() for x in arguments]
    assert all(torch.equal(a, b) for a, b in zip(computed(*arguments), computed(*arguments), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, arguments, strict=True))


@in_interpreter
def test_the_kernel_keeps_what_the_reference_keeps():
    q, k, v, _ = normal(150, 200)
    out, kept = training_attention(q, k, v, is_causal=True)
    expected, right = training_attention_reference(q, k, v, is_causal=True)
    for name in ("queries", "keys"):
        assert (getattr(kept, name).int() - getattr(right, name).int()).abs().max() <= 1
    for name in ("q_scale", "k_scale", "v_mean", "lse"):
        torch.testing.assert_close(getattr(kept, name), getattr(right, name), rtol=1e-3, atol=1e-3)
    assert (out - expected).norm() <= 0.01 * expected.norm()


@in_interpreter
@pytest.mark.parametrize(
    ("forward", "query", "key", "value"),
    [
        (Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(64, 64, 4, 2), Launch(32, 64, 4, 2)),
        (Launch(128, 32, 8, 2, True), Launch(32, 64, 4, 2, True), Launch(32, 128, 4, 2, True), None),
    ],
)
def test_every_way_to_launch(forward, query, key, value, monkeypatch):
    monkeypatch.setitem(LAUNCH[90], 64, forward)
    for products in ("int8", "bf16"):
        monkeypatch.setitem(backward.LAUNCH[90], (products, 64), BackwardLaunch(query, key, value))
        assert_accurate(normal(130, 150, H=1, kv_heads=1), products, is_causal=True)


starts = torch.tensor([0, 30, 63], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "sm_scale must be positive", {"sm_scale": -1.0}),
        (ValueError, r"k, v \[B, Hkv, Sk, D\]", {"k": torch.zeros(1, 2, 70, 64)}),
        (ValueError, "heads must divide", {name: torch.zeros(1, 3, 63, 64) for name in "kv"}),
        (ValueError, "contiguous in its last dim", {"q": torch.zeros(1, 2, 64, 63).mT}),
        (ValueError, "given together", {"cu_seqlens_q": starts}),
        (ValueError, r"int32 \[N \+ 1\]", {"cu_seqlens_q": starts, "cu_seqlens_k": starts.long()}),
        (ValueError, "on q's device cpu, got meta", {f"cu_seqlens_{side}": starts.to("meta") for side in "qk"}),
        (ValueError, "must rise from 0 to 63", {"cu_seqlens_q": starts, "cu_seqlens_k": starts - 1}),
        (TypeError, "share one dtype", {"v": torch.zeros(1, 2, 63, 64).bfloat16()}),
        (TypeError, "q must be fp16, bf16 or fp32", {"q": torch.zeros(1, 2, 63, 64).double()}),
        (NotImplementedError, "at most 128, got 160", {name: torch.zeros(1, 2, 63, 160) for name in "qkv"}),
    ],
)
def test_wrong_arguments_are_named(error, match, change):
    with pytest.raises(error, match=match):
        training_attention(**dict(zip("qkv", normal(63)[:3], strict=True)) | change)


def test_packed_sequences_need_one_row():
    with pytest.raises(ValueError, match="needs a batch of 1, got 2"):
        training_attention(*normal(63, B=2)[:3], cu_seqlens_q=starts, cu_seqlens_k=starts)


def test_operations_without_a_backward_refuse_to_record():
    """What rounds would cut a gradient silently, in plain PyTorch too; what doesn't has one there."""
    q, k, v, _ = normal(63)
    q.requires_grad_()
    whole = {"map_index": torch.zeros(1, 2, dtype=torch.int32), "precision": "int8-fp16"}
    one_block, sizes = torch.ones(1, 1, 1, dtype=torch.bool), torch.tensor([[63]], dtype=torch.int32)
    operations = [
        lambda: training_attention(q, k, v),
        lambda: quantised_attention(q, k, v, precision="int8-fp16"),
        lambda: fp4_attention(q, k, v),
        lambda: block_sparse_attention_quantised(q, k, v, one_block, sizes, sizes, **whole),
    ]
    if target.INTERPRETED:
        del whole["precision"]
        operations += [
            lambda: block_sparse_attention(q, k, v, one_block, sizes, sizes, **whole),
            lambda: gather_tokens(q, torch.arange(63).expand(1, 2, 63)),
            lambda: scatter_tokens(q, torch.arange(63).expand(1, 2, 63)),
            lambda: probe_attention(
                q, k, v, torch.ones(1, 2, 63, 63, dtype=torch.bool), torch.ones(1, 63, dtype=torch.bool)
            ),
        ]
    for operation in operations:
        with pytest.raises(NotImplementedError, match="no backward pass"):
            operation()
