"""What the specifications of quantised attention share: attention in fp32 whose P is rounded as the kernels round it."""

import torch
import torch.nn.functional as F

from ..quantize.tokens import BLOCK, padded_head_dim
from . import target
from .target import tl, triton

SCORE_CHUNK = 1 << 24
MEAN_ROWS = 64  # queries of a program that adds K's mean scores
ACC16_KEYS = 32  # keys of one FP8 product; two of them are summed in fp16


def rounded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    p_dtype: torch.dtype,
    is_causal: bool = False,
    bias: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    acc16: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention whose P is rounded relative to a row's largest score, on numbers that are already quantised.

    Args:
        q: fp32 [B, H, S, D].
        k: fp32 [B, H, Sk, D].
        v: fp32 [B, H, Sk, D]; with acc16 the FP8 numbers themselves, without their scale.
        scale: softmax scale.
        p_dtype: what P is rounded to: float8_e4m3fn (448 P then), fp16 or bf16.
        is_causal: query i sees keys 0 .. i.
        bias: fp32 [B, H, ceil(S / 128), Sk], scores to add before scaling, or None.
        seen: bool, broadcastable to [B, H, S, Sk], True where a query sees a key, or None.
        acc16: sum P V in fp16 over 64 keys, as two products of 32 each, before the sum in fp32.

    Returns:
        out fp32 [B, H, S, D], lse fp32 [B, H, S]; a query that sees nothing gives zeros, and -inf.
    """
    S, Sk = q.shape[2], k.shape[2]
    chunk = max(1, SCORE_CHUNK // (q.shape[0] * q.shape[1] * Sk * (4 if acc16 else 1)))
    largest = 448 if p_dtype == torch.float8_e4m3fn else 1
    limit = v.abs().amax(2, keepdim=True)  # [B, H, 1, D]
    outs, lses = [], []
    for first in range(0, S, chunk):
        scores = q[:, :, first : first + chunk] @ k.transpose(2, 3)
        place = torch.arange(first, min(first + chunk, S), device=q.device)
        if bias is not None:
            scores += bias[:, :, place // BLOCK]
        scores *= scale
        hide(scores, place, is_causal, seen)
        lses.append(torch.logsumexp(scores, -1))
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        rounded = (largest * p).to(p_dtype).float()
        sums = _sum_in_fp16(rounded, v) if acc16 else rounded @ v
        outs.append((sums / (largest * p.sum(-1, keepdim=True))).clamp(-limit, limit))
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    return (out if seen is None else torch.where(lse[..., None] == -torch.inf, 0.0, out)), lse


def hide(scores: torch.Tensor, rows: torch.Tensor, is_causal: bool, seen: torch.Tensor | None) -> None:
    """Sets scores to minus infinity, in place, where a query does not see a key.

    Args:
        scores: fp32 [B, H, n, Sk].
        rows: int64 [n], which queries they are.
        is_causal, seen: as in `rounded_attention`.
    """
    if is_causal:
        scores.masked_fill_(torch.arange(scores.shape[-1], device=scores.device) > rows[:, None], -torch.inf)
    if seen is not None:
        scores.masked_fill_(~(seen if seen.shape[2] == 1 else seen[:, :, rows]), -torch.inf)


def _sum_in_fp16(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """P V [B, H, n, D] of FP8 numbers in fp32: an exact product of 32 keys, rounded to fp16, another added, rounded."""
    padding = (0, -v.shape[2] % (2 * ACC16_KEYS))
    p, v = F.pad(p, padding), F.pad(v, (0, 0, *padding))
    p = p.unflatten(-1, (-1, 2, ACC16_KEYS))  # [B, H, n, C, 2, 32]
    v = v.unflatten(2, (-1, 2, ACC16_KEYS))  # [B, H, C, 2, 32, D]
    first, second = (torch.einsum("bhnck,bhckd->bhncd", p[..., i, :], v[:, :, :, i]) for i in (0, 1))
    return (first.half().float() + second).half().float().sum(-2)


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


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, mask: torch.Tensor | None = None
) -> None:
    """Raises where the tensors of a quantised attention do not fit together.

    Args:
        q: [B, H, S, D].
        k, v: [B, Hkv, Sk, D].
        sm_scale: softmax scale.
        mask: bool [B or 1, H or 1, S or 1, Sk], or None.

    Raises:
        ValueError: shapes disagree, a tensor has no tokens, or sm_scale is not positive.
        TypeError: dtypes are mixed, or the mask is not bool.
        NotImplementedError: head dim above 128.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            "q must be [B, H, S, D] and k, v [B, Hkv, Sk, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: reshape them"
        )
    if 0 in q.shape or 0 in k.shape or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k's heads must divide q's and no dimension may be empty, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: convert them")
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be positive, got {sm_scale}: scale q instead")
    padded_head_dim(q.shape[-1])
    if mask is not None:
        _check_mask(mask, (*q.shape[:3], k.shape[2]))


def _check_mask(mask: torch.Tensor, full: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a query sees a key, got {mask.dtype}: compare it first")
    if mask.dim() != 4 or mask.shape[3] != full[3] or any(n not in (1, m) for n, m in zip(mask.shape, full)):
        raise ValueError(
            f"mask must be [B, H, S, Sk] = {full} with 1 in place of B, H or S where they share it, "
            f"got {tuple(mask.shape)}: reshape it"
        )


def note_failure_reference(failed: torch.Tensor | None, out: torch.Tensor) -> None:
    """Sets the flag of every head whose output is not finite.

    Args:
        failed: int32 [B, H], changed in place, or None.
        out: fp32 [B, H, S, D].
    """
    if failed is not None:
        failed |= (~out.isfinite()).any(-1).any(-1).to(failed.dtype)
