import inspect

import pytest
import torch
import torch.nn.functional as F

import svg
from svg.kernels import training_attention as kernel

pytestmark = pytest.mark.filterwarnings("ignore:svg.training_attention computes its plain PyTorch reference")


def inputs(S=70, Sk=70, H=4, kv_heads=4, D=64, dtype=torch.bfloat16, B=2):
    shapes = ((B, H, S, D), (B, kv_heads, Sk, D), (B, kv_heads, Sk, D))
    return tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)


def gradients(op, arguments, **options):
    out = op(*arguments, **options)
    return out, *torch.autograd.grad((out.float() ** 2).sum(), arguments)


def close(found, expected, error=0.03):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= error * b.float().norm()


def test_the_first_arguments_are_pytorchs():
    names = list(inspect.signature(svg.training_attention).parameters)[:8]
    assert names == ["q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


@pytest.mark.parametrize("products", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_are_pytorchs(dtype, products):
    arguments = inputs(dtype=dtype)
    close(
        gradients(svg.training_attention, arguments, gradients=products),
        gradients(F.scaled_dot_product_attention, arguments),
    )
    arguments = inputs(70, 129, kv_heads=2, dtype=dtype)
    options = {"is_causal": True, "scale": 0.2, "enable_gqa": True}
    close(
        gradients(svg.training_attention, arguments, gradients=products, **options),
        gradients(F.scaled_dot_product_attention, arguments, **options),
    )


def test_tokens_before_heads():
    q, k, v = inputs(70, 129)
    expected = gradients(svg.training_attention, (q, k, v))
    turned = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
    found = gradients(svg.training_attention, turned, tensor_layout="NHD")
    assert all(x.is_contiguous() for x in found)
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(found, expected, strict=True))


def test_sequences_of_different_lengths():
    q, k, v = inputs(100, 100, B=1)
    starts = torch.tensor([0, 30, 100], dtype=torch.int32)

    def apart(q, k, v):
        parts = [
            F.scaled_dot_product_attention(*(x[:, :, part] for x in (q, k, v))) for part in (slice(30), slice(30, None))
        ]
        return torch.cat(parts, 2)

    found = gradients(svg.training_attention, (q, k, v), cu_seqlens_q=starts, cu_seqlens_k=starts)
    close(found, gradients(apart, (q, k, v)))


def test_only_what_is_asked_for():
    q, k, v = inputs()
    q.requires_grad_(False), v.requires_grad_(False)
    svg.training_attention(q, k, v).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
    with torch.no_grad():
        assert not svg.training_attention(q, k, v).requires_grad


def test_autocast_converts_as_pytorchs_does():
    q, k, v = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = svg.training_attention(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.isfinite().all()


def test_the_reference_says_so():
    with pytest.warns(UserWarning, match="plain PyTorch reference on cpu"):
        svg.training_attention(*inputs())


def test_is_the_kernels_operation():
    q, k, v = (x.detach() for x in inputs())
    assert torch.equal(svg.training_attention(q, k, v), kernel(q, k, v)[0])


def test_compiles_to_one_graph():
    def loss(q, k, v):
        return (svg.training_attention(q * 2, k, v, is_causal=True) + 1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for S in (70, 33):
        arguments = inputs(S, S, dtype=torch.float32)
        found, expected = (torch.autograd.grad(f(*arguments), arguments) for f in (compiled, loss))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_registration_is_sound(packed):
    turned = [x.detach().transpose(1, 2).requires_grad_() for x in inputs(H=70, kv_heads=70, S=4, Sk=4, D=16, B=1)]
    starts = torch.tensor([0, 30, 70], dtype=torch.int32) if packed else None
    torch.library.opcheck(svg.functional.training._forward, (*turned, starts, starts, True, 0.1, "int8"))


def test_a_second_derivative_is_refused():
    q, k, v = inputs(10, 10)
    (dq,) = torch.autograd.grad(svg.training_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (NotImplementedError, "attn_mask is not supported", {"attn_mask": torch.ones(70, 70, dtype=torch.bool)}),
        (NotImplementedError, "dropout_p must be 0, got 0.1", {"dropout_p": 0.1}),
        (NotImplementedError, "nested", {"q": torch.nested.nested_tensor([torch.zeros(3, 4)])}),
        (NotImplementedError, "at most 128, got 160", {name: torch.zeros(2, 4, 70, 160) for name in "qkv"}),
        (ValueError, "pass enable_gqa=True", {name: torch.zeros(2, 2, 70, 64).bfloat16() for name in "kv"}),
        (ValueError, "tensor_layout must be one of HND, NHD", {"tensor_layout": "SBH"}),
        (ValueError, "gradients must be one of int8, bf16", {"gradients": "fp8"}),
        (ValueError, "given together", {"cu_seqlens_q": torch.tensor([0, 70], dtype=torch.int32)}),
        (TypeError, "share one dtype", {"v": torch.zeros(2, 4, 70, 64)}),
        (TypeError, "unexpected keyword argument 'precision'", {"precision": "int8-fp8"}),
    ],
)
def test_wrong_arguments_are_named(error, match, change):
    with pytest.raises(error, match=match):
        svg.training_attention(**dict(zip("qkv", inputs(), strict=True)) | change)
