"""What the specifications of quantised attention share: attention in fp32 whose P is rounded as the kernels round it."""

import torch
import torch.nn.functional as F

from ..quantize.tokens import BLOCK

SCORE_CHUNK = 1 << 24
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
        sums = sum_in_fp16(rounded, v) if acc16 else rounded @ v
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


def sum_in_fp16(p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """P V [B, H, n, D] of FP8 numbers in fp32: an exact product of 32 keys, rounded to fp16, another added, rounded."""
    padding = (0, -v.shape[2] % (2 * ACC16_KEYS))
    p, v = F.pad(p, padding), F.pad(v, (0, 0, *padding))
    p = p.unflatten(-1, (-1, 2, ACC16_KEYS))  # [B, H, n, C, 2, 32]
    v = v.unflatten(2, (-1, 2, ACC16_KEYS))  # [B, H, C, 2, 32, D]
    first, second = (torch.einsum("bhnck,bhckd->bhncd", p[..., i, :], v[:, :, :, i]) for i in (0, 1))
    return (first.half().float() + second).half().float().sum(-2)


def note_failure_reference(failed: torch.Tensor | None, out: torch.Tensor) -> None:
    """Sets the flag of every head whose output is not finite.

    Args:
        failed: int32 [B, H], changed in place, or None.
        out: fp32 [B, H, S, D].
    """
    if failed is not None:
        failed |= (~out.isfinite()).any(-1).any(-1).to(failed.dtype)
