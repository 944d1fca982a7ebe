"""SpargeAttn: the video is cut into blocks of neighbouring tokens, and block means predict which pairs matter.

Sequence of a head as executed (text only where it shares the sequence with the video):

    queries  video along the order's curve, in blocks of Q_BLOCK | prompt | padding
    keys     video along the order's curve, in blocks of K_BLOCK | prompt | padding

The prediction knows the video alone: prompt columns and text rows are always computed, padding columns never. The order
depends on the grid only, so it is the same for every head and made once.

Source: SpargeAttn (arXiv 2502.18137), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svg.kernels.common.constants import constant
from svg.kernels.selection.sparge import block_statistics, sparge_block_map

from ...engine.layout import TokenLayout
from ...engine.plan import Plan
from ...engine.replay import Steady
from ...engine.state import LayerState
from ..text import prompt_first, tile_multiple, visible_keys, with_text
from ..video_order import video_order
from .config import SpargeConfig
from .thresholds_file import Thresholds, thresholds_of

Q_BLOCK, K_BLOCK = 128, 64


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SpargeConfig,
    state: LayerState,
    layout: TokenLayout,
    text_mask: Tensor | None = None,
) -> Plan:
    """Predict from block means which key blocks each block of queries attends to.

    Args:
        q, k, v: float [B, H, S, D], after QK-norm and RoPE; v takes no part.
        config: the method's settings.
        state: the layer's state, which keeps its thresholds.
        layout: where video and text are.
        text_mask: bool [B, text_tokens], True for prompt tokens, or None for all.

    Returns:
        The plan: one map a head; `pv_threshold` is set where P V may be skipped.

    Raises:
        ValueError: the thresholds' file is not there, or is not of this layer or these settings.

    Source: arXiv 2502.18137, sections 3.2 (prediction) and 3.6 (permutation).
    """
    batch, heads, _, dim = q.shape
    blocks = video_blocks(layout, config.order, q.device)
    limits = _limits(config, state, heads, q.device)
    q_blocks, k_blocks = (
        block_statistics(x[:, :, layout.video_slice], size, blocks.order) for x, size in ((q, Q_BLOCK), (k, K_BLOCK))
    )
    block_map = sparge_block_map(
        q_blocks,
        k_blocks,
        simthresh=limits.simthresh,
        cdf=limits.cdf if config.topk is None else None,
        topk=1.0 if config.topk is None else config.topk,
        attention_sink=config.attention_sink,
        sm_scale=dim**-0.5,
    )
    permutation = _permutation(blocks, layout, text_mask)
    if permutation is not None:
        permutation = permutation[:, None].expand(batch, heads, -1)
    visible = visible_keys(batch, layout.video_tokens, layout.text_tokens, text_mask, q.device)
    filtered = config.pv_threshold is not None or config.thresholds is not None
    return Plan(
        q_permutation=permutation,
        k_permutation=permutation,
        q_sizes=_with_text_sizes(blocks.q_sizes, layout, text_mask, batch).repeat_interleave(heads, 0),
        k_sizes=_with_text_sizes(blocks.k_sizes, layout, text_mask, batch).repeat_interleave(heads, 0),
        block_map=with_text(block_map, layout).flatten(0, 1),
        map_index=torch.arange(batch * heads, dtype=torch.int32, device=q.device).view(batch, heads),
        visible_keys=visible.repeat_interleave(heads),
        key_multiple=tile_multiple(K_BLOCK, layout),
        pv_threshold=limits.pv_threshold if filtered and config.precision != "native" else None,
        one_map_per_head=True,
    )


def steady(
    q: Tensor, config: SpargeConfig, state: LayerState, layout: TokenLayout, text_mask: Tensor | None
) -> Steady | None:
    """What a captured call needs (see `svg/methods/registry.py`); None while thresholds are yet to be read."""
    known = "simthresh" in state.cache
    return Steady(config, video_blocks(layout, config.order, q.device)) if known else None


class VideoBlocks(NamedTuple):
    """How a video grid is cut into blocks.

    Args:
        order: int32 [V], sorted -> original index from 0, or None for identity.
        q_sizes, k_sizes: int32 [Nq], [Nk], tokens in each block.
    """

    order: Tensor | None
    q_sizes: Tensor
    k_sizes: Tensor


@constant(maxsize=8)
def video_blocks(layout: TokenLayout, order: str, device: torch.device) -> VideoBlocks:
    """Order and blocks of a video grid, computed on the CPU and moved once.

    Args:
        layout: where the video is.
        order: "hilbert" or "rowmajor".
        device: where the result lives.

    Returns:
        The blocks.
    """
    curve = None if order == "rowmajor" else video_order(layout, order).to(device, torch.int32)
    return VideoBlocks(curve, *(block_sizes(layout.video_tokens, size).to(device) for size in (Q_BLOCK, K_BLOCK)))


def block_sizes(tokens: int, block: int) -> Tensor:
    """Tokens in each block of a sequence, int32 [N] on the CPU."""
    return (tokens - torch.arange(0, tokens, block, dtype=torch.int32)).clamp_max(block)


def _limits(config: SpargeConfig, state: LayerState, heads: int, device: torch.device) -> Thresholds:
    """Thresholds of a layer's heads; kept in its state, so that a file is read once a run."""
    names = tuple(Thresholds.__dataclass_fields__)
    if names[0] not in state.cache:
        if config.thresholds is not None:
            found = thresholds_of(
                config.thresholds, state.transformer, state.layer, heads, config.order, config.attention_sink, device
            )
        else:
            never = torch.inf if config.pv_threshold is None else config.pv_threshold
            values = (config.simthresh, config.cdf or 1.0, never)
            found = Thresholds(
                **{name: torch.full((heads,), float(x), device=device) for name, x in zip(names, values)}
            )
        state.cache |= vars(found)
    return Thresholds(**{name: state.cache[name] for name in names})


def _permutation(blocks: VideoBlocks, layout: TokenLayout, text_mask: Tensor | None) -> Tensor | None:
    """int32 [1 or B, S], sorted -> original index: the video, prompt, padding; None where nothing moves."""
    if not layout.text_tokens:
        return None if blocks.order is None else blocks.order[None]
    moves = blocks.order is not None or layout.text_position == "first" or text_mask is not None
    if not moves:
        return None
    device = blocks.q_sizes.device
    order = blocks.order
    if order is None:
        order = torch.arange(layout.video_tokens, dtype=torch.int32, device=device)
    if text_mask is None:
        text_mask = torch.ones(1, layout.text_tokens, dtype=torch.bool, device=device)
    text = prompt_first(text_mask)
    video = (order + layout.video_slice.start).expand(text.shape[0], -1)
    return torch.cat([video, text + layout.text_slice.start], -1)


def _with_text_sizes(sizes: Tensor, layout: TokenLayout, text_mask: Tensor | None, batch: int) -> Tensor:
    """int32 [B, N] or, with text in the sequence, [B, N + 2] with the prompt's and the padding's sizes."""
    sizes = sizes.expand(batch, -1)
    if not layout.text_tokens:
        return sizes
    if text_mask is None:
        prompt = torch.full_like(sizes[:, :1], layout.text_tokens)
    else:
        prompt = text_mask.sum(-1, dtype=torch.int32, keepdim=True)
    return torch.cat([sizes, prompt, layout.text_tokens - prompt], -1)
