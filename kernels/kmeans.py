"""k-means of tokens, one clustering a head: squared Euclidean distance, Lloyd's iterations from given centroids.

    labels[t]    = argmin_c |c|^2 - 2 x_t . c        (|x_t|^2 is the same for every c and only costs precision)
                 = argmin_c |d|^2 + 2 mu . d - 2 x_t . d,   d = c - mu, mu the mean of a head's centroids
    centroids[c] = mean of x_t over labels[t] == c   (an empty cluster keeps its centroid)

The second form keeps precision where a head's tokens share a large mean, as keys do. Scores are fp32, of directions d
rounded to x's dtype (so that products run on tensor cores, and are the exact distances to the rounded centroids); ties
go to the lowest index. Sums run over tokens in sorted order, without atomics: two runs are bit-equal. fp16, bf16 and fp32 (three TF32 products), head dims up to 128, sm80 and newer; nothing waits for the device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import target
from .permute import sort_labels
from .target import tl, triton

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCORE_CHUNK = 1 << 24
CENTRED_ROWS = 16


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
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}: one is the cheapest warm-started choice")
    for _ in range(iterations):
        labels = kmeans_assign(x, centroids)
        permutation, sizes = sort_labels(labels, centroids.shape[2])
        centroids = cluster_means(x, permutation, sizes, centroids)
    return Clustering(labels, centroids, sizes, permutation)


def kmeans_assign(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of every token; ties go to the lowest index.

    Args:
        x: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        centroids: fp32 [B, H, C, D]; their distance to their mean is rounded to x's dtype before use.

    Returns:
        labels int32 [B, H, S].

    Raises:
        ValueError: shapes disagree, or x's last dim is strided.
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.

    Source: arXiv 2505.18875, section 4.2.
    """
    _check(x, centroids)
    if not target.use_triton(x):
        return kmeans_assign_reference(x, centroids)
    _check_triton("kmeans_assign", x)
    B, H, S, D = x.shape
    C = centroids.shape[2]
    centroids = centroids.contiguous()
    directions = torch.empty_like(centroids, dtype=x.dtype)
    offsets = torch.empty(B, H, C, dtype=torch.float32, device=x.device)
    labels = torch.empty(B, H, S, dtype=torch.int32, device=x.device)
    block_d = max(16, triton.next_power_of_2(D))
    row = target.launch_row(LAUNCH, x.device)[x.element_size()]
    with target.on_device(x):
        mean = centroids.mean(2)
        _centre_kernel[(triton.cdiv(C, CENTRED_ROWS), B * H)](
            centroids, mean, directions, offsets, C, D=D, BLOCK_D=block_d, ROWS=CENTRED_ROWS
        )
        _assign_kernel[(triton.cdiv(S, row.block_s), B * H)](
            x, directions, offsets, labels, H, S, C, *x.stride()[:3],
            D=D, BLOCK_D=block_d, BLOCK_S=row.block_s, BLOCK_C=row.block_c,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return labels


def kmeans_assign_reference(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Specification of `kmeans_assign` in plain torch; same arguments and result (fp64 x scores in fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    directions, offsets = _centred(centroids, x.dtype)
    directions = directions.to(wide).transpose(2, 3)  # [B, H, D, C]
    chunk = max(1, SCORE_CHUNK // (x.shape[0] * x.shape[1] * centroids.shape[2]))
    # The scores of all tokens at once would be B * H * S * C numbers.
    parts = [
        torch.argmin(offsets.unsqueeze(2) - 2 * part.to(wide) @ directions, dim=-1) for part in x.split(chunk, dim=2)
    ]
    return torch.cat(parts, dim=2).to(torch.int32)


def _centred(centroids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids minus their mean, in dtype [B, H, C, D], and what a score adds to -2 x . d, fp32 [B, H, C]."""
    mean = centroids.mean(2, keepdim=True)
    directions = (centroids - mean).to(dtype).contiguous()
    exact = directions.to(centroids.dtype)
    return directions, (exact * (exact + 2 * mean)).sum(-1)


def kmeans_update(x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of every cluster's tokens, summed in fp32 and in a fixed order; an empty cluster keeps its centroid.

    Args:
        x: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        labels: int32 [B, H, S], each in [0, C).
        centroids: fp32 [B, H, C, D], kept where a cluster is empty.

    Returns:
        centroids fp32 [B, H, C, D]; sizes int32 [B, H, C].

    Raises:
        ValueError: shapes disagree, or x's last dim is strided.
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.

    Source: arXiv 2505.18875, section 4.2.
    """
    _check(x, centroids)
    if labels.shape != x.shape[:3]:
        raise ValueError(
            f"labels must be [B, H, S] = {tuple(x.shape[:3])}, got {tuple(labels.shape)}: label each token"
        )
    permutation, sizes = sort_labels(labels, centroids.shape[2])
    return cluster_means(x, permutation, sizes, centroids), sizes


def kmeans_update_reference(
    x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of `kmeans_update` in plain torch; same arguments and result (fp64 centroids sum in fp64)."""
    index = labels.long()
    sizes = torch.zeros(centroids.shape[:3], dtype=torch.int32, device=x.device)
    sizes.scatter_add_(2, index, torch.ones_like(labels, dtype=torch.int32))
    sums = torch.zeros_like(centroids).scatter_add_(2, index[..., None].expand_as(x), x.to(centroids.dtype))
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    return torch.where(sizes.unsqueeze(-1) > 0, means, centroids), sizes


def cluster_means(
    x: torch.Tensor, permutation: torch.Tensor, sizes: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """The mean of every group of tokens that follow each other in sorted order, summed in fp32 in that order.

    Args:
        x: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        permutation: int32 [B, H, S], sorted -> original index.
        sizes: int32 [B, H, C], tokens in each group; a row sums to S.
        centroids: fp32 [B, H, C, D], kept where a group is empty.

    Returns:
        fp32 [B, H, C, D].

    Raises:
        ValueError: shapes disagree, or x's last dim is strided.
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.
    """
    _check(x, centroids)
    if permutation.shape != x.shape[:3] or sizes.shape != centroids.shape[:3]:
        raise ValueError(
            f"permutation must be [B, H, S] = {tuple(x.shape[:3])} and sizes [B, H, C] = {tuple(centroids.shape[:3])}, "
            f"got {tuple(permutation.shape)} and {tuple(sizes.shape)}: pass what sort_labels returns"
        )
    if not target.use_triton(x):
        return cluster_means_reference(x, permutation, sizes, centroids)
    _check_triton("cluster_means", x)
    B, H, S, D = x.shape
    C = centroids.shape[2]
    means = torch.empty_like(centroids, memory_format=torch.contiguous_format)
    row = target.launch_row(LAUNCH, x.device)[x.element_size()]
    sizes = sizes.contiguous()
    with target.on_device(x):
        _update_kernel[(C, B * H)](
            x, permutation.contiguous(), sizes, torch.cumsum(sizes, -1, dtype=torch.int32), centroids.contiguous(), means,
            H, S, C, *x.stride()[:3],
            D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_S=row.update_block_s, num_warps=4,
        )  # fmt: skip
    return means


def cluster_means_reference(
    x: torch.Tensor, permutation: torch.Tensor, sizes: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """Specification of `cluster_means` in plain torch; same arguments and result (fp64 centroids sum in fp64)."""
    place = torch.arange(x.shape[2], device=x.device).expand(x.shape[:3]).contiguous()
    group = torch.searchsorted(sizes.long().cumsum(-1), place, right=True)  # of each sorted token
    labels = torch.empty_like(group).scatter_(2, permutation.long(), group)
    return kmeans_update_reference(x, labels, centroids)[0]


def _check(x: torch.Tensor, centroids: torch.Tensor) -> None:
    if x.dim() != 4 or centroids.dim() != 4 or (*x.shape[:2], x.shape[3]) != (*centroids.shape[:2], centroids.shape[3]):
        raise ValueError(
            f"x must be [B, H, S, D] and centroids [B, H, C, D], got {tuple(x.shape)} and {tuple(centroids.shape)}: "
            "make one set of centroids for each batch item and head"
        )
    if not x.is_floating_point() or centroids.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x must be floating point and centroids fp32, got {x.dtype} and {centroids.dtype}: convert them"
        )
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"x must be contiguous in its last dim, got strides {x.stride()}: call .contiguous() first")


def _check_triton(op: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}: convert it")
    if x.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dim must be at most {MAX_HEAD_DIM}, got {x.shape[-1]}: use dense attention")
    target.refuse_gradients(op, x)


@dataclass(frozen=True)
class Launch:
    """Tile sizes of one architecture and dtype width."""

    block_s: int
    block_c: int
    num_warps: int
    num_stages: int
    update_block_s: int = 32


# arch -> element bytes -> tile sizes. sm90's 16-bit row is measured (docs/kernels.md), the others are chosen by ahead-of-time
# compile (no spills, shared memory).
LAUNCH = {
    80: {2: Launch(128, 64, 8, 3), 4: Launch(64, 16, 8, 2)},
    89: {2: Launch(128, 64, 8, 2), 4: Launch(64, 16, 8, 2)},
    90: {2: Launch(128, 32, 8, 4, 128), 4: Launch(64, 16, 8, 2)},
    100: {2: Launch(128, 64, 8, 3), 4: Launch(64, 16, 8, 2)},
    120: {2: Launch(128, 64, 8, 2), 4: Launch(64, 16, 8, 2)},
}


@triton.jit(do_not_specialize=["C"])
def _centre_kernel(
    centroids, mean, directions, offsets, C, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """What `_centred` computes."""
    bh = tl.program_id(1).to(tl.int64)
    row = bh * C + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    inside = row < (bh + 1) * C
    mask = inside[:, None] & (offs_d < D)[None, :]  # [ROWS, BD]
    centre = tl.load(mean + bh * D + offs_d, mask=offs_d < D, other=0.0)[None, :]
    entry = row[:, None] * D + offs_d[None, :]
    direction = (tl.load(centroids + entry, mask=mask, other=0.0) - centre).to(directions.dtype.element_ty)
    tl.store(directions + entry, direction, mask=mask)
    exact = tl.where(mask, direction.to(tl.float32), 0.0)
    tl.store(offsets + row, tl.sum(exact * (exact + 2 * centre), 1), mask=inside)


@triton.jit(do_not_specialize=["S", "C"])
def _assign_kernel(
    x, directions, offsets, labels, H, S, C, stride_xb, stride_xh, stride_xs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BS]
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    x_ptr = x + b * stride_xb + h * stride_xh + offs_s[:, None] * stride_xs + offs_d[None, :]
    x_tile = tl.load(x_ptr, mask=(offs_s < S)[:, None] & (offs_d < D)[None, :], other=0.0)  # [BS, BD]
    directions += bh * C * D
    offsets += bh * C
    # Each column keeps its own best until the end: one reduction instead of one a tile.
    best = tl.full([BLOCK_S, BLOCK_C], float("inf"), dtype=tl.float32)
    best_first = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.int32)
    for first in range(0, C, BLOCK_C):
        inside = first + offs_c < C
        d_ptr = directions + (first + offs_c)[:, None] * D + offs_d[None, :]
        d_tile = tl.load(d_ptr, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)  # [BC, BD]
        offset = tl.load(offsets + first + offs_c, mask=inside, other=float("inf"))
        score = offset[None, :] - 2 * tl.dot(x_tile, tl.trans(d_tile), input_precision=PRECISION)  # [BS, BC]
        closer = score < best
        best = tl.where(closer, score, best)
        best_first = tl.where(closer, first, best_first)
    index = best_first + offs_c[None, :]
    index = tl.where(best == tl.min(best, 1)[:, None], index, C - 1)
    # NaN scores match nothing: the label stays in range, and the caller's finite check reports the input.
    label = tl.minimum(tl.min(index, 1), C - 1)
    tl.store(labels + bh * S + offs_s, label, mask=offs_s < S)


@triton.jit(do_not_specialize=["S", "C"])
def _update_kernel(
    x, permutation, sizes, stops, old, new, H, S, C, stride_xb, stride_xh, stride_xs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    cluster = bh * C + tl.program_id(0)
    size = tl.load(sizes + cluster)
    permutation += bh * S + tl.load(stops + cluster) - size
    x += b * stride_xb + h * stride_xh
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    real = offs_d < D
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for first in range(0, size, BLOCK_S):
        inside = first + offs_s < size
        token = tl.load(permutation + first + offs_s, mask=inside, other=0).to(tl.int64)
        rows = x + token[:, None] * stride_xs + offs_d[None, :]
        total += tl.load(rows, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(size, 1).to(tl.float32)
    kept = tl.load(old + cluster * D + offs_d, mask=real, other=0.0)
    tl.store(new + cluster * D + offs_d, tl.where(size > 0, mean, kept), mask=real)
