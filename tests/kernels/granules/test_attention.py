"""Attention over lists of granules: specification against brute force, kernel against the specification."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from svg.kernels.common import target
from svg.kernels.granules import values
from svg.kernels.granules.op import granule_attention
from svg.kernels.granules.reference import cut_granules_reference, granule_attention_reference, lists_of

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")


@dataclasses.dataclass
class Problem:
    """One call: inputs in original order, the orders, the map that the lists were made from."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_order: torch.Tensor
    k_order: torch.Tensor
    text: torch.Tensor | None
    prompt: torch.Tensor | None
    chosen: torch.Tensor
    granules: values.Granules
    lists: values.GranuleLists


def problem(
    V, text=0, *, B=2, H=2, D=64, dtype=torch.float32, size=16, rows=128, density=0.4, text_first=False, chosen=None
):
    """q, k, v as views of [B, S, H, D]; the prompt of sample 0 is all of the text, that of sample 1 half of it."""
    S = V + text
    q, k, v = (torch.randn(B, S, H, D).to(dtype).transpose(1, 2) for _ in range(3))
    offset = text if text_first else 0
    q_order, k_order = (offset + torch.rand(B, H, V).argsort(-1).to(torch.int32) for _ in range(2))
    words = (torch.arange(text) + (0 if text_first else V)).expand(B, text) if text else None
    prompt = torch.tensor([text, text // 2])[:B] if text else None
    granules = cut_granules_reference(k, v, k_order, size, words, prompt)
    T = granules.k_mean.shape[2]
    if chosen is None:
        chosen = torch.rand(B, H, -(-V // rows), T) < density
    chosen = chosen | (granules.tokens[:, None, None, :T] < size)
    lists = lists_of(chosen, granules.tokens, size, rows)
    return Problem(q, k, v, q_order, k_order, words, prompt, chosen, granules, lists)


def brute_force(p, tail, dtype=torch.float64):
    """Dense softmax over all keys under a token mask and, for the tail, over copies of the means: from the definition."""
    B, H, S, D = p.q.shape
    size, rows, V = p.granules.size, p.lists.rows, p.q_order.shape[2]
    out, lse = torch.zeros(B, H, S, D, dtype=dtype), torch.full((B, H, S), -torch.inf, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            k, v = p.k[b, h].to(dtype), p.v[b, h].to(dtype)
            order = p.k_order[b, h].long()
            words = [] if p.text is None else p.text[b, : p.prompt[b]].tolist()
            for group, row in enumerate(p.q_order[b, h].long().split(rows)):
                picked = p.chosen[b, h, group]
                index = torch.cat([order[picked.repeat_interleave(size)[:V]], torch.tensor(words, dtype=torch.long)])
                keys, vals = k[index], v[index]
                if tail:  # `size` copies of each unlisted granule's mean
                    copies = (~picked).nonzero().squeeze(1).repeat_interleave(size)
                    keys = torch.cat([keys, p.granules.k_mean[b, h, copies].to(dtype)])
                    vals = torch.cat([vals, p.granules.v_mean[b, h, copies].to(dtype)])
                if len(keys) == 0:
                    continue
                logits = p.q[b, h, row].to(dtype) @ keys.T * D**-0.5
                lse[b, h, row] = logits.double().logsumexp(-1)
                out[b, h, row] = logits.softmax(-1) @ vals
    return out, lse


def assert_matches_definition(p, tail=True):
    """The error against fp64 stays within twice the error of the plain computation in the inputs' dtype."""
    out, lse = granule_attention(p.q, p.granules, p.lists, q_order=p.q_order, tail=tail, return_lse=True)
    exact, exact_lse = brute_force(p, tail)
    plain, _ = brute_force(p, tail, p.q.dtype)
    assert out.dtype == p.q.dtype and lse.dtype == torch.float32
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V", [5, 63, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_odd_lengths(V, dtype):
    """Fewer tokens than a granule, a partial last granule, a partial last row group."""
    assert_matches_definition(problem(V, dtype=dtype))


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_text_with_padding(text_first, tail):
    """Half a prompt in sample 1: granules that are partial, and granules without a token."""
    assert_matches_definition(problem(150, 75, text_first=text_first, dtype=torch.bfloat16), tail)


@pytest.mark.parametrize("size", values.SIZES)
@pytest.mark.parametrize("rows", values.ROWS)
def test_sizes_and_rows(size, rows):
    assert_matches_definition(problem(int(torch.randint(140, 260, ())), 20, B=1, H=1, size=size, rows=rows))


@pytest.mark.parametrize("D", [32, 64, 96, 112, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(D, dtype):
    assert_matches_definition(problem(133, D=D, B=1, H=1, dtype=dtype))


def test_many_words_of_bits():
    """More granules than the bits of one stage's words; listed ones at the ends of words."""
    chosen = torch.zeros(1, 1, 2, 200, dtype=torch.bool)
    chosen[..., [0, 31, 32, 63, 64, 95, 127, 128, 159, 160, 199]] = True
    assert_matches_definition(
        problem(200 * 8 - 3, B=1, H=1, size=8, rows=128, chosen=chosen[:, :, :1].expand(1, 1, 13, 200))
    )


@pytest.mark.parametrize("tail", [False, True])
def test_empty_lists(tail):
    """Nothing listed: the tail alone, or zeros and -inf."""
    p = problem(128, chosen=torch.zeros(2, 2, 1, 8, dtype=torch.bool))
    assert p.lists.counts.sum() == 0
    assert_matches_definition(p, tail)
    if not tail:
        out, lse = granule_attention(p.q, p.granules, p.lists, q_order=p.q_order, tail=False, return_lse=True)
        assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("V, text", [(205, 0), (150, 40)])
def test_everything_listed_is_dense_attention(V, text, tail):
    p = problem(V, text, B=1, chosen=torch.ones(1, 2, -(-V // 128), -(-V // 16), dtype=torch.bool))
    out = granule_attention(p.q, p.granules, p.lists, q_order=p.q_order, tail=tail)
    dense = F.scaled_dot_product_attention(p.q, p.k, p.v)
    index = p.q_order.long()[..., None].expand(-1, -1, -1, 64)
    torch.testing.assert_close(out.gather(2, index), dense.gather(2, index), rtol=1e-5, atol=1e-5)
    rest = torch.ones(1, 2, V + text, dtype=torch.bool).scatter_(2, p.q_order.long(), False)
    assert not out[rest].any()


def test_one_token_a_granule_listed_is_dense_attention():
    """Each key alone in a partial granule; a list may hold two of those."""
    p = problem(130, B=1, H=1)
    granules = dataclasses.replace(
        p.granules, k=F.pad(p.granules.k[:, :, :2].unflatten(2, (2, 1)), (0, 0, 0, 15)).flatten(2, 3),
        v=F.pad(p.granules.v[:, :, :2].unflatten(2, (2, 1)), (0, 0, 0, 15)).flatten(2, 3),
        tokens=torch.ones(1, 2, dtype=torch.int32), k_mean=p.granules.k[:, :, :2].clone(), v_mean=p.granules.v[:, :, :2].clone(),
    )  # fmt: skip
    lists = lists_of(torch.ones(1, 1, 2, 2, dtype=torch.bool), granules.tokens, 16, 128)
    out = granule_attention(p.q, granules, lists, q_order=p.q_order)
    two = p.k_order[0, 0, :2].long()
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(p.q, p.k[:, :, two], p.v[:, :, two]), rtol=1e-5, atol=1e-5
    )


def test_constant_keys_in_a_granule_compensate_exactly():
    """A mean that stands for equal keys is worth as much as they are, whatever their values."""
    p = problem(320, B=1, density=0.3)
    same = p.granules.k.unflatten(2, (-1, 16))[:, :, :, :1].expand(-1, -1, -1, 16, -1)
    granules = dataclasses.replace(p.granules, k=same.flatten(2, 3).contiguous(), k_mean=same[:, :, :, 0].contiguous())
    out, lse = granule_attention(p.q, granules, p.lists, q_order=p.q_order, return_lse=True)
    logits = p.q @ granules.k.mT / 8
    torch.testing.assert_close(out, logits.softmax(-1) @ granules.v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_orders_of_any_strides():
    p = problem(133)
    order = p.q_order[:1, :1]
    expected = granule_attention(p.q, p.granules, p.lists, q_order=order.expand(2, 2, -1).contiguous())
    assert torch.equal(granule_attention(p.q, p.granules, p.lists, q_order=order.expand(2, 2, -1).long()), expected)
    strided = torch.stack([order, order], -1)[..., 0].expand(2, 2, -1)
    assert torch.equal(granule_attention(p.q, p.granules, p.lists, q_order=strided), expected)
    natural = torch.arange(133, dtype=torch.int32).expand(2, 2, -1)
    expected = granule_attention(p.q, p.granules, p.lists, q_order=natural)
    assert torch.equal(granule_attention(p.q, p.granules, p.lists), expected)


def test_rows_without_an_order_are_left_alone():
    p = problem(100, 30)
    out = torch.full_like(p.q, 7.0)
    result, lse = granule_attention(p.q, p.granules, p.lists, q_order=p.q_order, out=out, return_lse=True)
    assert result is out and (out[:, :, 100:] == 7).all() and (lse[:, :, 100:] == -torch.inf).all()
    fresh, _ = granule_attention(p.q, p.granules, p.lists, q_order=p.q_order, return_lse=True)
    assert torch.equal(fresh[:, :, :100], out[:, :, :100]) and not fresh[:, :, 100:].any()


def test_heads_that_are_left_out():
    p = problem(150, dtype=torch.bfloat16)
    only = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    expected, expected_lse = granule_attention(p.q, p.granules, p.lists, q_order=p.q_order, return_lse=True)
    out = torch.full_like(p.q, 7.0)
    _, lse = granule_attention(p.q, p.granules, p.lists, q_order=p.q_order, out=out, only=only, return_lse=True)
    seen = only.bool()
    assert torch.equal(out[seen], expected[seen]) and (out[~seen] == 7).all()
    assert torch.equal(lse[seen], expected_lse[seen]) and (lse[~seen] == -torch.inf).all()
    assert not granule_attention(p.q, p.granules, p.lists, q_order=p.q_order, only=only)[~seen].any()


def test_two_runs_are_equal_and_large_logits_stay_finite():
    p = problem(300, dtype=torch.float16)
    first = granule_attention(p.q * 50, p.granules, p.lists, q_order=p.q_order)
    assert first.isfinite().all()
    assert torch.equal(first, granule_attention(p.q * 50, p.granules, p.lists, q_order=p.q_order))


@in_interpreter
def test_kernel_is_the_specification():
    """Fresh shapes in every run."""
    torch.seed()
    V, text = (int(torch.randint(1, 300, ())) for _ in range(2))
    density, size = float(torch.rand(())), values.SIZES[int(torch.randint(4, ()))]
    p = problem(V, text, dtype=torch.bfloat16, density=density, size=size)
    arguments = {"q_order": p.q_order, "return_lse": True}
    out, lse = granule_attention(p.q, p.granules, p.lists, **arguments)
    expected, expected_lse = granule_attention_reference(p.q, p.granules, p.lists, **arguments)
    shape = f"V={V} text={text} density={density} size={size}"
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.01, msg=lambda m: f"{shape}: {m}")
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4, msg=lambda m: f"{shape}: {m}")


def with_lists(p, **changes):
    return p.q, p.granules, dataclasses.replace(p.lists, **changes)


@pytest.mark.parametrize(
    "error, words, call",
    [
        (ValueError, "q must be", lambda p: granule_attention(p.q[0], p.granules, p.lists)),
        (ValueError, "sm_scale must be positive", lambda p: granule_attention(p.q, p.granules, p.lists, sm_scale=0)),
        (ValueError, "q_order must be", lambda p: granule_attention(p.q, p.granules, p.lists, q_order=p.q_order[0])),
        (TypeError, "q_order must be int32", lambda p: granule_attention(p.q, p.granules, p.lists, q_order=p.q_order.float())),
        (TypeError, "granules.k must have q's dtype", lambda p: granule_attention(p.q.half(), p.granules, p.lists)),
        (ValueError, "got statistics only", lambda p: granule_attention(p.q, dataclasses.replace(p.granules, v=None), p.lists)),
        (ValueError, "granules.size", lambda p: granule_attention(p.q, dataclasses.replace(p.granules, size=24), p.lists)),
        (ValueError, "granules.v must be contiguous", lambda p: granule_attention(
            p.q, dataclasses.replace(p.granules, v=p.granules.v[:, :, :-1]), p.lists)),
        (ValueError, "lists.rows must be one of", lambda p: granule_attention(*with_lists(p, rows=100))),
        (ValueError, "lists.counts must be contiguous", lambda p: granule_attention(*with_lists(p, counts=p.lists.counts[..., :1]))),
        (TypeError, "lists.starts must be", lambda p: granule_attention(*with_lists(p, starts=p.lists.starts.int()))),
        (ValueError, "for 100 query rows", lambda p: granule_attention(p.q[:, :, :100], p.granules, p.lists)),
        (ValueError, "lists.schedule must be", lambda p: granule_attention(*with_lists(p, schedule=p.lists.schedule[:-1]))),
        (ValueError, "only must be", lambda p: granule_attention(p.q, p.granules, p.lists, only=torch.ones(2, 2))),
        (ValueError, "out must be", lambda p: granule_attention(p.q, p.granules, p.lists, out=p.q.half())),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(error, words, call):
    with pytest.raises(error, match=words) as caught:
        call(problem(150))
    assert "\n" not in str(caught.value) and ": " in str(caught.value)


@in_interpreter
def test_what_a_kernel_cannot_do_is_refused():
    p = problem(40, D=160, B=1)
    with pytest.raises(NotImplementedError, match="head dim must be at most 128"):
        granule_attention(p.q, p.granules, p.lists)
    p = problem(40, B=1)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        granule_attention(p.q.requires_grad_(), p.granules, p.lists)
