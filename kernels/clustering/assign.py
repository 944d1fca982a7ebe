"""The nearest centroid of every token: scores, labels, and what they are computed from."""

from typing import NamedTuple

import torch

from ..common import target
from ..common.launch import Launch, LaunchTable
from ..common.target import tl, triton
from . import kmeans_hopper
from .permute import CHUNK, Counters, place_counted, sort_labels

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCORE_CHUNK = 1 << 24
SUMMED, CENTRED = 16, 8  # clusters of a product with ones, and those whose means one program takes
TOTALLED = 64  # first centroids that one program adds up


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
    check(x, centroids)
    if not target.use_triton(x):
        return kmeans_assign_reference(x, centroids)
    check_triton("kmeans_assign", x)
    return _assign(x, centered(x, centroids))


def kmeans_assign_reference(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Specification of `kmeans_assign` in plain torch; same arguments and result (fp64 x scores in fp64)."""
    return nearest(x, centroids, centroids.mean(2, keepdim=True))


def nearest(x: torch.Tensor, centroids: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
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


def centered(x: torch.Tensor, centroids: torch.Tensor) -> Scored:
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


def assign_and_sort(x: torch.Tensor, scored: Scored, counters: Counters | None) -> tuple[torch.Tensor, ...]:
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
    row = LAUNCH.row(x.device, x.element_size())
    with target.on_device(x):
        if row.specialised and kmeans_hopper.supports(x):
            kmeans_hopper.launch(x, scored.directions, scored.offsets, labels, counts, CHUNK)
        else:
            _assign_kernel[(triton.cdiv(S, row.block_m), B * H)](
                x, scored.directions, scored.offsets, labels, counts, H, S, C, padded, triton.cdiv(S, CHUNK),
                *x.stride()[:3],
                D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_S=row.block_m, BLOCK_C=row.block_n, CHUNK=CHUNK,
                PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
                num_warps=row.num_warps, num_stages=row.num_stages,
            )  # fmt: skip
    return labels


def check(x: torch.Tensor, centroids: torch.Tensor) -> None:
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


def check_triton(op: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}: convert it")
    if x.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dim must be at most {MAX_HEAD_DIM}, got {x.shape[-1]}: use dense attention")
    target.refuse_gradients(op, x)


# arch -> element bytes -> tokens and centroids of a tile
LAUNCH = LaunchTable(
    {
        80: {2: Launch(128, 64, 8, 3), 4: Launch(64, 16, 8, 2)},
        89: {2: Launch(128, 64, 8, 2), 4: Launch(64, 16, 8, 2)},
        90: {2: Launch(128, 32, 8, 4, specialised=True), 4: Launch(64, 16, 8, 2)},
        100: {2: Launch(128, 64, 8, 3), 4: Launch(64, 16, 8, 2)},
        120: {2: Launch(128, 64, 8, 2), 4: Launch(64, 16, 8, 2)},
    },
    measured=[(90, 2)],
)


@triton.jit
def direct(value, centre, directions, offsets, entry, place, mask, inside):
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
    direct(value, centre[None, :], directions, offsets, entry, bh * padded + cluster, mask, inside)


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
