"""`svg.sparge_attention`: SpargeAttn in the place of PyTorch's scaled_dot_product_attention, for any model."""

from __future__ import annotations

import torch
from torch import Tensor

from svg.kernels.block_sparse.op import block_sparse_attention
from svg.kernels.block_sparse_quantised.op import block_sparse_attention_quantised
from svg.kernels.common import target
from svg.kernels.selection.sparge import block_statistics, sparge_block_map

from ..config import SpargeConfig
from ..engine.layout import TokenLayout
from ..methods.sparge.plan import K_BLOCK, Q_BLOCK, block_sizes, video_blocks
from .quantised import LAYOUTS


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
    """
    if tensor_layout not in LAYOUTS:
        raise ValueError(f"tensor_layout must be one of {', '.join(LAYOUTS)}, got {tensor_layout!r}")
    if attn_mask is not None or is_causal:
        raise NotImplementedError(
            "attn_mask and is_causal are not supported by sparge_attention, whose blocks see everything or nothing: "
            "use svg.attention for causal models, or drop padding tokens"
        )
    if dropout_p:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p}: sparse attention is for inference")
    config = SpargeConfig(
        topk=topk, cdf=cdf, simthresh=simthresh, pv_threshold=pv_threshold, attention_sink=attention_sink,
        precision=precision, order="rowmajor" if grid is None else "hilbert",
    )  # fmt: skip
    target.refuse_gradients("svg.sparge_attention", q, k, v)
    if tensor_layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = _heads(q, k, v, enable_gqa)
    if grid is not None and not TokenLayout(*grid).total_tokens == q.shape[2] == k.shape[2]:
        raise ValueError(f"grid must have as many tokens as q and k, got {grid} for {q.shape[2]} and {k.shape[2]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = _attention(
        q, k, v, config.topk, config.cdf, simthresh, pv_threshold, attention_sink, precision, scale, list(grid or ())
    )
    return out.transpose(1, 2) if tensor_layout == "NHD" else out


def _heads(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor]:
    """k and v with q's heads."""
    heads, shared = q.shape[1], k.shape[1]
    if heads == shared:
        return k, v
    if not enable_gqa or heads % shared:
        raise ValueError(f"k must have q's {heads} heads, or with enable_gqa=True a divisor of them, got {shared}")
    return tuple(x.repeat_interleave(heads // shared, 1) for x in (k, v))


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
    batch, heads, S, _ = q.shape
    order = video_blocks(TokenLayout(*grid), "hilbert", q.device).order if grid else None

    def of_heads(value: float) -> Tensor:
        return torch.full((heads,), float(value), device=q.device)

    block_map = sparge_block_map(
        block_statistics(q, Q_BLOCK, order), block_statistics(k, K_BLOCK, order), simthresh=of_heads(simthresh),
        cdf=None if cdf is None else of_heads(cdf), topk=topk or 1.0, attention_sink=attention_sink, sm_scale=scale,
    )  # fmt: skip
    maps = batch * heads
    sizes = (block_sizes(n, block).to(q.device).expand(maps, -1) for n, block in ((S, Q_BLOCK), (k.shape[2], K_BLOCK)))
    plan = (block_map.flatten(0, 1), *sizes)
    index = torch.arange(maps, dtype=torch.int32, device=q.device).view(batch, heads)
    permutation = None if order is None else order.expand(batch, heads, -1)
    if precision == "native":
        if order is not None:
            k, v = (x[:, :, order.long()] for x in (k, v))
        return block_sparse_attention(q, k, v, *plan, map_index=index, q_permutation=permutation, sm_scale=scale)
    return block_sparse_attention_quantised(
        q, k, v, *plan, map_index=index, q_permutation=permutation, k_permutation=permutation, sm_scale=scale,
        precision=precision, pv_threshold=None if pv_threshold is None else of_heads(pv_threshold),
        key_multiple=K_BLOCK,
    )  # fmt: skip


@_attention.register_fake
def _(q, k, v, topk, cdf, simthresh, pv_threshold, attention_sink, precision, scale, grid):
    return torch.empty_like(q)
