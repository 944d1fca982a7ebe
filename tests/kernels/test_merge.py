import pytest
import torch
from svg.kernels.merge import merge_attention
from svg.kernels.rounded_attention import unsmoothed_lse


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
