"""The order in which a call's queries and keys are cut: by cluster, and inside a cluster along a curve through the video."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svg.kernels.clustering.kmeans import kmeans
from svg.kernels.clustering.neighbours import neighbour_order
from svg.kernels.clustering.permute import sort_labels

from ...engine.layout import TokenLayout
from ...engine.state import LayerState
from ..video_order import video_order
from .config import NearConfig


def token_orders(
    q: Tensor, k: Tensor, config: NearConfig, state: LayerState, layout: TokenLayout
) -> tuple[Tensor, Tensor]:
    """Orders of the video's queries and of its keys.

    Args:
        q, k: float [B, H, V, D], the video's.
        config: the method's settings.
        state: the layer's state; its centroids are where k-means starts, and are replaced.
        layout: where the video is; its first token's index is added.

    Returns:
        int32 [B, H, V] twice, sorted -> index in the whole sequence.
    """
    curve = _curve(layout, state, q.device)
    if config.query_order == "clusters":
        q_order = _by_cluster(q, config.query_cluster_tokens, "q_centroids", curve, config, state)
    else:
        q_order = curve.expand(*q.shape[:2], -1)
    k_order = _by_cluster(k, config.cluster_tokens, "k_centroids", curve, config, state)
    first = layout.video_slice.start
    return (q_order, k_order) if first == 0 else (q_order + first, k_order + first)


def _curve(layout: TokenLayout, state: LayerState, device: torch.device) -> Tensor:
    """The video's tokens along a Hilbert curve, int32 [V], copied to the device once a run."""
    if "curve" not in state.cache:
        state.cache["curve"] = video_order(layout, "hilbert").to(device, torch.int32)
    return state.cache["curve"]


def _by_cluster(
    x: Tensor, cluster_tokens: int, name: str, curve: Tensor, config: NearConfig, state: LayerState
) -> Tensor:
    """int32 [B, H, V]: tokens sorted by cluster, in the curve's order inside a cluster."""
    clusters = math.ceil(x.shape[2] / cluster_tokens)
    centroids, iterations = state.cache.get(name), config.iterations
    if centroids is None:
        centroids, iterations = _first_centroids(x, clusters, config, state), 1
    found = kmeans(x, centroids, iterations)
    state.cache[name] = found.centroids
    labels = found.labels.index_select(-1, curve)
    places = sort_labels(labels, clusters)[0]
    return curve.expand_as(places).gather(-1, places.long())


def _first_centroids(x: Tensor, clusters: int, config: NearConfig, state: LayerState) -> Tensor:
    """Centroids of the first clustering of a run, neighbours next to each other."""
    # The same tokens for every sample and head: a draw that knows the batch would tie samples to each other.
    tokens = torch.randperm(x.shape[2], generator=state.generator(x.device), device=x.device)[:clusters]
    centroids = x[:, :, tokens].float()  # [B, H, C, D]
    if config.first_iterations > 1:
        centroids = kmeans(x, centroids, config.first_iterations - 1).centroids
    return centroids.gather(2, neighbour_order(centroids).long()[..., None].expand_as(centroids))
