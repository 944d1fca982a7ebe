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

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..common import target
from ..common.target import tl, triton
from . import kmeans_hopper
from .permute import CHUNK, MAX_COUNTED, Counters, new_counters, place_counted, sort_labels

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCORE_CHUNK = 1 << 24
PART_ROWS = {2: 128, 4: 32}  # element bytes -> sorted tokens that are summed together
SUMMED, CENTRED = 16, 8  # clusters of a product with ones, and those whose means one program takes
TOTALLED = 64  # first centroids that one program adds up


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
        labels = _nearest(x, centroids, mean)
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
    return _kmeans(x, centroids, iterations, tile)


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
    _check(x, centroids)
    if not target.use_triton(x):
        if tile is not None:
            return kmeans_and_tiles_reference(x, centroids, iterations, tile)
        return kmeans_reference(x, centroids, iterations), None
    _check_triton("kmeans", x)
    scored = _centred(x, centroids)
    fused = tile is not None and PART_ROWS[x.element_size()] % tile == 0
    B, H, C, _ = centroids.shape
    counters = new_counters(B * H, x.shape[2], C, x.device) if C <= MAX_COUNTED else None
    for i in range(iterations):
        last = i + 1 == iterations
        labels, permutation, sizes, ends = _assign_and_sort(x, scored, counters)
        centroids, tiles = _means(
            x, permutation, ends, centroids, None if last else scored, tile if fused and last else None
        )
    if tile is not None and not fused:
        tiles = _tile_means(cluster_means, x, permutation, tile)
    return Clustering(labels, centroids, sizes, permutation), tiles


def _tile_means(means, x: torch.Tensor, permutation: torch.Tensor, tile: int) -> torch.Tensor:
    left = x.shape[2] - torch.arange(0, x.shape[2], tile, device=x.device)
    sizes = left.clamp_max(tile).to(torch.int32).expand(*x.shape[:2], -1)
    return means(x, permutation, sizes, torch.zeros(*sizes.shape, x.shape[3], device=x.device))


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
    return _assign(x, _centred(x, centroids))


def kmeans_assign_reference(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Specification of `kmeans_assign` in plain torch; same arguments and result (fp64 x scores in fp64)."""
    return _nearest(x, centroids, centroids.mean(2, keepdim=True))


def _nearest(x: torch.Tensor, centroids: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    directions = (centroids - mean).to(x.dtype)
    exact = directions.to(centroids.dtype)
    offsets = (exact * (exact / 2 + mean)).sum(-1).unsqueeze(2)
    directions = directions.to(wide).transpose(2, 3)  # [B, H, D, C]
    chunk = max(1, SCORE_CHUNK // (x.shape[0] * x.shape[1] * centroids.shape[2]))
    # The scores of all tokens at once would be B * H * S * C numbers.
    parts = [torch.argmin(offsets - part.to(wide) @ directions, dim=-1) for part in x.split(chunk, dim=2)]
    return torch.cat(parts, dim=2).to(torch.int32)


class Scored(NamedTuple):
    """What tokens are scored with.

    Args:
        mean: fp32 [B, H, D], about which directions are.
        directions: [B, H, C, D] of the tokens' dtype, centroids minus mean.
        offsets: fp32 [B, H, C rounded up], |d|^2 / 2 + mu . d of the rounded directions; +inf beyond C.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    offsets: torch.Tensor


def _centred(x: torch.Tensor, centroids: torch.Tensor) -> Scored:
    B, H, C, D = centroids.shape
    padded = triton.cdiv(C, kmeans_hopper.PAD) * kmeans_hopper.PAD
    centroids = centroids.contiguous()
    mean, offsets = centroids.new_empty(B, H, D), centroids.new_empty(B, H, padded)
    scored = Scored(mean, torch.empty_like(centroids, dtype=x.dtype), offsets)
    parts, block_d = triton.cdiv(C, TOTALLED), max(16, triton.next_power_of_2(D))
    totals = centroids.new_empty(B * H, parts, D)
    with target.on_device(x):
        _total_kernel[(parts, B * H)](centroids, totals, C, D=D, BLOCK_D=block_d, CLUSTERS=TOTALLED)
        _centre_kernel[(triton.cdiv(padded, CENTRED), B * H)](
            centroids, totals, *scored, C, padded, parts,
            D=D, BLOCK_D=block_d, CLUSTERS=CENTRED, PARTS=triton.next_power_of_2(parts),
        )  # fmt: skip
    return scored


def _assign_and_sort(x: torch.Tensor, scored: Scored, counters: Counters | None) -> tuple[torch.Tensor, ...]:
    """Labels, the permutation that sorts them, cluster sizes and their running sum."""
    if counters is not None:
        labels = _assign(x, scored, counters.counts)
        return labels, *place_counted(labels, counters)
    labels = _assign(x, scored)
    permutation, sizes = sort_labels(labels, scored.directions.shape[2])
    return labels, permutation, sizes, sizes.cumsum(-1, dtype=torch.int32)


def _assign(x: torch.Tensor, scored: Scored, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Labels int32 [B, H, S]; how often each chunk has each is added to `counts`, int32 [B * H, chunks, C]."""
    B, H, S, D = x.shape
    C, padded = scored.directions.shape[2], scored.offsets.shape[2]
    labels = torch.empty(B, H, S, dtype=torch.int32, device=x.device)
    row = target.launch_row(LAUNCH, x.device)[x.element_size()]
    with target.on_device(x):
        if row.specialised and kmeans_hopper.takes(x):
            kmeans_hopper.launch(x, scored.directions, scored.offsets, labels, counts, CHUNK)
        else:
            _assign_kernel[(triton.cdiv(S, row.block_s), B * H)](
                x, scored.directions, scored.offsets, labels, counts, H, S, C, padded, triton.cdiv(S, CHUNK),
                *x.stride()[:3],
                D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_S=row.block_s, BLOCK_C=row.block_c, CHUNK=CHUNK,
                PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
                num_warps=row.num_warps, num_stages=row.num_stages,
            )  # fmt: skip
    return labels


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
    return _means(x, permutation.contiguous(), sizes.cumsum(-1, dtype=torch.int32), centroids)[0]


def _means(
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
    specialised: bool = False


# arch -> element bytes -> tile sizes. sm90's 16-bit row is measured (docs/kernels.md), the others are chosen by ahead-of-time
# compile (no spills, shared memory).
LAUNCH = {
    80: {2: Launch(128, 64, 8, 3), 4: Launch(64, 16, 8, 2)},
    89: {2: Launch(128, 64, 8, 2), 4: Launch(64, 16, 8, 2)},
    90: {2: Launch(128, 32, 8, 4, True), 4: Launch(64, 16, 8, 2)},
    100: {2: Launch(128, 64, 8, 3), 4: Launch(64, 16, 8, 2)},
    120: {2: Launch(128, 64, 8, 2), 4: Launch(64, 16, 8, 2)},
}


@triton.jit
def _direct(value, centre, directions, offsets, entry, place, mask, inside):
    """Writes what tokens are scored with."""
    direction = (value - centre).to(directions.dtype.element_ty)
    tl.store(directions + entry, direction, mask=mask)
    exact = tl.where(mask, direction.to(tl.float32), 0.0)
    tl.store(offsets + place, tl.where(inside, tl.sum(exact * (exact / 2 + centre), 1), float("inf")))


@triton.jit(do_not_specialize=["C"])
def _total_kernel(centroids, totals, C, D: tl.constexpr, BLOCK_D: tl.constexpr, CLUSTERS: tl.constexpr):
    part, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cluster = part * CLUSTERS + tl.arange(0, CLUSTERS)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (cluster < C)[:, None] & (offs_d < D)[None, :]  # [CLUSTERS, BD]
    value = tl.load(centroids + (bh * C + cluster)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    tl.store(totals + (bh * tl.num_programs(0) + part) * D + offs_d, tl.sum(value, 0), mask=offs_d < D)


@triton.jit(do_not_specialize=["C", "padded", "parts"])
def _centre_kernel(
    centroids, totals, mean, directions, offsets, C, padded, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CLUSTERS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    cluster = tl.program_id(0) * CLUSTERS + tl.arange(0, CLUSTERS)
    offs_d = tl.arange(0, BLOCK_D)
    inside = cluster < C
    part = tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & (offs_d < D)[None, :]  # [PARTS, BD]
    total = tl.load(totals + (bh * parts + part)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    centre = tl.sum(total, 0) / C
    if tl.program_id(0) == 0:
        tl.store(mean + bh * D + offs_d, centre, mask=offs_d < D)
    mask = inside[:, None] & (offs_d < D)[None, :]  # [CLUSTERS, BD]
    entry = (bh * C + cluster)[:, None] * D + offs_d[None, :]
    value = tl.load(centroids + entry, mask=mask, other=0.0)
    _direct(value, centre[None, :], directions, offsets, entry, bh * padded + cluster, mask, inside)


@triton.jit(do_not_specialize=["S", "C", "padded", "chunks"])
def _assign_kernel(
    x, directions, offsets, labels, counts, H, S, C, padded, chunks, stride_xb, stride_xh, stride_xs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BS]
    offs_c = tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, BLOCK_D)
    x_ptr = x + b * stride_xb + h * stride_xh + offs_s[:, None] * stride_xs + offs_d[None, :]
    x_tile = tl.load(x_ptr, mask=(offs_s < S)[:, None] & (offs_d < D)[None, :], other=0.0)  # [BS, BD]
    directions += bh * C * D
    offsets += bh * padded
    # Each column keeps its own best until the end: one reduction instead of one a tile.
    best = tl.full([BLOCK_S, BLOCK_C], float("inf"), dtype=tl.float32)
    best_first = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.int32)
    for first in range(0, C, BLOCK_C):
        inside = first + offs_c < C
        d_ptr = directions + (first + offs_c)[:, None] * D + offs_d[None, :]
        d_tile = tl.load(d_ptr, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0)  # [BC, BD]
        offset = tl.load(offsets + first + offs_c, mask=inside, other=float("inf"))
        score = offset[None, :] - tl.dot(x_tile, tl.trans(d_tile), input_precision=PRECISION)  # [BS, BC]
        closer = score < best
        best = tl.where(closer, score, best)
        best_first = tl.where(closer, first, best_first)
    index = best_first + offs_c[None, :]
    index = tl.where(best == tl.min(best, 1)[:, None], index, C - 1)
    # NaN scores match nothing: the label stays in range, and the caller's finite check reports the input.
    label = tl.minimum(tl.min(index, 1), C - 1)
    tl.store(labels + bh * S + offs_s, label, mask=offs_s < S)
    if counts is not None:
        entry = (bh * chunks + offs_s // CHUNK) * C + label
        tl.atomic_add(counts + entry, 1, mask=offs_s < S, sem="relaxed")  # whole numbers: any order


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
        _direct(value, centre, directions, offsets, entry, bh * padded + cluster, mask, inside)
