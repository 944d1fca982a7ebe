import pytest
import torch

from svg.kernels import block_sparse_attention, block_sparse_attention_quantised
from svg.kernels.block_sparse.blocks import Tail
from svg.kernels.common.merge import merge_attention
from svg.kernels.common.smoothing import unsmoothed_lse


def parts(S, D, dtype, heads_last):
    """Attention over all keys in fp64, and over two parts of them with a log-sum-exp in fp32."""
    q, k, v = (torch.randn(2, 3, n, D, dtype=torch.float64) for n in (S, 40, 40))
    scores = 2 * q @ k.mT

    def over(keys):
        return scores[..., keys].softmax(-1) @ v[:, :, keys], scores[..., keys].logsumexp(-1)

    def given(out, lse):
        out = out.to(dtype)
        return out.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else out, lse.float()

    return over(slice(40))[0], given(*over(slice(0, 15))), given(*over(slice(15, 40)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("S", "D", "heads_last"), [(1, 64, False), (67, 64, True), (33, 96, True), (64, 128, False)])
def test_two_parts_make_the_whole(S, D, heads_last, dtype):
    right, one, two = parts(S, D, dtype, heads_last)
    strides = one[0].stride()
    merge_attention(*one, *two)
    assert one[0].stride() == strides
    error = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(one[0].double(), right, rtol=error, atol=error)


def test_a_part_that_sees_nothing():
    x, y = torch.ones(1, 1, 3, 16), torch.full((1, 1, 3, 16), 2.0)
    nothing = -torch.inf
    x[:, :, [0, 2]], y[:, :, [1, 2]] = 0.0, 0.0
    merge_attention(x, torch.tensor([[[nothing, 5.0, nothing]]]), y, torch.tensor([[[700.0, nothing, nothing]]]))
    assert x[0, 0, :, 0].tolist() == [2.0, 1.0, 0.0]


def test_shapes_are_checked():
    x, lse = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"out and other must be \[B, H, S, D\]"):
        merge_attention(x, lse, x[:, :1], lse)
    with pytest.raises(ValueError, match="out and other must be"):
        merge_attention(x, lse, x.half(), lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_scores_come_back(dtype):
    q, k = torch.randn(2, 70, 6, 96).to(dtype).transpose(1, 2), torch.randn(2, 3, 50, 96).double() + 2
    mean = k.mean(2, keepdim=True)
    wide = q.double()
    smooth, right = ((wide @ x.repeat_interleave(2, 1).mT * 0.1).logsumexp(-1) for x in (k - mean, k))
    found = unsmoothed_lse(smooth.float(), q, mean.squeeze(2).float(), 0.1)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def cut_keys_and_tail(batch, heads, S, D):
    """A problem of two samples that differ, keys far from zero, and a tail whose first query cluster has nothing left."""
    q, k, v = (torch.randn(batch, S, heads, D) + shift * torch.randn(D) for shift in (0, 3, 1))
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
    maps = batch * heads
    q_sizes = torch.tensor([[20, 0, 30, S - 50]], dtype=torch.int32).repeat(maps, 1)
    k_sizes = torch.tensor([[16, 9, 0, 7, S - 32]], dtype=torch.int32).repeat(maps, 1)
    block_map = torch.rand(maps, 4, 5) < 0.5
    block_map[:, 0], block_map[:, 2] = True, False  # all keys; only means, and none of the last cluster: it is the text
    means = [torch.randn(batch, heads, 4, D).bfloat16() + x.mean(2, keepdim=True) for x in (k, v)]
    bias = torch.where(block_map[..., :4], -torch.inf, k_sizes[:, None, :4].float().log())
    bias[0, 2] = -torch.inf  # not even means
    order = torch.rand(batch, heads, S).argsort(-1).int()
    plan = {"map_index": torch.arange(maps).view(batch, heads), "q_permutation": order}
    return (q, k, v, block_map, q_sizes, k_sizes), plan, Tail(*means, bias)


def exact_with_tail(arguments, plan, tail):
    q, k, v, block_map, q_sizes, k_sizes = arguments
    keys, values = (torch.cat(pair, 2).double() for pair in ((k, tail.k), (v, tail.v)))
    seen = torch.where(block_map, 0.0, -torch.inf).repeat_interleave(k_sizes[0], 2)
    bias = torch.cat([seen, tail.bias], 2).repeat_interleave(q_sizes[0], 1).unflatten(0, q.shape[:2])
    place = plan["q_permutation"].long().argsort(-1)[..., None].expand(-1, -1, -1, keys.shape[2])
    scores = q.double() @ keys.mT * q.shape[-1] ** -0.5 + bias.gather(2, place)
    return scores.softmax(-1).nan_to_num(0) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp8-acc16", "int8-fp16"])
def test_selected_keys_in_8_bits_and_a_tail_that_is_not(precision):
    """Both log-sum-exps are of the scores as they are: K's mean, taken off in one of them alone, is in it again."""
    arguments, plan, tail = cut_keys_and_tail(2, 2, 99, 64)
    right, right_lse = exact_with_tail(arguments, plan, tail)
    q, _, _, block_map, q_sizes, _ = arguments
    found = block_sparse_attention_quantised(*arguments, **plan, precision=precision, return_lse=True)
    nothing, sizes = torch.zeros_like(block_map[..., :1]), torch.full((4, 1), 4, dtype=torch.int32)
    other = block_sparse_attention(q, tail.k, tail.v, nothing, q_sizes, sizes, **plan, return_lse=True, tail=tail)
    alone = found[0].clone()
    merge_attention(*found, *other)
    at_once = block_sparse_attention_quantised(*arguments, **plan, precision=precision, tail=tail)
    for out in (found[0], at_once):
        assert (out - right).norm() < (0.01 if precision == "int8-fp16" else 0.04) * right.norm()
    empty = right_lse == -torch.inf
    assert empty.any() and (found[0][empty] == 0).all()
    full = other[1] == -torch.inf
    assert full.any() and torch.equal(found[0][full], alone[full])
    joined = torch.logaddexp(found[1], other[1])[~empty]
    assert (joined - right_lse[~empty]).abs().max() < 0.1
