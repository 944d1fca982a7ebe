"""Attention over granules in 8 bits: against the definition and the specification, whatever the shapes."""

import time

import pytest
import torch

from svg.kernels.granules.quantize import quantize_granules, quantize_granules_reference
from svg.kernels.granules.quantized import granule_attention_quantized, granule_attention_quantized_reference
from svg.kernels.granules.reference import cut_granules_reference, granule_attention_reference, lists_of


@pytest.fixture(autouse=True)
def seed(request):
    """Fresh shapes in every run; the seed is shown when a test fails."""
    chosen = time.time_ns() % 2**31
    print("seed", chosen)
    torch.manual_seed(chosen)


def calls(B=2, H=2, V=None, L=None, D=64, size=16, rows=64, dtype=torch.bfloat16):
    """Inputs of a call whose text lies around the video, orders, and random lists."""
    V = int(torch.randint(1, 300, ())) if V is None else V
    L = int(torch.randint(0, 40, ())) if L is None else L
    S = V + L
    q, k, v = (torch.randn(B, S, H, D) for _ in range(3))
    k = 0.5 * k + 4 * torch.randn(D) * (torch.rand(D) < 0.2)
    v = v + 2 * torch.randn(D)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    before = L // 2
    q_order, k_order = (torch.rand(2, B, H, V).argsort(-1) + before).int()
    prompt = torch.randint(0, L + 1, (B,)) if L else None
    text = torch.cat([torch.arange(before), torch.arange(before + V, S)]).expand(B, -1) if L else None
    layout = {"size": size, "text": text, "prompt_tokens": prompt}
    granules = cut_granules_reference(k, v, k_order, *layout.values())
    T = granules.k_mean.shape[2]
    chosen = torch.rand(B, H, -(-V // rows), T) < 0.3
    chosen |= granules.tokens[:, None, None, :T] < size
    return q, k, v, q_order, k_order, layout, granules, lists_of(chosen, granules.tokens, size, rows)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(
    "size, D, dtype, interleave",
    [
        (8, 64, torch.float16, False),
        (16, 96, torch.bfloat16, True),
        (64, 128, torch.float32, False),
        (32, 64, torch.float16, True),
    ],
)
def test_quantized_granules_are_what_was_cut(size, D, dtype, interleave):
    _, k, v, _, k_order, layout, granules, _ = calls(D=D, size=size, dtype=dtype)
    got = quantize_granules(k, v, k_order, **layout, interleave=interleave)
    right = quantize_granules_reference(k, v, k_order, **layout, interleave=interleave)
    assert (got.k.int() - right.k.int()).abs().max() <= 1
    assert (got.tail_k.int() - right.tail_k.int()).abs().max() <= 1
    for name in ("k_scale", "k_mean", "v_scale", "v_mean"):
        torch.testing.assert_close(getattr(got, name), getattr(right, name), rtol=1e-5, atol=1e-6)
    for name in ("v", "tail_v"):
        torch.testing.assert_close(getattr(got, name).float(), getattr(right, name).float(), rtol=0.13, atol=1e-2)
    T = got.means
    means = got.tail_k[:, :, :T, :D].float() * got.k_scale[..., None, None] + got.k_mean[:, :, None]
    torch.testing.assert_close(means, granules.k_mean.float(), rtol=0.01, atol=0.6 * got.k_scale.max().item())
    assert torch.equal(got.tokens, granules.tokens)
    keys = got.k[..., :D].float() * got.k_scale[..., None, None] + got.k_mean[:, :, None]
    inside = (torch.arange(size) < granules.tokens[..., None]).flatten(1)[:, None, :, None]
    off = torch.where(inside, keys - granules.k.float(), 0).abs()
    assert (off <= 0.51 * got.k_scale[..., None, None] + 1e-6).all()


@pytest.mark.parametrize(
    "size, rows, D, dtype, precision",
    [
        (16, 128, 128, torch.bfloat16, "int8-fp8"),
        (16, 64, 96, torch.float16, "int8-fp16"),
        (8, 64, 64, torch.float32, "int8-fp8"),
        (32, 128, 64, torch.float16, "int8-fp8"),
        (64, 64, 40, torch.bfloat16, "int8-fp16"),
        (16, 128, 64, torch.float16, "int8-fp8-acc16"),
        (16, 32, 64, torch.bfloat16, "int8-fp8"),
        (16, 16, 128, torch.float16, "int8-fp16"),
    ],
)
@pytest.mark.parametrize("tail", [True, False])
def test_attention_is_close_to_the_unquantized_one(size, rows, D, dtype, precision, tail):
    q, k, v, q_order, k_order, layout, granules, lists = calls(D=D, size=size, rows=rows, dtype=dtype)
    quantized = quantize_granules(k, v, k_order, **layout, precision=precision, interleave=False)
    poison = torch.full_like(q, 7.0)
    failed = torch.zeros(q.shape[:2], dtype=torch.int32)
    plan = {"q_order": q_order, "tail": tail, "return_lse": True}
    out, lse = granule_attention_quantized(q, quantized, lists, **plan, out=poison, failed=failed)
    exact, right = granule_attention_reference(q.float(), granules, lists, **plan, out=torch.full_like(q.float(), 7.0))
    assert out is poison and not failed.any()
    named = right > -torch.inf
    assert torch.equal(lse > -torch.inf, named)
    if not named.any():  # one whole granule without text, that nothing lists: nobody has anything to attend to
        assert torch.equal(out, exact.to(out.dtype))
        return
    assert relative(out[named], exact[named]) < 0.05
    assert (lse - right)[named].abs().max() < 0.1 and (lse - right)[named].abs().mean() < 0.02
    spec, spec_lse = granule_attention_quantized_reference(q, quantized, lists, **plan, out=torch.full_like(q, 7.0))
    assert relative(out, spec) < 0.02
    torch.testing.assert_close(lse, spec_lse, rtol=2e-3, atol=2e-3)


def test_everything_listed_is_dense_attention():
    q, k, v, q_order, k_order, layout, granules, lists = calls(L=0, D=64)
    all_of_them = torch.ones(*lists.counts.shape, granules.k_mean.shape[2], dtype=torch.bool)
    lists = lists_of(all_of_them, granules.tokens, 16, lists.rows)
    quantized = quantize_granules(k, v, k_order, **layout, interleave=False)
    out = granule_attention_quantized(q, quantized, lists, q_order=q_order)
    dense = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert relative(out, dense) < 0.05


def test_constant_keys_in_a_granule_are_compensated_exactly():
    q, _, _, q_order, _, _, _, _ = calls(B=1, H=2, V=160, L=0)
    k, v = (torch.randn(1, 2, 10, 64).repeat_interleave(16, 2).bfloat16() for _ in range(2))
    k_order = torch.arange(160).expand(1, 2, -1)
    quantized = quantize_granules(k, v, k_order, size=16, precision="int8-fp16")
    outs = []
    for kept in (torch.ones(1, 2, 3, 10, dtype=torch.bool), torch.rand(1, 2, 3, 10) < 0.4):
        lists = lists_of(kept, quantized.tokens, 16, 64)
        outs.append(granule_attention_quantized(q, quantized, lists, q_order=q_order))
    assert relative(outs[1], outs[0]) < 0.005


def test_nothing_listed_and_no_tail_gives_zeros():
    q, k, v, q_order, k_order, layout, granules, lists = calls(B=1, V=64, L=0)
    nothing = torch.zeros(*lists.counts.shape, 4, dtype=torch.bool)
    lists = lists_of(nothing, granules.tokens, 16, lists.rows)
    quantized = quantize_granules(k, v, k_order, **layout, interleave=False)
    out, lse = granule_attention_quantized(q, quantized, lists, q_order=q_order, tail=False, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("where", "qk")
def test_a_head_with_numbers_that_are_not_finite_is_reported(where):
    q, k, v, q_order, k_order, layout, _, lists = calls(B=1, V=100, L=0)
    {"q": q, "k": k}[where][0, 1, 3, 5] = float("nan")
    quantized = quantize_granules(k, v, k_order, **layout, interleave=False)
    failed = torch.zeros(1, 4, dtype=torch.int32)
    granule_attention_quantized(q, quantized, lists, q_order=q_order, failed=failed[:, ::2])
    assert failed.tolist() == [[0, 0, 1, 0]]


def test_values_that_are_not_finite_show():
    q, k, v, q_order, k_order, layout, _, lists = calls(B=1, V=100, L=0)
    v[0, 1, 3, 5] = float("nan")
    out = granule_attention_quantized(
        q, quantize_granules(k, v, k_order, **layout, interleave=False), lists, q_order=q_order
    )
    assert out[0, 1, :, 5].isnan().all() and out[0, 0].isfinite().all()


def test_two_runs_give_the_same_bits():
    q, k, v, q_order, k_order, layout, _, lists = calls()
    runs = []
    for _ in range(2):
        quantized = quantize_granules(k, v, k_order, **layout, interleave=False)
        runs.append(granule_attention_quantized(q, quantized, lists, q_order=q_order))
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"size": 24}, "size must be"),
        ({"precision": "int4-fp8"}, "precision must be"),
    ],
)
def test_bad_settings_are_refused(change, words):
    _, k, v, _, k_order, layout, _, _ = calls(L=0)
    with pytest.raises(ValueError, match=words):
        quantize_granules(k, v, k_order, **layout | change)


def test_lists_of_other_rows_are_refused():
    q, k, v, q_order, k_order, layout, _, lists = calls(V=200, L=0)
    quantized = quantize_granules(k, v, k_order, **layout, interleave=False)
    with pytest.raises(ValueError, match="select with the same q_order"):
        granule_attention_quantized(q, quantized, lists, q_order=q_order[:, :, :100])


def test_groups_of_few_rows_and_interleaved_values_do_not_go_together():
    q, k, v, q_order, k_order, layout, _, lists = calls(L=0, rows=32)
    quantized = quantize_granules(k, v, k_order, **layout, interleave=True)
    with pytest.raises(ValueError, match="lists.rows must be at least 64 for values that are interleaved, got 32"):
        granule_attention_quantized(q, quantized, lists, q_order=q_order)
