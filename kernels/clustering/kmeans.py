"""k-means of tokens, one clustering a head: squared Euclidean distance, Lloyd's iterations from given centroids.

    labels[t]    = argmin_c |c|^2 - 2 x_t . c             (|x_t|^2 is the same for every c and only costs precision)
                 = argmin_c |d|^2 / 2 + mu . d - x_t . d,   d = c - mu, mu the mean of a head's first centroids
    centroids[c] = mean of x_t over labels[t] == c        (an empty cluster keeps its centroid)

The second form keeps precision where a head's tokens share a large mean, as keys do. Scores are fp32, of directions d
rounded to x's dtype (so that products run on tensor cores, and are the exact distances to the rounded centroids); ties
go to the lowest index. fp16, bf16 and fp32 (three TF32 products), head dims up to 128, sm80 and newer; nothing waits for
the device.

An iteration is five kernels: scores and labels (kmeans_hopper.py on Hopper), a counting sort (permute.py), sums, means.
Sums run over sorted tokens in parts of `PART_ROWS`, whatever their clusters: a product with ones where a token is a
cluster's. A cluster across parts is put together from them in order, so two runs are bit-equal. The kernel that takes the
means writes the next directions. The last sums give the means of tiles of sorted tokens too, where they are wanted.
"""

from typing import NamedTuple

import torch

from ..common import target
from .assign import assign_and_sort, centered, check, check_triton, nearest
from .means import PART_ROWS, cluster_means, cluster_means_reference, kmeans_update_reference, run_means
from .permute import MAX_COUNTED, new_counters, sort_labels


class Clustering(NamedTuple):
    """One clustering of every head's tokens.

    Args:
        labels: int32 [B, H, S].
        centroids: fp32 [B, H, C, D], the means under exactly these labels.
        sizes: int32 [B, H, C], tokens in each cluster.
        permutation: int32 [B, H, S], sorted -> original index, stable.
    """

    labels: torch.Tensor
    centroids: torch.Tensor
    sizes: torch.Tensor
    permutation: torch.Tensor


def kmeans(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> Clustering:
    """Lloyd's k-means from given centroids, one clustering for each batch item and head.

    Args:
        x: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        centroids: fp32 [B, H, C, D], where to start.
        iterations: number of assign-and-update rounds, at least 1.

    Returns:
        The clustering after the last round, with the permutation that its sums were taken in.

    Raises:
        ValueError: iterations below 1, or shapes disagree.
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.

    Source: arXiv 2505.18875, section 4.2.
    """
    return _kmeans(x, centroids, iterations)[0]


def kmeans_reference(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> Clustering:
    """Specification of `kmeans` in plain torch; same arguments and result."""
    mean = centroids.mean(2, keepdim=True)
    for _ in range(iterations):
        labels = nearest(x, centroids, mean)
        centroids, sizes = kmeans_update_reference(x, labels, centroids)
    return Clustering(labels, centroids, sizes, sort_labels(labels, centroids.shape[2])[0])


def kmeans_and_tiles(
    x: torch.Tensor, centroids: torch.Tensor, iterations: int, tile: int
) -> tuple[Clustering, torch.Tensor]:
    """`kmeans`, and the means of every `tile` tokens in sorted order, which its last sums have read anyway.

    Args:
        x, centroids, iterations: as for `kmeans`.
        tile: tokens of a tile; the last one may have fewer.

    Returns:
        The clustering; means fp32 [B, H, ceil(S / tile), D], summed in fp32 and in a fixed order.

    Raises:
        As `kmeans`; ValueError: tile below 1.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}: pass the tokens of a tile")
    found, means = _kmeans(x, centroids, iterations, tile)
    assert means is not None
    return found, means


def kmeans_and_tiles_reference(
    x: torch.Tensor, centroids: torch.Tensor, iterations: int, tile: int
) -> tuple[Clustering, torch.Tensor]:
    """Specification of `kmeans_and_tiles` in plain torch; same arguments and result."""
    found = kmeans_reference(x, centroids, iterations)
    return found, _tile_means(cluster_means_reference, x, found.permutation, tile)


def _kmeans(
    x: torch.Tensor, centroids: torch.Tensor, iterations: int, tile: int | None = None
) -> tuple[Clustering, torch.Tensor | None]:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}: one is the cheapest warm-started choice")
    check(x, centroids)
    if not target.use_triton(x):
        if tile is not None:
            return kmeans_and_tiles_reference(x, centroids, iterations, tile)
        return kmeans_reference(x, centroids, iterations), None
    check_triton("kmeans", x)
    scored = centered(x, centroids)
    fused = tile is not None and PART_ROWS[x.element_size()] % tile == 0
    B, H, C, _ = centroids.shape
    counters = new_counters(B * H, x.shape[2], C, x.device) if C <= MAX_COUNTED else None
    for i in range(iterations):
        last = i + 1 == iterations
        labels, permutation, sizes, ends = assign_and_sort(x, scored, counters)
        centroids, tiles = run_means(
            x, permutation, ends, centroids, None if last else scored, tile if fused and last else None
        )
    if tile is not None and not fused:
        tiles = _tile_means(cluster_means, x, permutation, tile)
    return Clustering(labels, centroids, sizes, permutation), tiles


def _tile_means(means, x: torch.Tensor, permutation: torch.Tensor, tile: int) -> torch.Tensor:
    left = x.shape[2] - torch.arange(0, x.shape[2], tile, device=x.device)
    sizes = left.clamp_max(tile).to(torch.int32).expand(*x.shape[:2], -1)
    return means(x, permutation, sizes, torch.zeros(*sizes.shape, x.shape[3], device=x.device))
