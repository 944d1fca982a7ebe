import inspect

import pytest
import torch
import torch.nn.functional as F

import svg
from svg.kernels import quantised_attention
from svg.kernels.common import target

pytestmark = pytest.mark.filterwarnings("ignore:svg.attention computes its plain PyTorch reference")


def inputs(S=70, Sk=70, H=4, kv_heads=4, D=64, dtype=torch.bfloat16):
    q, k, v = (
        torch.randn(2, H, S, D),
        torch.randn(2, kv_heads, Sk, D),
        torch.randn(2, kv_heads, Sk, D) + 2 * torch.randn(D),
    )
    return q.to(dtype), k.to(dtype), v.to(dtype)


def close(out, expected):
    assert out.shape == expected.shape and out.dtype == expected.dtype
    return (out.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


def test_the_first_arguments_are_pytorchs():
    names = list(inspect.signature(svg.attention).parameters)[:8]
    assert names == ["q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


@pytest.mark.parametrize("precision", ["auto", "int8-fp8", "int8-fp8-acc16", "int8-fp16"])
def test_equals_pytorch(precision):
    q, k, v = inputs()
    assert close(svg.attention(q, k, v, precision=precision), F.scaled_dot_product_attention(q, k, v))
    q, k, v = inputs(70, 129, kv_heads=2)
    options = {"is_causal": True, "scale": 0.2, "enable_gqa": True}
    out = svg.attention(q, k, v, **options, precision=precision)
    assert close(out, F.scaled_dot_product_attention(q, k, v, **options))


def test_tokens_before_heads():
    q, k, v = inputs(70, 129)
    expected, expected_lse = svg.attention(q, k, v, return_lse=True)
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out, lse = svg.attention(*turned, tensor_layout="NHD", return_lse=True)
    assert out.is_contiguous() and torch.equal(out.transpose(1, 2), expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
@pytest.mark.parametrize("shape", [(1, 129), (70, 129), (2, 1, 1, 129), (1, 4, 70, 129)])
def test_masks_equal_pytorch(shape, precision, layout):
    q, k, v = inputs(70, 129)
    mask = torch.rand(shape) < 0.8
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if layout == "NHD":
        q, k, v, expected = (x.transpose(1, 2) for x in (q, k, v, expected))
    assert close(svg.attention(q, k, v, mask, precision=precision, tensor_layout=layout), expected)


def test_a_query_that_sees_nothing_gives_zeros():
    q, k, v = inputs()
    mask = torch.ones(70, 70, dtype=torch.bool)
    mask[7] = False
    out, lse = svg.attention(q, k, v, mask, return_lse=True)
    assert (out[:, :, 7] == 0).all() and (lse[:, :, 7] == -torch.inf).all() and out.isfinite().all()


def test_nvfp4():
    q, k, v = inputs(70, 129, kv_heads=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
    out = svg.attention(q, k, v, is_causal=True, enable_gqa=True, precision="nvfp4")
    assert (out - expected).norm() < 0.1 * expected.norm()


LENGTHS = torch.tensor([0, 30, 31, 100]), torch.tensor([0, 50, 53, 90])


def test_packed_sequences_equal_each_by_itself():
    q, k, v = (torch.randn(n, h, 64).bfloat16() + 2 for n, h in ((100, 4), (90, 2), (90, 2)))
    options = {"is_causal": True, "enable_gqa": True}
    out, lse = svg.attention_varlen(q, k, v, *LENGTHS, **options, precision="int8-fp16", return_lse=True)
    assert out.shape == q.shape and lse.shape == (4, 100)
    for rows, keys in zip(zip(*(LENGTHS[0][:-1], LENGTHS[0][1:])), zip(*(LENGTHS[1][:-1], LENGTHS[1][1:]))):
        part = [q[slice(*rows)], k[slice(*keys)], v[slice(*keys)]]
        one = [x.transpose(0, 1)[None] for x in part]
        expected = F.scaled_dot_product_attention(*one, **options)
        assert close(out[slice(*rows)], expected[0].transpose(0, 1))


def test_packed_sequences_compile_to_one_graph():
    q, k, v = (torch.randn(n, 2, 64).bfloat16() for n in (100, 90, 90))
    compiled = torch.compile(svg.attention_varlen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, *LENGTHS), svg.attention_varlen(q, k, v, *LENGTHS))
    torch.library.opcheck(
        svg.functional.quantised._attention_varlen, (q, k, v, *LENGTHS, "auto", True, 0.1, True, False, True)
    )


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"q must be \[T, H, D\]", {"q": torch.zeros(1, 100, 2, 64)}),
        (ValueError, "pass enable_gqa=True", {"q": torch.zeros(100, 4, 64).bfloat16()}),
        (ValueError, "k_ends must rise", {"cu_seqlens_k": torch.tensor([0, 50, 30, 90])}),
        (NotImplementedError, "no backward pass", {"q": torch.zeros(100, 2, 64, requires_grad=True)}),
        (TypeError, "unexpected keyword argument 'max_seqlen_q'", {"max_seqlen_q": 70}),
    ],
)
def test_wrong_packed_arguments_are_named(error, match, change):
    q, k, v = (torch.randn(n, 2, 64).bfloat16() for n in (100, 90, 90))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": LENGTHS[0], "cu_seqlens_k": LENGTHS[1]}
    with pytest.raises(error, match=match):
        svg.attention_varlen(**arguments | change)


def test_is_the_kernels_operation():
    q, k, v = inputs()
    assert torch.equal(
        svg.attention(q, k, v, precision="int4-fp16", smooth_k=False, q_groups="warp"),
        quantised_attention(q, k, v, precision="int4-fp16", smooth_k=False, q_groups="warp"),
    )


def test_the_reference_says_so():
    with pytest.warns(UserWarning, match="plain PyTorch reference on cpu"):
        svg.attention(*inputs())


def test_compiles_to_one_graph():
    def model(q, k, v):
        seen = torch.arange(q.shape[2]) != 3
        out, lse = svg.attention(q * 2, k, v, seen, is_causal=True, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for S in (70, 33):
        arguments = inputs(S, S)
        for got, expected in zip(compiled(*arguments), model(*arguments), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("return_lse", [True, False])
@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 1, 4, dtype=torch.bool)])
def test_registration_is_sound(return_lse, mask):
    turned = [x.transpose(1, 2) for x in inputs()]
    options = (False, 0.1, False, True, False, "token", "block", return_lse)
    torch.library.opcheck(svg.functional.quantised._attention, (*turned, mask, "auto", *options))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (NotImplementedError, "attn_mask must be bool", {"attn_mask": torch.zeros(70, 70)}),
        (ValueError, "attn_mask must be broadcastable", {"attn_mask": torch.ones(70, 71, dtype=torch.bool)}),
        (ValueError, "have no meaning in nvfp4", {"precision": "nvfp4", "smooth_v": True}),
        (NotImplementedError, "dropout_p must be 0, got 0.1", {"dropout_p": 0.1}),
        (NotImplementedError, "no backward pass", {"q": torch.zeros(2, 4, 70, 64, requires_grad=True)}),
        (NotImplementedError, "nested", {"q": torch.nested.nested_tensor([torch.zeros(3, 4)])}),
        (NotImplementedError, "at most 128, got 160", {name: torch.zeros(2, 4, 70, 160) for name in "qkv"}),
        (ValueError, "pass enable_gqa=True", {name: torch.zeros(2, 2, 70, 64).bfloat16() for name in "kv"}),
        (ValueError, "tensor_layout must be one of HND, NHD", {"tensor_layout": "SBH"}),
        (ValueError, "precision must be one of", {"precision": "int2"}),
        (TypeError, "share one dtype", {"v": torch.zeros(2, 4, 70, 64)}),
        (TypeError, "unexpected keyword argument 'sm_scale'", {"sm_scale": 1.0}),
    ],
)
def test_wrong_arguments_are_named(error, match, change):
    with pytest.raises(error, match=match):
        svg.attention(**dict(zip("qkv", inputs(), strict=True)) | change)


def test_gpus_without_fp8_take_the_safe_mode(monkeypatch):
    q, k, v = inputs()
    safe = svg.attention(q, k, v, precision="int8-fp16")
    monkeypatch.setattr(target, "arch", lambda device: 80)
    assert torch.equal(svg.attention(q, k, v), safe)
