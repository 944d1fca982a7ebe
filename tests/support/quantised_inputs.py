"""Inputs with the outliers of trained models, and attention in fp64 to hold quantised attention against."""

import torch


def outliers(S, Sk=None, D=64, dtype=torch.bfloat16, B=1, H=2, kv_heads=2):
    """The papers' inputs: biased channels in K, outlier tokens in Q, biased channels and a heavy tail in V."""
    Sk = S if Sk is None else Sk
    q = torch.randn(B, S, H, D) * torch.where(torch.rand(B, S, H, 1) < 0.05, 6.0, 0.7) + torch.randn(H, D)
    k = 0.5 * torch.randn(B, Sk, kv_heads, D) + 8 * torch.randn(D) * (torch.rand(D) < 0.2)
    v = torch.randn(B, Sk, kv_heads, D) / torch.rand(B, Sk, kv_heads, D).add(0.05).sqrt() + 2 * torch.randn(D)
    return tuple(x.to(dtype).transpose(1, 2) for x in (q, k, v))


def exact(q, k, v, is_causal=False, sm_scale=None, mask=None):
    """Dense attention from the definition in fp64, and its log-sum-exp; a row without keys gives zeros."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    if is_causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:]).tril() == 0, -torch.inf)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


def assert_accurate(found, right, spec, q, at_least, lse_within):
    """Output and log-sum-exp against fp64: within the bars, and within 1.2 times the error of the specification."""
    (out, lse), (right, right_lse) = found, right
    assert out.shape == q.shape and out.dtype == q.dtype and out.stride() == q.stride()
    assert cosine(out, right) >= at_least
    assert (out - right).norm() <= 1.2 * (spec - right).norm() + 1e-6
    assert lse.dtype == torch.float32
    finite = right_lse.isfinite()
    assert torch.equal(finite, lse.isfinite()) and (lse - right_lse)[finite].abs().mean() < lse_within


def cosine(a, b):
    """Cosine similarity of two tensors, flattened, in fp64."""
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
