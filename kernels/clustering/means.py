"""The mean of every cluster's tokens, summed in fp32 and in a fixed order."""

import torch

from ..common import target
from ..common.target import tl, triton
from .assign import CENTRED, SUMMED, Scored, check, check_triton, direct
from .permute import sort_labels

PART_ROWS = {2: 128, 4: 32}  # element bytes -> sorted tokens that are summed together


def kmeans_update(x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of every cluster's tokens, summed in fp32 and in a fixed order; an empty cluster keeps its centroid.

    Args:
        x: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        labels: int32 [B, H, S], each in [0, C).
        centroids: fp32 [B, H, C, D], kept where a cluster is empty.

    Returns:
        centroids fp32 [B, H, C, D]; sizes int32 [B, H, C].

    Raises:
        As `kmeans_assign`.

    Source: arXiv 2505.18875, section 4.2.
    """
    check(x, centroids)
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
    check(x, centroids)
    if permutation.shape != x.shape[:3] or sizes.shape != centroids.shape[:3]:
        raise ValueError(
            f"permutation must be [B, H, S] = {tuple(x.shape[:3])} and sizes [B, H, C] = {tuple(centroids.shape[:3])}, "
            f"got {tuple(permutation.shape)} and {tuple(sizes.shape)}: pass what sort_labels returns"
        )
    if not target.use_triton(x):
        return cluster_means_reference(x, permutation, sizes, centroids)
    check_triton("cluster_means", x)
    return run_means(x, permutation.contiguous(), sizes.cumsum(-1, dtype=torch.int32), centroids)[0]


def run_means(
    x: torch.Tensor,
    permutation: torch.Tensor,
    ends: torch.Tensor,
    centroids: torch.Tensor,
    scored: Scored | None = None,
    tile: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Means of runs of sorted tokens that stop at `ends`, and of every `tile` of them, which divides PART_ROWS.

    Where scored is given, its directions become those of the means.
    """
    B, H, S, D = x.shape
    C = centroids.shape[2]
    centroids = centroids.contiguous()
    means = torch.empty_like(centroids)
    rows = PART_ROWS[x.element_size()]
    parts = triton.cdiv(S, rows)
    sums = torch.empty(B * H, C + 2 * parts, D, dtype=torch.float32, device=x.device)
    block_d = max(16, triton.next_power_of_2(D))
    tiles = None if tile is None else means.new_empty(B, H, triton.cdiv(S, tile), D)
    with target.on_device(x):
        _sum_kernel[(parts, B * H)](
            x, permutation, ends, sums, tiles, H, S, C, *x.stride()[:3],
            D=D, BLOCK_D=block_d, ROWS=rows, TILE=tile or rows, CLUSTERS=SUMMED,
            STEP=max(2, triton.next_power_of_2(triton.cdiv(C, 128))),
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", num_warps=4, **target.overlapped(x.device),
        )  # fmt: skip
        _mean_kernel[(triton.cdiv(C, CENTRED), B * H)](
            sums, ends, centroids, means, *(scored or (None, None, None)), C, parts,
            0 if scored is None else scored.offsets.shape[2],
            D=D, BLOCK_D=block_d, ROWS=rows, CLUSTERS=CENTRED, **target.overlapped(x.device),
        )  # fmt: skip
    return means, tiles


def cluster_means_reference(
    x: torch.Tensor, permutation: torch.Tensor, sizes: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """Specification of `cluster_means` in plain torch; same arguments and result (fp64 centroids sum in fp64)."""
    place = torch.arange(x.shape[2], device=x.device).expand(x.shape[:3]).contiguous()
    group = torch.searchsorted(sizes.long().cumsum(-1), place, right=True)  # of each sorted token
    labels = torch.empty_like(group).scatter_(2, permutation.long(), group)
    return kmeans_update_reference(x, labels, centroids)[0]


@triton.jit
def _first_beyond(ends, C, place, STEP: tl.constexpr):
    """The first cluster that ends beyond a place: how many groups of STEP end before it, then how many of the next one."""
    last = tl.arange(0, 128) * STEP + STEP - 1
    groups = tl.sum((tl.load(ends + last, mask=last < C, other=2147483647) <= place).to(tl.int32), 0)
    c = groups * STEP + tl.arange(0, STEP)
    return groups * STEP + tl.sum((tl.load(ends + c, mask=c < C, other=2147483647) <= place).to(tl.int32), 0)


@triton.jit(do_not_specialize=["S", "C"])
def _sum_kernel(
    x, permutation, ends, sums, tiles, H, S, C, stride_xb, stride_xh, stride_xs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CLUSTERS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Means of a part's tiles, and sums of its clusters.

    Row c of sums is cluster c where it lies in one part; else row C + 2 part is what a part has of a cluster that began
    before it, and the row after that what it has of one that it does not finish.
    """
    target.follow(EARLY)
    part = tl.program_id(0)
    bh = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)  # the cache still has the last heads that were scored
    first = part * ROWS
    place = first + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    token = tl.load(permutation + bh * S + place, mask=place < S, other=0).to(tl.int64)
    ends += bh * C
    cluster = _first_beyond(ends, C, first, STEP)  # before rows: their copy to shared memory waits
    x += (bh // H) * stride_xb + (bh % H) * stride_xh
    mask = (place < S)[:, None] & (offs_d < D)[None, :]
    rows = tl.load(x + token[:, None] * stride_xs + offs_d[None, :], mask=mask, other=0.0)  # [ROWS, BD]
    sums += bh * (C + 2 * tl.num_programs(0)) * D
    if tiles is not None:
        tile = tl.arange(0, CLUSTERS)
        member = (place - first)[None, :] // TILE == tile[:, None]
        total = tl.dot(member.to(rows.dtype), rows, input_precision=PRECISION)  # [CLUSTERS, BD]
        left = S - first - tile * TILE
        goal = (bh * tl.cdiv(S, TILE) + part * (ROWS // TILE) + tile)[:, None] * D + offs_d[None, :]
        mean = total / tl.minimum(tl.maximum(left, 1), TILE).to(tl.float32)[:, None]
        tl.store(tiles + goal, mean, mask=((tile < ROWS // TILE) & (left > 0))[:, None] & (offs_d < D)[None, :])
    reached = first
    while reached < tl.minimum(first + ROWS, S):
        c = cluster + tl.arange(0, CLUSTERS)
        stop = tl.load(ends + c, mask=c < C, other=0)
        start = tl.load(ends + c - 1, mask=(c > 0) & (c < C), other=0)
        member = (place[None, :] >= start[:, None]) & (place[None, :] < stop[:, None])
        total = tl.dot(member.to(rows.dtype), rows, input_precision=PRECISION)  # [CLUSTERS, BD]
        row = tl.where(start < first, C + 2 * part, tl.where(stop > first + ROWS, C + 2 * part + 1, c))
        some = (tl.maximum(start, first) < tl.minimum(stop, first + ROWS))[:, None] & (offs_d < D)[None, :]
        tl.store(sums + row[:, None].to(tl.int64) * D + offs_d[None, :], total, mask=some)
        cluster += CLUSTERS
        reached = tl.max(stop, 0)


@triton.jit(do_not_specialize=["C", "parts", "padded"])
def _mean_kernel(
    sums, ends, old, new, mean, directions, offsets, C, parts, padded,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Means from the sums of parts, and the directions of the next scores."""
    target.follow(EARLY)
    bh = tl.program_id(1).to(tl.int64)
    cluster = tl.program_id(0) * CLUSTERS + tl.arange(0, CLUSTERS)
    offs_d = tl.arange(0, BLOCK_D)
    inside = cluster < C
    stop = tl.load(ends + bh * C + cluster, mask=inside, other=0)
    start = tl.load(ends + bh * C + cluster - 1, mask=inside & (cluster > 0), other=0)
    size = stop - start
    first, last = start // ROWS, (stop - 1) // ROWS
    real = (offs_d < D)[None, :]
    sums += bh * (C + 2 * parts) * D + offs_d[None, :]
    row = tl.where(first == last, cluster, C + 2 * first + 1)
    total = tl.load(sums + row[:, None] * D, mask=(size > 0)[:, None] & real, other=0.0)  # [CLUSTERS, BD]
    for part in range(1, tl.max(last - first, 0) + 1):
        more = (size > 0) & (first + part <= last)
        total += tl.load(sums + (C + 2 * (first + part))[:, None] * D, mask=more[:, None] & real, other=0.0)
    mask = inside[:, None] & real
    entry = (bh * C + cluster)[:, None] * D + offs_d[None, :]
    kept = tl.load(old + entry, mask=mask, other=0.0)
    value = tl.where((size > 0)[:, None], total / tl.maximum(size, 1).to(tl.float32)[:, None], kept)
    tl.store(new + entry, value, mask=mask)
    if directions is not None:
        centre = tl.load(mean + bh * D + offs_d, mask=offs_d < D, other=0.0)[None, :]
        direct(value, centre, directions, offsets, entry, bh * padded + cluster, mask, inside)
