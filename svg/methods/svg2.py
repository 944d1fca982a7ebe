"""SVG2: queries and keys are clustered by k-means; a query cluster attends to the key clusters holding its mass.

Video tokens are clustered; the prompt is one more cluster and the padding text another, on both sides. Prompt columns
and text rows are always computed; padding columns never.

Source: Sparse VideoGen2 (arXiv 2505.18875), sections 3 and 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svg.kernels.kmeans import kmeans
from svg.kernels.permute import sort_labels
from svg.kernels.top_p import top_p_block_map

from ..config import SVG2Config
from ..layout import TokenLayout
from ..state import LayerState
from .plan import Plan, visible_keys


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SVG2Config,
    state: LayerState,
    layout: TokenLayout,
    text_mask: Tensor | None = None,
) -> Plan:
    """Cluster queries and keys, and keep for every query cluster the key clusters holding top_p of its mass.

    A video of fewer tokens than clusters gets as many clusters as tokens.

    Args:
        q, k, v: float [B, H, S, D], after QK-norm and RoPE; v takes no part.
        config: the method's settings.
        state: the layer's state; its centroids are where k-means starts, and are replaced.
        layout: where video and text are.
        text_mask: bool [B, text_tokens], True for prompt tokens, or None for all.

    Returns:
        The plan: one map a head. Its density is within the budget, unless one key cluster a query cluster, which always
        stays, is above it.

    Raises:
        ValueError: the text alone is above the budget.

    Source: arXiv 2505.18875, sections 4.2 (clustering) and 4.3 (selection from centroids).
    """
    batch, heads, _, dim = q.shape
    q_labels, q_centroids, _ = _cluster(q[:, :, layout.video_slice], config.num_q_clusters, "q_centroids", config, state)
    k_labels, k_centroids, k_counts = _cluster(
        k[:, :, layout.video_slice], config.num_k_clusters, "k_centroids", config, state
    )
    block_map = top_p_block_map(
        q_centroids,
        k_centroids,
        k_counts,
        config.top_p,
        config.min_k_ratio,
        dim**-0.5,
        budget=_video_budget(config.budget, layout),
    )
    q_permutation, q_sizes = _sort(q_labels, q_centroids.shape[2], layout, text_mask)
    k_permutation, k_sizes = _sort(k_labels, k_centroids.shape[2], layout, text_mask)
    visible = visible_keys(batch, layout.video_tokens, layout.text_tokens, text_mask, q.device)
    return Plan(
        q_permutation=q_permutation,
        k_permutation=k_permutation,
        q_sizes=q_sizes.flatten(0, 1),
        k_sizes=k_sizes.flatten(0, 1),
        block_map=_with_text(block_map, layout).flatten(0, 1),
        map_index=torch.arange(batch * heads, dtype=torch.int32, device=q.device).view(batch, heads),
        visible_keys=visible.repeat_interleave(heads),
    )


def _cluster(x: Tensor, clusters: int, name: str, config: SVG2Config, state: LayerState) -> tuple[Tensor, ...]:
    centroids = state.cache.get(name)
    iterations = config.iterations
    if centroids is None:
        # The same tokens for every sample and head: a draw that knows the batch would tie samples to each other.
        tokens = torch.randperm(x.shape[2], generator=state.generator(x.device), device=x.device)[:clusters]
        centroids, iterations = x[:, :, tokens].float(), config.first_iterations  # [B, H, C, D]
    labels, centroids, sizes = kmeans(x, centroids, iterations)
    state.cache[name] = centroids
    return labels, centroids, sizes


def _sort(labels: Tensor, clusters: int, layout: TokenLayout, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if not layout.text_tokens:
        return sort_labels(labels, clusters)
    everything = labels.new_full((*labels.shape[:2], layout.total_tokens), clusters)  # [B, H, S]
    everything[:, :, layout.video_slice] = labels
    if text_mask is not None:
        everything[:, :, layout.text_slice] += text_mask.logical_not()[:, None]
    return sort_labels(everything, clusters + 2)


def _with_text(block_map: Tensor, layout: TokenLayout) -> Tensor:
    if not layout.text_tokens:
        return block_map
    block_map = F.pad(block_map, (0, 2, 0, 2), value=True)
    block_map[..., -1] = False
    return block_map


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
