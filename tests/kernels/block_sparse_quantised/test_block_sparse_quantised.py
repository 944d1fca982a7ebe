import math

import pytest
import torch

from svg.kernels import (
    block_sparse_attention_quantised,
    block_sparse_attention_quantised_reference,
    quantised_attention,
)
from svg.kernels.block_sparse.blocks import Tail
from svg.kernels.block_sparse_quantised.triton import LAUNCH
from svg.kernels.common import target
from svg.kernels.common.launch import Launch

SIZES = {"q": ([100, 0, 20, 9], [0, 1, 1, 61]), "k": ([10, 0, 0, 40, 7, 1], [0, 33, 0, 30, 0, 0])}
in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")


def cut(rows, S):
    ends = torch.tensor(rows).cumsum(1).clamp(max=S)
    ends[:, -1] = S
    return torch.diff(ends, prepend=torch.zeros_like(ends[:, :1])).to(torch.int32)


def problem(S, D=64, dtype=torch.bfloat16, H=2):
    """Inputs with biased channels as views of [B, S, H, D], two maps, and a permutation a head on each side."""
    q, k, v = (torch.randn(1, S, H, D) + bias * torch.randn(D) for bias in (0, 4, 2))
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    q_sizes, k_sizes = cut(SIZES["q"], S), cut(SIZES["k"], S)
    block_map = torch.rand(2, 4, 6) < 0.5
    block_map[0, 0] = False  # sees nothing
    block_map[0, 2:] |= torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.bool)  # neighbours, which become one run
    q_order, k_order = torch.rand(2, 1, H, S).argsort(-1).to(torch.int32)
    plan = {"map_index": torch.arange(H).view(1, H) % 2, "q_permutation": q_order, "k_permutation": k_order}
    return (q, k, v, block_map, q_sizes, k_sizes), plan


def with_tail(arguments, plan, C):
    """A tail of the first C key clusters: means of their keys, and -inf for those that are selected or empty."""
    q, k, v, block_map, _, k_sizes = arguments
    means = torch.zeros(2, *q.shape[:2], C, q.shape[3], dtype=q.dtype)
    for h in range(q.shape[1]):
        m, order = plan["map_index"][0, h], plan["k_permutation"][0, h].long()
        for c, keys in enumerate(order.split(k_sizes[m].tolist())[:C]):
            if len(keys):
                means[0, 0, h, c], means[1, 0, h, c] = (x[0, h, keys].float().mean(0) for x in (k, v))
    bias = k_sizes[:, None, :C].float().log().masked_fill(block_map[..., :C], -torch.inf)
    return plan | {"tail": Tail(*means, bias)}


def exact(arguments, plan):
    """Dense softmax under a token mask in fp64, the tail's keys beside the others, and its log-sum-exp."""
    q, k, v, block_map, q_sizes, k_sizes = arguments
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.empty(q.shape[:3], dtype=torch.float64)
    for h in range(q.shape[1]):
        m = plan["map_index"][0, h]
        mask = torch.empty(q.shape[2], k.shape[2], dtype=torch.bool)
        rows, columns = plan["q_permutation"][0, h].long(), plan["k_permutation"][0, h].long()
        mask[rows[:, None], columns] = block_map[m].repeat_interleave(q_sizes[m], 0).repeat_interleave(k_sizes[m], 1)
        keys, values, bias = k[0, h], v[0, h], torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        if tail := plan.get("tail"):
            keys, values = torch.cat([keys, tail.k[0, h]]), torch.cat([values, tail.v[0, h]])
            bias = torch.cat([bias, torch.empty(len(rows), tail.bias.shape[2])], 1)
            bias[rows, k.shape[2] :] = tail.bias[m].repeat_interleave(q_sizes[m], 0)
        scores = q[0, h].double() @ keys.double().T * q.shape[-1] ** -0.5 + bias
        lse[0, h], seen = scores.logsumexp(-1), bias.isfinite().any(1)
        out[0, h, seen] = scores[seen].softmax(-1) @ values.double()
    return out, lse


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def assert_accurate(arguments, plan, at_least=0.9998, **options):
    out, lse = block_sparse_attention_quantised(*arguments, **plan, **options, return_lse=True)
    spec = block_sparse_attention_quantised_reference(*arguments, **plan, **options)
    right, right_lse = exact(arguments, plan)
    q = arguments[0]
    assert out.dtype == q.dtype and out.stride() == q.stride() and lse.dtype == torch.float32
    assert cosine(out, right) >= at_least
    assert (out - right).norm() <= 1.2 * (spec - right).norm() + 1e-6
    nothing = right_lse == -torch.inf
    assert (out[nothing] == 0).all() and torch.equal(lse == -torch.inf, nothing)
    assert (lse - right_lse)[~nothing].abs().max() < 0.1


@pytest.mark.parametrize("S", [63, 111, 129])
@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
def test_odd_lengths(S, precision):
    assert_accurate(*problem(S), precision=precision)


@pytest.mark.parametrize("D", [32, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_head_dims_and_dtypes(D, dtype):
    for precision in ("int8-fp8", "int8-fp16"):
        assert_accurate(*problem(129, D, dtype), precision=precision)


def test_options():
    arguments, plan = problem(129)
    assert_accurate(arguments, plan, smooth_v=True)
    assert_accurate(arguments, plan, 0.99, smooth_k=False)


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
@pytest.mark.parametrize("last", [64, 9])
def test_keys_in_tiles(last, precision):
    S = 4 * 64 + last
    (q, k, v, _, q_sizes, _), plan = problem(S)
    k_sizes = torch.tensor([[64, 64, 64, 64, last]] * 2, dtype=torch.int32)
    block_map = torch.rand(2, 4, 5) < 0.6
    block_map[..., 1] = True
    assert_accurate((q, k, v, block_map, q_sizes, k_sizes), plan, precision=precision, key_multiple=64)


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
@pytest.mark.parametrize(("S", "D", "C"), [(129, 64, 6), (111, 96, 5), (111, 128, 4)])
def test_tail(S, D, C, precision):
    arguments, plan = problem(S, D)
    plan = with_tail(arguments, plan, C)
    assert_accurate(arguments, plan, precision=precision)
    assert_accurate(arguments, plan, precision=precision, smooth_v=precision == "int8-fp8")
    alone = block_sparse_attention_quantised(*arguments, **plan, precision=precision)
    assert torch.equal(
        alone, block_sparse_attention_quantised(*arguments, **plan, precision=precision, return_lse=True)[0]
    )


def test_tail_where_nothing_is_left_or_nothing_listed():
    arguments, plan = problem(129)
    plan, nothing = with_tail(arguments, plan, 6), with_tail(arguments, plan, 0)
    for chosen in (False, True):
        assert_accurate((*arguments[:3], torch.full_like(arguments[3], chosen), *arguments[4:]), plan)
    plan["tail"].bias[0] = -torch.inf
    assert_accurate(arguments, plan)
    del plan["tail"]
    without = block_sparse_attention_quantised(*arguments, **plan)
    assert torch.equal(block_sparse_attention_quantised(*arguments, **nothing), without)


def test_wrong_tails_are_named():
    arguments, plan = problem(63)
    k, v, bias = with_tail(arguments, plan, 6)["tail"]
    for tail in (Tail(k, v[:, :, :5], bias), Tail(k, v, bias[:, :3])):
        with pytest.raises(ValueError, match=r"tail must hold k and v \[B, H, C, D\]"):
            block_sparse_attention_quantised(*arguments, **plan, tail=tail)
    with pytest.raises(TypeError, match="tail must hold k and v of q's dtype torch.bfloat16 and an fp32 bias"):
        block_sparse_attention_quantised(*arguments, **plan, tail=Tail(k.float(), v, bias))


def test_keys_already_in_order():
    (q, k, v, *maps), plan = problem(111)
    k_order = plan.pop("k_permutation").long()[..., None].expand_as(k)
    ready = block_sparse_attention_quantised(q, k.gather(2, k_order), v.gather(2, k_order), *maps, **plan)
    gathered = block_sparse_attention_quantised(q, k, v, *maps, **plan, k_permutation=k_order[..., 0])
    torch.testing.assert_close(ready, gathered, rtol=0, atol=0.02)  # K's mean is a sum in another order


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
def test_density_one_equals_dense(precision):
    (q, k, v, *_), plan = problem(129, dtype=torch.float32)
    sizes, every = torch.tensor([[129]], dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.bool)
    plan |= {"map_index": torch.zeros(1, 2, dtype=torch.int32)}
    out = block_sparse_attention_quantised(q, k, v, every, sizes, sizes, **plan, precision=precision)
    dense = quantised_attention(q, k, v, precision=precision, k_groups="token")
    # The order of keys, and so P's rounding before its row's maximum is known, is all that differs.
    assert (out - dense).norm() <= 0.01 * dense.norm()


def test_inputs_are_not_changed():
    arguments, plan = problem(111)
    before = [x.clone() for x in (*arguments, *plan.values())]
    block_sparse_attention_quantised(*arguments, **plan, smooth_v=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (*arguments, *plan.values()), strict=True))


def test_what_is_not_finite_shows():
    for which in range(3):
        arguments, plan = problem(129)
        arguments[which][0, 1, 70, 5] = torch.nan
        out = block_sparse_attention_quantised(*arguments, **plan)
        assert out[0, 1].isnan().any() and out[0, 0].isfinite().all()


@in_interpreter
@pytest.mark.parametrize("row", [Launch(64, 32, 4, 2), Launch(64, 64, 4, 2, tma=True)])
def test_every_way_to_launch(row, monkeypatch):
    for precision in ("int8-fp8", "int8-fp16"):
        with monkeypatch.context() as changed:
            changed.setitem(LAUNCH[90], (precision == "int8-fp8", 64), row)
            assert_accurate(*problem(129), precision=precision)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (
            ValueError,
            "precision must be one of int8-fp8, int8-fp8-acc16, int8-fp16, got 'int4-fp8'",
            {"precision": "int4-fp8"},
        ),
        (ValueError, "smooth_v needs FP8", {"smooth_v": True, "precision": "int8-fp16"}),
        (ValueError, "k_permutation must be", {"k_permutation": torch.zeros(1, 2, 5)}),
        (ValueError, "key_multiple must be 1 or more, got 0", {"key_multiple": 0}),
        (ValueError, "sm_scale must be positive", {"sm_scale": 0.0}),
    ],
)
def test_wrong_arguments_are_named(error, match, change):
    arguments, plan = problem(63)
    with pytest.raises(error, match=match):
        block_sparse_attention_quantised(*arguments, **plan | change)


@in_interpreter
def test_limits_of_the_kernel_are_named(monkeypatch):
    (q, k, v, *maps), plan = problem(63)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        block_sparse_attention_quantised(q, k, v.clone().requires_grad_(), *maps, **plan)
    monkeypatch.setattr(target, "arch", lambda device: 80)
    with pytest.raises(NotImplementedError, match="FP8 needs compute capability 8.9"):
        block_sparse_attention_quantised(q, k, v, *maps, **plan)


def stepped():
    """Blocks of 64 keys at different heights, and queries that all look up; one map a head, tails of 61 queries."""
    height = torch.tensor([3.0, 5, 2, 0, 4.5, 1, 4, 6]).repeat_interleave(64)
    q, k, v = (torch.randn(1, 189, 2, 64), torch.randn(1, 512, 2, 64), torch.rand(1, 512, 2, 64))
    q[..., 0], k[..., 0] = 12.0, height[:, None]
    v *= torch.exp2(6 - height)[:, None, None]  # what is left out shows
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
    block_map = torch.rand(2, 2, 8) < 0.8
    sizes = [torch.tensor([row] * 2, dtype=torch.int32) for row in ([128, 61], [64] * 8)]
    return (q, k, v, block_map, *sizes), {"map_index": torch.tensor([[0, 1]])}


def skipping(arguments, limits):
    """Attention in fp64 that leaves out P V tile by tile as the online softmax goes; and how many it left out."""
    q, k, v, block_map, *_ = arguments
    out, skips = torch.empty(q.shape, dtype=torch.float64), 0
    for h in range(2):
        for i, rows in enumerate((slice(0, 128), slice(128, 189))):
            scores = q[0, h, rows].double() @ k[0, h].double().T / 8
            peak, top, kept = scores[:, :0], torch.full((rows.stop - rows.start,), -torch.inf), torch.zeros(512)
            for j in block_map[h, i].nonzero().squeeze(1):
                peak = scores[:, 64 * j : 64 * j + 64].amax(1)
                kept[64 * j : 64 * j + 64] = ((peak - top) / math.log(2) >= -limits[h]).any()
                skips += 1 - kept[64 * j].item()
                top = torch.maximum(top, peak)
            p = scores.masked_fill(~block_map[h, i].repeat_interleave(64), -torch.inf).softmax(-1)
            out[0, h, rows] = p * kept @ v[0, h].double()
    return out, skips


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
def test_pv_threshold_skips_tiles_far_below_the_maximum(precision):
    arguments, plan = stepped()
    limits = torch.tensor([0.0, 2.0])
    out, lse = block_sparse_attention_quantised(
        *arguments, **plan, precision=precision, pv_threshold=limits, return_lse=True
    )
    expected, skips = skipping(arguments, limits.tolist())
    full, full_lse = block_sparse_attention_quantised(*arguments, **plan, precision=precision, return_lse=True)
    assert skips > 4
    close, far = ((x.double() - expected).norm() / expected.norm() for x in (out, full))
    assert close < 0.02 < 0.05 < far
    torch.testing.assert_close(lse, full_lse, rtol=1e-5, atol=1e-5)  # sums and maxima count what is skipped


def test_pv_threshold_that_is_never_reached_changes_nothing():
    arguments, plan = stepped()
    never = block_sparse_attention_quantised(*arguments, **plan, pv_threshold=torch.full((2,), torch.inf))
    torch.testing.assert_close(never, block_sparse_attention_quantised(*arguments, **plan), rtol=0, atol=1e-2)
    with pytest.raises(ValueError, match=r"pv_threshold must be fp32 \[H\] = \[2\], got torch.float32 \(3,\)"):
        block_sparse_attention_quantised(*arguments, **plan, pv_threshold=torch.ones(3))
