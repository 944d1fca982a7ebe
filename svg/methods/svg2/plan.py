"""SVG2: queries and keys are clustered by k-means; a query cluster attends to the key clusters holding its mass.

The unit of the block map is a pair of clusters, as in the paper, or a pair of tiles: video tokens sorted by cluster, cut
every Q_TILE queries and K_TILE keys, which no kernel has to pad. Clusters are ordered once a run so that neighbours are
alike: runs of key clusters get longer, and tiles across a border stay uniform.

Video tokens are clustered; the prompt is one more cluster and the padding text another, on both sides. Prompt columns
and text rows are always computed; padding columns never.

Source: Sparse VideoGen2 (arXiv 2505.18875), sections 3 and 4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from svg.kernels.block_sparse.blocks import Tail
from svg.kernels.clustering.kmeans import Clustering, kmeans, kmeans_and_tiles
from svg.kernels.clustering.means import cluster_means
from svg.kernels.clustering.neighbours import neighbour_order
from svg.kernels.selection.top_p import top_p_block_map

from ...engine.layout import TokenLayout
from ...engine.plan import Plan
from ...engine.replay import Steady
from ...engine.state import LayerState
from .. import reuse
from ..text import prompt_first, tile_multiple, visible_keys, with_text
from .config import SVG2Config

Q_TILE, K_TILE = 128, 64


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SVG2Config,
    state: LayerState,
    layout: TokenLayout,
    text_mask: Tensor | None = None,
) -> Plan:
    """Cluster queries and keys, and keep for every query block the key blocks holding top_p of its mass.

    A video of fewer tokens than clusters gets as many clusters as tokens.

    Args:
        q, k, v: float [B, H, S, D], after QK-norm and RoPE; v takes part where the config compensates.
        config: the method's settings.
        state: the layer's state; its centroids are where k-means starts, and are replaced.
        layout: where video and text are.
        text_mask: bool [B, text_tokens], True for prompt tokens, or None for all.

    Returns:
        The plan: one map a head. Its density is within the budget, unless one key block a query block, which always
        stays, is above it.

    Raises:
        ValueError: the text alone is above the budget.

    Source: arXiv 2505.18875, sections 4.2 (clustering) and 4.3 (selection from centroids).
    """
    kept = reuse.still_good(state, config)
    if kept is None:
        chosen = _choose(q, k, config, state, layout)
        found = _assembled(k, v, chosen, chosen.k_blocks.means, config, layout, text_mask)
    else:
        chosen = kept.chosen
        found = _reused(kept, k, v, config, layout, text_mask)
    reuse.remember(state, config, kept, found, chosen, q[:, :, layout.video_slice], k[:, :, layout.video_slice])
    return found


def steady(
    q: Tensor, config: SVG2Config, state: LayerState, layout: TokenLayout, text_mask: Tensor | None
) -> Steady | None:
    """What a captured call needs (see `svg/methods/registry.py`); None where centroids are drawn first, or drift is measured."""
    clustered = "q_centroids" in state.cache and "k_centroids" in state.cache
    return Steady(config) if clustered and config.max_drift is None else None


class Chosen(NamedTuple):
    """What a clustering decides.

    Args:
        q_blocks, k_blocks: of the video's queries and keys.
        video_map: bool [B, H, Nq, Nk], which of them meet.
    """

    q_blocks: Blocks
    k_blocks: Blocks
    video_map: Tensor


def _reused(
    kept: reuse.SharedClustering,
    k: Tensor,
    v: Tensor,
    config: SVG2Config,
    layout: TokenLayout,
    text_mask: Tensor | None,
) -> Plan:
    """An earlier call's plan with this call's means."""
    blocks, means = kept.chosen.k_blocks, None
    if config.compensate:
        means = _means(k[:, :, layout.video_slice], blocks)
    if text_mask is not None:  # where the prompt ends is this call's
        return replace(_assembled(k, v, kept.chosen, means, config, layout, text_mask), reused=True)
    if means is None:
        return kept.plan.reused_with(None)
    return kept.plan.reused_with((means.to(k.dtype), _means(v[:, :, layout.video_slice], blocks).to(v.dtype)))


def _assembled(
    k: Tensor,
    v: Tensor,
    chosen: Chosen,
    means: Tensor | None,
    config: SVG2Config,
    layout: TokenLayout,
    text_mask: Tensor | None,
) -> Plan:
    """A plan of blocks and their map, text included; `means` of the keys' blocks, for the tail."""
    batch, heads = k.shape[:2]
    q_permutation, q_sizes = _with_text_tokens(chosen.q_blocks, layout, text_mask)
    k_permutation, k_sizes = _with_text_tokens(chosen.k_blocks, layout, text_mask)
    block_map = with_text(chosen.video_map, layout)
    visible = visible_keys(batch, layout.video_tokens, layout.text_tokens, text_mask, k.device)
    return Plan(
        q_permutation=q_permutation,
        k_permutation=k_permutation,
        q_sizes=q_sizes.flatten(0, 1),
        k_sizes=k_sizes.flatten(0, 1),
        block_map=block_map.flatten(0, 1),
        map_index=torch.arange(batch * heads, dtype=torch.int32, device=k.device).view(batch, heads),
        visible_keys=visible.repeat_interleave(heads),
        key_multiple=tile_multiple(K_TILE, layout) if config.selection == "tiles" else 1,
        tail=_tail(block_map, chosen.k_blocks, means, k, v, layout)
        if config.compensate and means is not None
        else None,
        one_map_per_head=True,
    )


def _choose(q: Tensor, k: Tensor, config: SVG2Config, state: LayerState, layout: TokenLayout) -> Chosen:
    sides = ((q, config.num_q_clusters, Q_TILE, "q_centroids"), (k, config.num_k_clusters, K_TILE, "k_centroids"))
    q_blocks, k_blocks = (
        _blocks(x[:, :, layout.video_slice], clusters, tile, name, config, state) for x, clusters, tile, name in sides
    )
    video_map = top_p_block_map(
        q_blocks.means,
        k_blocks.means,
        k_blocks.sizes,
        state.head_budgets(config, q.device),
        config.min_k_ratio,
        q.shape[-1] ** -0.5,
        budget=_video_budget(config.budget, layout),
    )
    return Chosen(q_blocks, k_blocks, video_map)


def _tail(block_map: Tensor, blocks: Blocks, means: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tail:
    """One key a video block, its mean, weighed by the block's size where the block is not computed.

    Source: SVG-EAR (arXiv 2603.08982), compensation by centroids; the means here are exact, of the final labels.
    """
    values = _means(v[:, :, layout.video_slice], blocks)
    log_sizes = blocks.sizes.float().log()[:, :, None]  # -inf for an empty block
    bias = torch.where(block_map[..., : blocks.sizes.shape[-1]], -torch.inf, log_sizes)
    return Tail(means.to(k.dtype), values.to(v.dtype), bias.flatten(0, 1))


def _means(x: Tensor, blocks: Blocks) -> Tensor:
    """The mean of every block of x, fp32 [B, H, N, D]; zero for an empty one."""
    return cluster_means(x, blocks.permutation, blocks.sizes, torch.zeros_like(blocks.means))


class Blocks(NamedTuple):
    """Video tokens of every head in sorted order, cut into blocks.

    Args:
        permutation: int32 [B, H, V], sorted -> original index.
        sizes: int32 [B, H, N], tokens in each block.
        means: fp32 [B, H, N, D].
    """

    permutation: Tensor
    sizes: Tensor
    means: Tensor


def _blocks(x: Tensor, clusters: int, tile: int, name: str, config: SVG2Config, state: LayerState) -> Blocks:
    found, means = _cluster(x, clusters, name, config, state, tile if config.selection == "tiles" else None)
    if means is None:
        return Blocks(found.permutation, found.sizes, found.centroids)
    starts = torch.arange(0, x.shape[2], tile, device=x.device)
    sizes = (x.shape[2] - starts).clamp_max(tile).to(torch.int32).expand(*x.shape[:2], -1)  # [B, H, N]
    return Blocks(found.permutation, sizes, means)


def _cluster(
    x: Tensor, clusters: int, name: str, config: SVG2Config, state: LayerState, tile: int | None
) -> tuple[Clustering, Tensor | None]:
    """The clustering, and the means of tiles of its sorted tokens where `tile` is given."""
    centroids = state.cache.get(name)
    iterations = config.iterations
    if centroids is None:
        # The same tokens for every sample and head: a draw that knows the batch would tie samples to each other.
        tokens = torch.randperm(x.shape[2], generator=state.generator(x.device), device=x.device)[:clusters]
        centroids, iterations = x[:, :, tokens].float(), 1  # [B, H, C, D]
        if config.first_iterations > 1:
            centroids = kmeans(x, centroids, config.first_iterations - 1).centroids
        # Later calls start from these centroids, so they keep the order.
        centroids = centroids.gather(2, neighbour_order(centroids).long()[..., None].expand_as(centroids))
    if tile is None:
        found, means = kmeans(x, centroids, iterations), None
    else:
        found, means = kmeans_and_tiles(x, centroids, iterations, tile)
    state.cache[name] = found.centroids
    return found, means


def _with_text_tokens(blocks: Blocks, layout: TokenLayout, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The permutation int32 [B, H, S] and sizes int32 [B, H, N + 2] with prompt and padding text at the end."""
    if not layout.text_tokens:
        return blocks.permutation, blocks.sizes
    batch, heads = blocks.sizes.shape[:2]
    if text_mask is None:
        text_mask = torch.ones(batch, layout.text_tokens, dtype=torch.bool, device=blocks.sizes.device)
    text = prompt_first(text_mask)
    text = (text + layout.text_slice.start)[:, None].expand(-1, heads, -1)
    prompt = text_mask.sum(-1, dtype=torch.int32)[:, None, None].expand(-1, heads, -1)
    return (
        torch.cat([blocks.permutation + layout.video_slice.start, text], -1),
        torch.cat([blocks.sizes, prompt, layout.text_tokens - prompt], -1),
    )


def _video_budget(budget: float | None, layout: TokenLayout) -> float | None:
    """Share of the video's own map that keeps the whole map, text included, within the budget."""
    if budget is None or not layout.text_tokens:
        return budget
    video, total = layout.video_tokens, layout.total_tokens
    # Without padding: the worst case, and known without reading the prompts' lengths from the device.
    text = total**2 - video**2
    if budget * total**2 <= text:
        raise ValueError(
            f"budget must be above {text / total**2:.4f}, the share of {layout.text_tokens} text tokens, which are always "
            f"computed, got {budget}; raise it"
        )
    return (budget * total**2 - text) / video**2
