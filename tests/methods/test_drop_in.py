import inspect

import pytest
import torch
import torch.nn.functional as F
from svg.kernels import quantised_attention, target

import svg

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
    names = [name for name in inspect.signature(svg.attention).parameters][:8]
    assert names == ["q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


@pytest.mark.parametrize("precision", ["auto", "int8-fp8", "int8-fp16"])
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
        out, lse = svg.attention(q * 2, k, v, is_causal=True, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for S in (70, 33):
        arguments = inputs(S, S)
        for got, expected in zip(compiled(*arguments), model(*arguments), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("return_lse", [True, False])
def test_registration_is_sound(return_lse):
    turned = [x.transpose(1, 2) for x in inputs()]
    options = (False, 0.1, False, True, False, "token", "block", return_lse)
    torch.library.opcheck(svg.drop_in._attention, (*turned, "auto", *options))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (NotImplementedError, "attn_mask is not supported", {"attn_mask": torch.ones(70, 70, dtype=torch.bool)}),
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
