"""What smoothing took off the scores: means of queries and keys, and how they come back."""

import torch

from . import target
from .target import tl, triton

MEAN_ROWS = 64  # queries of a program that adds K's mean scores


def mean_scores(q_means: torch.Tensor, k: torch.Tensor, k_mean: torch.Tensor | None) -> torch.Tensor:
    """What taking means off the queries took off their scores: q_mean . (k - k_mean).

    Args:
        q_means: fp32 [B, H, ceil(S / 128), D].
        k: [B, Hkv, Sk, D].
        k_mean: fp32 [B, Hkv, D], or None.

    Returns:
        fp32 [B, H, ceil(S / 128), Sk].
    """
    keys = k.float() if k_mean is None else k.float() - k_mean[:, :, None]
    shared = q_means.unflatten(1, (k.shape[1], -1)) @ keys[:, :, None].transpose(3, 4)
    return shared.flatten(1, 2)


def unsmoothed_lse(lse: torch.Tensor, q: torch.Tensor, k_mean: torch.Tensor | None, sm_scale: float) -> torch.Tensor:
    """Log-sum-exp of the scores with K's mean, which adds q . k_mean to every score of a query.

    Args:
        lse: fp32 [B, H, S], without it.
        q: [B, H, S, D], last dim contiguous.
        k_mean: fp32 [B, Hkv, D], or None where it was not taken off.
        sm_scale: softmax scale.
    """
    if k_mean is None:
        return lse
    if not target.use_triton(q):
        return unsmoothed_lse_reference(lse, q, k_mean, sm_scale)
    B, H, S, D = q.shape
    out = torch.empty_like(lse, memory_format=torch.contiguous_format)
    with target.on_device(q):
        _mean_score_kernel[(triton.cdiv(S, MEAN_ROWS), B * H)](
            lse.contiguous(), q, k_mean.contiguous(), out, sm_scale, H, H // k_mean.shape[1], S, *q.stride()[:3],
            D=D, BLOCK_D=triton.next_power_of_2(D), ROWS=MEAN_ROWS,
        )  # fmt: skip
    return out


def unsmoothed_lse_reference(
    lse: torch.Tensor, q: torch.Tensor, k_mean: torch.Tensor | None, sm_scale: float
) -> torch.Tensor:
    """Specification of `unsmoothed_lse` in plain torch; same arguments and result."""
    if k_mean is None:
        return lse
    shift = q.unflatten(1, (k_mean.shape[1], -1)).float() @ k_mean[:, :, None, :, None]
    return lse + sm_scale * shift.squeeze(-1).flatten(1, 2)


@triton.jit(do_not_specialize=["S"])
def _mean_score_kernel(
    lse, q, k_mean, out, sm_scale, H, HEADS_PER_KEY, S, stride_b, stride_h, stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    q += bh // H * stride_b + bh % H * stride_h
    mask = (token < S)[:, None] & (offs_d < D)[None, :]
    rows = tl.load(q + token[:, None] * stride_s + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(k_mean + bh // HEADS_PER_KEY * D + offs_d, mask=offs_d < D, other=0.0)
    score = tl.load(lse + bh * S + token, mask=token < S) + sm_scale * tl.sum(rows * mean[None, :], 1)
    tl.store(out + bh * S + token, score, mask=token < S)
