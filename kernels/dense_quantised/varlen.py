"""Quantised attention of packed sequences, as language models batch them: `quantised_attention`'s kernel, many sequences.

K loses each sequence's own mean. Keys and values are moved so that every sequence begins at a multiple of 128, where V's
tiles may begin and groups of 128 keys share a scale; that is one read and write of both. V's channels have one scale over
all sequences. Nothing waits for the device: lengths stay there.
"""

from typing import Any

import torch

from ..common import target
from ..common.checks import check_inputs
from ..common.numbers import softmax_scale
from ..common.target import tl, triton
from ..quantize.channels import quantize_channels, statistics
from ..quantize.precision import (
    SPARSE_PRECISIONS,
    Quantisation,
    as_quantisation,
    find_precision,
    pv_dtype,
    refuse_keywords,
)
from ..quantize.tokens import BLOCK, quantize_tokens
from .reference import quantised_attention_reference
from .triton import QuantizedInputs, Sequences, attend_quantized


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    how: Quantisation | None = None,
    *,
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **fields: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention within each of n packed sequences, in 8 bits.

    Args:
        q: [H, T, D] fp16, bf16 or fp32, last dim contiguous, the sequences' queries one after the other.
        k, v: [Hkv, Tk, D], q's dtype; Hkv divides H.
        q_ends, k_ends: int32 or int64 [n + 1], 0 and where each sequence ends, in tokens; the last ones are T and Tk.
        how: precision "int8-fp8", "int8-fp8-acc16" or "int8-fp16", smooth_k (each sequence's mean is taken off K) and smooth_v;
            or these as keywords.
        is_causal: query i of a sequence sees its keys 0 .. i.
        sm_scale: softmax scale; default D ** -0.5.
        return_lse: also return the log-sum-exp.

    Returns:
        out [H, T, D], q's dtype and memory layout; with return_lse also lse fp32 [H, T], natural log. A query of a
        sequence without keys gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, an unknown precision, smooth_v without FP8, or (on CPU) ends that do not rise from 0
            to the number of tokens.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: head dim above 128; on the Triton path, a GPU without FP8 or a gradient would be needed.

    Source: arXiv 2411.10958, section 3, with K smoothed in each sequence.
    """
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    how = as_quantisation(how, fields)
    refuse_keywords("varlen_attention", fields)
    find_precision(how.precision, SPARSE_PRECISIONS, how.smooth_v)
    how.refuse("varlen_attention", "smooth_q", "q_groups", "k_groups", "pv_threshold")
    check_inputs(q[None], k[None], v[None], sm_scale)
    _check_ends(q, k, q_ends, k_ends)
    op = _launch if target.use_triton(q) else varlen_attention_reference
    return op(q, k, v, q_ends, k_ends, how, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse)


def varlen_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ends: torch.Tensor,
    k_ends: torch.Tensor,
    how: Quantisation | None = None,
    *,
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **fields: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Specification of `varlen_attention` in plain torch: one sequence at a time, with V scaled in each by itself."""
    how = as_quantisation(how, fields)
    refuse_keywords("varlen_attention_reference", fields)
    out = torch.empty_like(q).zero_()
    lse = torch.full(q.shape[:2], -torch.inf)
    rows, keys = (list(zip(ends.tolist(), ends.tolist()[1:])) for ends in (q_ends, k_ends))
    for (first, stop), (first_key, stop_key) in zip(rows, keys):
        if first == stop or first_key == stop_key:
            continue
        part, sums = quantised_attention_reference(
            q[None, :, first:stop], k[None, :, first_key:stop_key], v[None, :, first_key:stop_key],
            how, is_causal=is_causal, sm_scale=sm_scale, return_lse=True,
        )  # fmt: skip
        out[:, first:stop], lse[:, first:stop] = part[0], sums[0]
    return (out, lse) if return_lse else out


def _check_ends(q, k, q_ends, k_ends):
    if q_ends.dim() != 1 or q_ends.shape != k_ends.shape or len(q_ends) < 2:
        raise ValueError(
            f"q_ends and k_ends must be [n + 1] with n >= 1, got {tuple(q_ends.shape)} and {tuple(k_ends.shape)}"
        )
    for name, ends, tokens in (("q_ends", q_ends, q.shape[1]), ("k_ends", k_ends, k.shape[1])):
        if ends.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {ends.dtype}: convert it")
        # Looking at them on a GPU would make the caller wait for it.
        if not ends.is_cuda and not (ends[0] == 0 and ends[-1] == tokens and (ends.diff() >= 0).all()):
            raise ValueError(f"{name} must rise from 0 to the {tokens} tokens, got {ends.tolist()}")


def segment_means(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of every sequence, fp32 [n, H, D]; 0 for an empty one.

    Args:
        x: [H, T, D], last dim contiguous.
        ends: int32 [n + 1].
    """
    n, (H, _, D) = len(ends) - 1, x.shape
    means = torch.empty(n, H, D, dtype=torch.float32, device=x.device)
    with target.on_device(x):
        _segment_means_kernel[(n, H)](
            x, ends, means, *x.stride()[:2], D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_S=64, num_warps=4
        )
    return means


def _launch(q, k, v, q_ends, k_ends, how, *, is_causal, sm_scale, return_lse):
    target.refuse_gradients("varlen_attention", q, k, v)
    kind = how.kind
    if kind.fp8:
        target.require_fp8(q.device)
    q_ends, k_ends = (ends.to(q.device, torch.int32) for ends in (q_ends, k_ends))
    lengths = k_ends.diff()
    padded = (lengths + BLOCK - 1) // BLOCK * BLOCK
    sequences = Sequences(q_ends[:-1].contiguous(), q_ends.diff(), (padded.cumsum(0) - padded).to(torch.int32), lengths)
    token = torch.arange(k.shape[1], device=q.device)
    number = torch.searchsorted(k_ends[1:], token, right=True)  # of the sequence that holds a key
    goal = token + (sequences.k_start - k_ends[:-1]).long()[number]
    room = (k.shape[1] + (BLOCK - 1) * len(lengths)) // BLOCK * BLOCK
    mean = segment_means(k, k_ends) if how.smooth_k else None  # [n, Hkv, D]
    wide = k.float() if mean is None else k.float() - mean.transpose(0, 1)[:, number]
    keys = wide.new_zeros(1, k.shape[0], room, k.shape[2]).index_copy_(2, goal, wide[None])
    values = v.new_zeros(1, v.shape[0], room, v.shape[2]).index_copy_(2, goal, v[None])
    stats = statistics(k[None], v[None])
    channels = quantize_channels(values, stats, smooth=how.smooth_v, limit=kind.v_range) if kind.fp8 else None
    inputs = QuantizedInputs(
        precision=how.precision,
        rows=quantize_tokens(q[None], side="q"),
        keys=quantize_tokens(keys, side="k", groups="block"),
        channels=channels,
        values=channels.values if kind.fp8 else values.to(pv_dtype(v)),
        k_mean=None,
        bias=None,
        interleaved=False,
    )
    out, lse = attend_quantized(inputs, torch.empty_like(q)[None], is_causal, sm_scale, return_lse, sequences=sequences)
    if not return_lse:
        return out[0]
    return out[0], lse[0] if mean is None else lse[0] + sm_scale * _shift(q, mean, q_ends)


def _shift(q, k_mean, q_ends):
    """What the mean of its sequence's keys adds to every score of a query, before scaling: fp32 [H, T]."""
    number = torch.searchsorted(q_ends[1:], torch.arange(q.shape[1], device=q.device), right=True)
    means = k_mean.transpose(0, 1).repeat_interleave(q.shape[0] // k_mean.shape[1], 0)  # [H, n, D]
    return (q.float() * means[:, number]).sum(-1)


@triton.jit
def _segment_means_kernel(
    x, ends, means, stride_xh, stride_xs, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    first, stop = tl.load(ends + tl.program_id(0)), tl.load(ends + tl.program_id(0) + 1)
    offs_d = tl.arange(0, BLOCK_D)
    x += tl.program_id(1).to(tl.int64) * stride_xh + offs_d[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for token in range(first, stop, BLOCK_S):
        offs_s = token + tl.arange(0, BLOCK_S)
        mask = (offs_s < stop)[:, None] & (offs_d < D)[None, :]
        total += tl.load(x + offs_s[:, None].to(tl.int64) * stride_xs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(stop - first, 1)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(means + row * D + offs_d, mean, mask=offs_d < D)
