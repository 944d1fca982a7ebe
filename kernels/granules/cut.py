"""Cut keys and values into granules: gather them in sorted order and take every granule's statistics, in one pass.

A program takes the keys or the values of some granules, one token of each after the other, in a loop of few registers:
rows that follow a permutation come from anywhere, and only many loads under way hide that. Variances are of differences
from a granule's first token, never differences of large squares: keys share a large mean. Sums run in one order, so two
runs are bit-equal. fp16, bf16 and fp32, head dims up to 128, sm80 and newer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import target
from ..common.launch import LaunchTable
from ..common.target import tl, triton
from .reference import cut_granules_reference
from .values import SIZES, Granules

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def cut_granules(
    k: Tensor,
    v: Tensor,
    k_order: Tensor,
    size: int,
    text: Tensor | None = None,
    prompt_tokens: Tensor | None = None,
    *,
    gather: bool = True,
    only: Tensor | None = None,
) -> Granules:
    """Gather keys and values in sorted order and take every granule's statistics.

    Args:
        k, v: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        k_order: int32 or int64 [B, H, V], sorted -> original index of the video's keys; any strides.
        size: keys a granule, one of SIZES.
        text: int32 or int64 [B, L], original index of text tokens, the prompt's first; None: there is no text.
        prompt_tokens: int [B], how many of them belong to the prompt; None: all.
        gather: False leaves `k` and `v` of the granules None, where another kernel gathers and quantizes them.
        only: int32 [B, H]; nothing is written of heads that are 0 here, and nobody may read them. None: all are cut.

    Returns:
        The granules; those of the text begin at a multiple of `size`.

    Raises:
        ValueError: shapes disagree, a size that is not in SIZES, or a strided last dim.
        TypeError: a dtype that is not supported, or indices that are not integers.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.

    Example:
        >>> granules = cut_granules(k, v, k_order, 16)  # k_order from sort_labels(kmeans(k, ...).labels, ...)
    """
    _check(k, v, k_order, size, text, prompt_tokens, only)
    op = _cut if target.use_triton(k) else cut_granules_reference
    return op(k, v, k_order, size, text, prompt_tokens, gather=gather, only=only)


def _check(k, v, k_order, size, text, prompt_tokens, only):
    if k.dim() != 4 or v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(
            f"k and v must be [B, H, S, D] of one shape and dtype, got {k.dtype} {tuple(k.shape)} and "
            f"{v.dtype} {tuple(v.shape)}: cut them together"
        )
    if k_order.dim() != 3 or k_order.shape[:2] != k.shape[:2] or not 0 < k_order.shape[2] <= k.shape[2]:
        raise ValueError(
            f"k_order must be [B, H, V] with 1 <= V <= S for k {tuple(k.shape)}, got {tuple(k_order.shape)}: "
            "expand it over batch and heads"
        )
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(map(str, SIZES))} keys, got {size}: 16 is the usual choice")
    if text is not None and (text.dim() != 2 or text.shape[0] != k.shape[0]):
        raise ValueError(f"text must be [B, L] with B = {k.shape[0]}, got {tuple(text.shape)}: one row a sample")
    if prompt_tokens is not None and (text is None or prompt_tokens.shape != k.shape[:1]):
        raise ValueError(
            f"prompt_tokens must be [B] = [{k.shape[0]}] and go with text, got {tuple(prompt_tokens.shape)}: "
            "pass text, or leave it None"
        )
    if only is not None and only.shape != k.shape[:2]:
        raise ValueError(f"only must be [B, H] = {list(k.shape[:2])}, got {tuple(only.shape)}: one flag a head")
    for name, x in (("k_order", k_order), ("text", text), ("prompt_tokens", prompt_tokens), ("only", only)):
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {x.dtype}: convert it")
    for name, x in (("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name} must be contiguous in its last dim, got strides {x.stride()}: call .contiguous() first"
            )


# arch -> (granules of 16 keys that a program holds, warps). Not measured: chosen by ahead-of-time compile (no spills).
LAUNCH = LaunchTable({80: (8, 4), 89: (8, 4), 90: (8, 4), 100: (8, 4), 120: (8, 4)})


def _cut(k, v, k_order, size, text, prompt_tokens, *, gather, only):
    B, H, _, D = k.shape
    if k.dtype not in DTYPES:
        raise TypeError(f"k and v must be fp16, bf16 or fp32, got {k.dtype}: convert them")
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dim must be at most {MAX_HEAD_DIM}, got {D}: use dense attention")
    target.refuse_gradients("cut_granules", k, v)
    V, L = k_order.shape[2], 0 if text is None else text.shape[1]
    T = triton.cdiv(V, size)
    C = T + triton.cdiv(L, size)
    like = {"device": k.device}
    keys, values = (torch.empty(B, H, C * size, D, dtype=k.dtype, **like) if gather else None for _ in range(2))
    k_mean, v_mean = (torch.empty(B, H, T, D, dtype=k.dtype, **like) for _ in range(2))
    spread, weight = (torch.empty(B, H, T, dtype=torch.float32, **like) for _ in range(2))
    tokens = torch.empty(B, C, dtype=torch.int32, **like)
    block, num_warps = LAUNCH.row(k.device)
    with target.on_device(k):
        _cut_kernel[(triton.cdiv(C, block), B * H, 2)](  # keys, then values
            k, v, k_order, text, prompt_tokens, None if only is None else only.contiguous(), keys, values, k_mean, v_mean, spread, weight, tokens,
            H, V, T, L, C, *k.stride()[:3], *v.stride()[:3], *k_order.stride(),
            *((0, 0) if text is None else text.stride()), 0 if prompt_tokens is None else prompt_tokens.stride(0),
            SIZE=size, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_G=block, num_warps=num_warps,
        )  # fmt: skip
    return Granules(keys, values, tokens, k_mean, v_mean, spread, weight, size)


@triton.jit
def _cut_side(
    x, out, mean, moment, order, word, number, granule, is_video, at, T, C, stride_s, stride_os, stride_ts,
    HAS_TEXT: tl.constexpr, VALUES: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Keys or values of some granules, a token of each at a time: few registers, so that many loads are under way.

    Moments are of differences from a granule's first token, which is as near its mean as any: no digits are lost.
    """
    offs_d = tl.arange(0, BLOCK_D)
    inside = (offs_d < D)[None, :]
    first, total, squares = (tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32),) * 3
    for place in tl.range(0, SIZE, loop_unroll_factor=4):
        seen = place < number
        slot = (granule * SIZE + place).to(tl.int64)
        token = tl.load(order + slot * stride_os, mask=seen & is_video, other=0).to(tl.int64)
        if HAS_TEXT:
            token += tl.load(word + (slot - T * SIZE) * stride_ts, mask=seen & (granule >= T), other=0)
        row = tl.load(x + token[:, None] * stride_s + offs_d[None, :], mask=seen[:, None] & inside, other=0.0)
        if out is not None:
            tl.store(out + slot[:, None] * D + offs_d[None, :], row, mask=(granule < C)[:, None] & inside)
        row = row.to(tl.float32)
        first = tl.where(place == 0, row, first)
        difference = tl.where(seen[:, None], row - first, 0.0)
        total += difference
        squares += difference * difference
    share = (1.0 / tl.maximum(number, 1).to(tl.float32))[:, None]
    centre = first + total * share
    variance = tl.maximum(squares * share - (total * share) * (total * share), 0.0)
    tl.store(
        mean + at[:, None] * D + offs_d[None, :], centre.to(mean.dtype.element_ty), mask=is_video[:, None] & inside
    )
    if VALUES:
        tl.store(moment + at, tl.sum(centre * centre, 1) + tl.sum(variance, 1), mask=is_video)
    else:
        tl.store(moment + at, tl.sum(variance, 1) / D, mask=is_video)


@triton.jit(do_not_specialize=["V", "T", "L", "C"])
def _cut_kernel(
    k, v, order, text, prompt_tokens, only, k_out, v_out, k_mean, v_mean, spread, weight, tokens,
    H, V, T, L, C, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_tb, stride_ts, stride_pb,
    SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    granule = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    is_video = granule < T
    prompt = L
    if prompt_tokens is not None:
        prompt = tl.minimum(tl.load(prompt_tokens + b * stride_pb), L).to(tl.int32)
    number = tl.where(is_video, V - granule * SIZE, prompt - (granule - T) * SIZE)
    number = tl.minimum(tl.maximum(number, 0), SIZE)
    values = tl.program_id(2) == 1
    tl.store(tokens + b * C + granule, number, mask=(granule < C) & (h == 0) & (not values))
    if only is not None:
        if tl.load(only + bh) == 0:
            return
    HAS_TEXT: tl.constexpr = text is not None and k_out is not None
    if k_out is None:
        number = tl.where(is_video, number, 0)
    else:
        k_out += bh * C * SIZE * D
        v_out += bh * C * SIZE * D
    word = text
    if HAS_TEXT:
        word += b * stride_tb
    order += b * stride_ob + h * stride_oh
    at = bh * T + granule
    if values:
        _cut_side(
            v + b * stride_vb + h * stride_vh, v_out, v_mean, weight, order, word, number, granule, is_video, at, T, C,
            stride_vs, stride_os, stride_ts, HAS_TEXT, True, SIZE, D, BLOCK_D, BLOCK_G,
        )  # fmt: skip
    else:
        _cut_side(
            k + b * stride_kb + h * stride_kh, k_out, k_mean, spread, order, word, number, granule, is_video, at, T, C,
            stride_ks, stride_os, stride_ts, HAS_TEXT, False, SIZE, D, BLOCK_D, BLOCK_G,
        )  # fmt: skip
