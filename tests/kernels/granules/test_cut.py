"""Keys and values cut into granules: operation against the definition, granule by granule."""

import pytest
import torch

from svg.kernels.common import target
from svg.kernels.granules import cut_granules
from svg.kernels.granules.reference import cut_granules_reference

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")


def problem(V, text=0, *, B=2, H=2, D=40, dtype=torch.float32):
    """k and v as views of [B, S, H, D] with a large common mean; part of the text before the video, the rest behind."""
    S, first = V + text, text // 3
    k, v = ((torch.randn(B, S, H, D) + 3).to(dtype).transpose(1, 2) for _ in range(2))
    order = (torch.rand(B, H, V).argsort(-1) + first).int()
    places = torch.arange(S)
    words = torch.cat([places[:first], places[first + V :]]).expand(B, -1) if text else None
    prompt = torch.tensor([text, text // 2])[:B] if text else None
    return k, v, order, words, prompt


def granules_of(order, words, prompt, size):
    """The definition: original indices of each granule's tokens, the video's first."""
    parts = list(order.long().split(size))
    if words is not None:
        kept = words[:prompt]
        parts += [kept[i : i + size] for i in range(0, len(words), size)]
    return parts


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize(("V", "text"), [(1, 0), (15, 0), (64, 16), (131, 21)])
def test_granules_match_the_definition(V, text, size):
    k, v, order, words, prompt = problem(V, text)
    found = cut_granules(k, v, order, size, words, prompt)
    T = -(-V // size)
    C = T + -(-text // size)
    assert found.k.shape == found.v.shape == (2, 2, C * size, 40)
    assert found.k_mean.shape == found.v_mean.shape == (2, 2, T, 40)
    for b, h in ((0, 1), (1, 0)):
        parts = granules_of(
            order[b, h], None if words is None else words[b], text if prompt is None else prompt[b], size
        )
        assert len(parts) == C and found.tokens[b].tolist() == [len(part) for part in parts]
        for c, part in enumerate(parts):
            for x, moved in ((k, found.k), (v, found.v)):
                rows = moved[b, h, c * size : (c + 1) * size]
                assert torch.equal(rows[: len(part)], x[b, h, part]) and not rows[len(part) :].any()
        for t, part in enumerate(parts[:T]):
            keys, values = k[b, h, part].double(), v[b, h, part].double()
            exact = (
                keys.mean(0), values.mean(0), keys.var(0, correction=0).mean(),
                values.mean(0).square().sum() + values.var(0, correction=0).sum(),
            )  # fmt: skip
            ours = (found.k_mean[b, h, t], found.v_mean[b, h, t], found.spread[b, h, t], found.weight[b, h, t])
            for a, e in zip(ours, exact):
                torch.testing.assert_close(a.double(), e, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 128])
def test_statistics_in_16_bits(dtype, D):
    k, v, order, words, prompt = problem(77, 20, D=D, dtype=dtype)
    found = cut_granules(k, v, order.long(), 16, words.int(), prompt.int())
    exact = cut_granules_reference(k.double(), v.double(), order, 16, words, prompt)
    assert found.k.dtype == found.v_mean.dtype == dtype
    assert torch.equal(found.k.double(), exact.k)
    torch.testing.assert_close(found.k_mean.double(), exact.k_mean, rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(found.spread, exact.spread, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.weight, exact.weight, rtol=1e-5, atol=1e-5)


def test_equal_keys_have_no_spread():
    k, v, order, _, _ = problem(100, dtype=torch.bfloat16)
    k = k[:, :, :1].expand_as(k)
    found = cut_granules(k, v, order, 16)
    assert not found.spread.any() and torch.equal(found.k_mean, k[:, :, :7])


def test_orders_of_one_head_serve_all():
    k, v, order, words, _ = problem(50, 5)
    shared = order[:1, :1].expand(2, 2, -1)
    found, exact = (cut_granules(k, v, o, 16, words) for o in (shared, shared.contiguous()))
    for name in ("k", "v", "tokens", "k_mean", "spread", "weight"):
        assert torch.equal(getattr(found, name), getattr(exact, name))


def test_statistics_alone_and_some_heads_only():
    k, v, order, words, prompt = problem(50, 9)
    whole = cut_granules(k, v, order, 16, words, prompt)
    few = cut_granules(k, v, order, 16, words, prompt, gather=False)
    assert few.k is None and few.v is None
    only = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    some = cut_granules(k, v, order, 16, words, prompt, only=only)
    wanted = only != 0
    for name in ("k", "v", "k_mean", "v_mean", "spread", "weight"):
        assert torch.equal(getattr(some, name)[wanted], getattr(whole, name)[wanted])
    for name in ("tokens", "k_mean", "v_mean", "spread", "weight"):
        assert torch.equal(getattr(few, name), getattr(whole, name))
    assert torch.equal(some.tokens, whole.tokens)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": 24}, ValueError, "size must be one of 8, 16, 32, 64 keys, got 24"),
        ({"v": torch.zeros(1, 1, 8, 4)}, ValueError, "of one shape and dtype"),
        ({"k_order": torch.zeros(1, 1, 9, dtype=torch.int32)}, ValueError, "1 <= V <= S"),
        ({"k_order": torch.zeros(1, 1, 4)}, TypeError, "k_order must be int32 or int64, got torch.float32"),
        ({"text": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, r"text must be \[B, L\]"),
        ({"prompt_tokens": torch.zeros(1, dtype=torch.int32)}, ValueError, "go with text"),
        ({"only": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, r"only must be \[B, H\] = \[1, 1\]"),
    ],
)
def test_wrong_inputs(change, error, message):
    k = torch.zeros(1, 1, 8, 8)
    inputs = {"k": k, "v": k, "k_order": torch.arange(8).view(1, 1, 8).int(), "size": 16} | change
    with pytest.raises(error, match=message):
        cut_granules(**inputs)


@in_interpreter
def test_limits_of_the_kernel():
    k = torch.zeros(1, 1, 8, 136)
    with pytest.raises(NotImplementedError, match="head dim must be at most 128, got 136"):
        cut_granules(k, k, torch.arange(8).view(1, 1, 8).int(), 16)
