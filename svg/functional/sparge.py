"""`svg.sparge_attention`: SpargeAttn in the place of PyTorch's scaled_dot_product_attention, for any model."""

from __future__ import annotations

import torch
from torch import Tensor

from svg.kernels.common import target
from svg.kernels.selection.sparge import block_statistics, sparge_block_map

from ..config import SpargeConfig
from ..documents import shown
from ..engine.layout import TokenLayout
from ..engine.plan import Plan
from ..methods.sparge.plan import K_BLOCK, Q_BLOCK, block_sizes, video_blocks
from ._arguments import check_flags, in_layout, sdpa_arguments


def sparge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    topk: float | None = None,
    cdf: float | None = None,
    simthresh: float = -0.1,
    pv_threshold: float | None = None,
    attention_sink: bool = False,
    precision: str = "native",
    tensor_layout: str = "HND",
    grid: tuple[int, int, int] | None = None,
) -> Tensor:
    """Sparse attention predicted from block means, with the arguments of PyTorch's scaled_dot_product_attention first.

    On a CPU the reference runs, in plain PyTorch. `torch.compile` keeps whole graphs.

    Args:
        q: fp16, bf16 or fp32 [B, H, S, D] ([B, S, H, D] where tensor_layout is "NHD"), D at most 128.
        k, v: [B, Hkv, Sk, D] ([B, Sk, Hkv, D]), q's dtype.
        attn_mask: must be None.
        dropout_p: must be 0.
        is_causal: must be False.
        scale: softmax scale; default D ** -0.5.
        enable_gqa: allow fewer key heads than query heads; Hkv must divide H.
        topk, cdf, simthresh, pv_threshold, attention_sink, precision: see `SpargeConfig`.
        tensor_layout: "HND" or "NHD": whether heads or tokens come first.
        grid: frames, height and width of a video whose tokens q, k and v are, to cut blocks along a Hilbert curve;
            None: blocks are stretches of the sequence.

    Returns:
        out, q's shape, dtype and layout.

    Raises:
        ValueError: shapes disagree, or a value is unknown or outside its range.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: a mask, causality, dropout or a gradient is asked for, or FP8 on a GPU without it.

    Source: SpargeAttn (arXiv 2502.18137), section 3.

    Example:
        out = svg.sparge_attention(q, k, v, topk=0.5, grid=(21, 45, 80))  # q, k, v [B, H, 21 * 45 * 80, D]
    """
    check_flags(is_causal=is_causal)
    if attn_mask is not None or is_causal:
        raise NotImplementedError(
            "attn_mask and is_causal are not supported by sparge_attention, whose blocks see everything or nothing: "
            "use svg.attention for causal models, or drop padding tokens"
        )
    config = SpargeConfig(
        topk=topk, cdf=cdf, simthresh=simthresh, pv_threshold=pv_threshold, attention_sink=attention_sink,
        precision=precision, order="rowmajor" if grid is None else "hilbert",
    )  # fmt: skip
    q, k, v, scale = sdpa_arguments(
        q, k, v, tensor_layout=tensor_layout, dropout_p=dropout_p, enable_gqa=enable_gqa, scale=scale,
        no_dropout="sparse attention is for inference", instead_of_nested="call it for one sequence at a time",
    )  # fmt: skip
    target.refuse_gradients("svg.sparge_attention", q, k, v)
    k, v = (_with_heads(x, q.shape[1]) for x in (k, v))
    if grid is not None and (not isinstance(grid, (tuple, list)) or len(grid) != 3):
        raise TypeError(f"grid must be frames, height and width, got {shown(grid)}")
    if grid is not None and not TokenLayout(*grid).total_tokens == q.shape[2] == k.shape[2]:
        raise ValueError(f"grid must have as many tokens as q and k, got {grid} for {q.shape[2]} and {k.shape[2]}")
    out = _attention(
        q, k, v, config.topk, config.cdf, simthresh, pv_threshold, attention_sink, precision, scale, list(grid or ())
    )
    return in_layout(out, tensor_layout)


def _with_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values with as many heads as queries have."""
    if heads % x.shape[1]:
        raise ValueError(f"k must have q's {heads} heads, or with enable_gqa=True a divisor of them, got {x.shape[1]}")
    return x if heads == x.shape[1] else x.repeat_interleave(heads // x.shape[1], 1)


@torch.library.custom_op("svg::sparge_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: float | None,
    cdf: float | None,
    simthresh: float,
    pv_threshold: float | None,
    attention_sink: bool,
    precision: str,
    scale: float,
    grid: list[int],
) -> Tensor:
    batch, heads = q.shape[:2]
    order = None
    if grid:
        frames, height, width = grid
        order = video_blocks(TokenLayout(frames, height, width), "hilbert", q.device).order

    def for_heads(value: float) -> Tensor:
        return torch.full((heads,), float(value), device=q.device)

    block_map = sparge_block_map(
        block_statistics(q, Q_BLOCK, order), block_statistics(k, K_BLOCK, order), simthresh=for_heads(simthresh),
        cdf=None if cdf is None else for_heads(cdf), topk=topk or 1.0, attention_sink=attention_sink, sm_scale=scale,
    )  # fmt: skip
    maps = batch * heads
    q_sizes, k_sizes = (
        block_sizes(x.shape[2], block).to(q.device).expand(maps, -1) for x, block in ((q, Q_BLOCK), (k, K_BLOCK))
    )
    permutation = None if order is None else order.expand(batch, heads, -1)
    plan = Plan(
        q_permutation=permutation,
        k_permutation=permutation,
        q_sizes=q_sizes,
        k_sizes=k_sizes,
        block_map=block_map.flatten(0, 1),
        map_index=torch.arange(maps, dtype=torch.int32, device=q.device).view(batch, heads),
        visible_keys=torch.full((maps,), k.shape[2], device=q.device),
        pv_threshold=None if pv_threshold is None else for_heads(pv_threshold),
        key_multiple=K_BLOCK,
        one_map_per_head=True,
        sm_scale=scale,
    )
    return plan.execute(q, k, v, precision)


@_attention.register_fake
def _(q, k, v, topk, cdf, simthresh, pv_threshold, attention_sink, precision, scale, grid):
    return torch.empty_like(q)
