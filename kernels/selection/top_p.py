"""Which key clusters a query cluster attends to: the heaviest ones, until their attention mass exceeds top_p.

    logit_j = sm_scale * q . k_j + log n_j,   mass_j = softmax(logit)_j,   empty key clusters left out

Clusters are ranked by logit, heaviest first (ties: lowest index), and a prefix of that order is kept:
while the mass *before* a cluster is <= top_p, and at least ceil(min_k_ratio * Ck) of them;
then cut where the kept tokens would exceed budget; at least one cluster always stays. fp32 throughout.

The kernel needs no sort: "kept" is monotone in the order, so a bisection over logits finds the last kept one. It stops when
one cluster is left in doubt; clusters of equal logits are told apart by a bisection over their indices.
Up to 8192 key clusters, sm80 and newer.
"""

import math

import torch

from ..common import target
from ..common.launch import LaunchTable
from ..common.target import tl, triton

MAX_CLUSTERS = 8192
SCORES = 1 << 24  # of as many heads at a time as have no more: all heads' would grow with the square of the tiles


def top_p_block_map(
    q_centroids: torch.Tensor,
    k_centroids: torch.Tensor,
    k_sizes: torch.Tensor,
    top_p: float | torch.Tensor,
    min_k_ratio: float,
    sm_scale: float,
    budget: float | None = None,
) -> torch.Tensor:
    """Key clusters that hold top_p of each query cluster's attention, estimated from centroids.

    Args:
        q_centroids: fp32 [B, H, Cq, D].
        k_centroids: fp32 [B, H, Ck, D].
        k_sizes: int32 [B, H, Ck], tokens in each key cluster.
        top_p: attention mass to reach, in (0, 1]; 1 keeps every non-empty cluster. A head's own: fp32 [H] on the device
            of the centroids, whose values are not checked, because that would wait for the device.
        min_k_ratio: least share of key clusters kept, in [0, 1].
        sm_scale: softmax scale.
        budget: upper bound on the kept key tokens' share of a row, in (0, 1]; it wins over top_p and min_k_ratio.

    Returns:
        block_map bool [B, H, Cq, Ck]; empty key clusters are False.

    Raises:
        ValueError: shapes disagree, or a number lies outside its range.
        NotImplementedError: more than 8192 key clusters on the Triton path.

    Source: arXiv 2505.18875, section 4.3 (centroid-based top-p selection).
    """
    _check(q_centroids, k_centroids, k_sizes, top_p, min_k_ratio, budget)
    if not target.use_triton(q_centroids):
        return top_p_block_map_reference(q_centroids, k_centroids, k_sizes, top_p, min_k_ratio, sm_scale, budget)
    return _select(q_centroids * sm_scale, k_centroids, k_sizes, top_p, *_limits(k_sizes, min_k_ratio, budget))


def top_p_block_map_reference(
    q_centroids: torch.Tensor,
    k_centroids: torch.Tensor,
    k_sizes: torch.Tensor,
    top_p: float | torch.Tensor,
    min_k_ratio: float,
    sm_scale: float,
    budget: float | None = None,
) -> torch.Tensor:
    """Specification of `top_p_block_map` in plain torch; same arguments and result."""
    scores = torch.matmul(q_centroids * sm_scale, k_centroids.transpose(2, 3))
    return _select_reference(scores, k_sizes, top_p, *_limits(k_sizes, min_k_ratio, budget))


def _limits(k_sizes, min_k_ratio, budget):
    """The least number of clusters, and the most tokens int32 [B, H] (None: no budget)."""
    at_least = max(1, math.ceil(min_k_ratio * k_sizes.shape[2] - 1e-9))
    at_most = None
    if budget is not None:
        at_most = (k_sizes.sum(-1, dtype=torch.float64) * budget + 1e-9).to(torch.int32)  # towards zero: down
    return at_least, at_most


def _select_reference(scores, k_sizes, top_p, at_least, at_most):
    sizes = k_sizes.unsqueeze(2).expand_as(scores)
    logits = scores + sizes.to(scores.dtype).log()  # an empty cluster becomes -inf
    ordered, index = torch.sort(logits, dim=-1, descending=True, stable=True)
    mass = torch.softmax(ordered, dim=-1)
    mass_before = torch.cumsum(mass, dim=-1).roll(1, dims=-1)
    mass_before[..., 0] = 0
    if isinstance(top_p, torch.Tensor):
        top_p = top_p[:, None, None]
    rank = torch.arange(scores.shape[-1], device=scores.device)
    keep = (mass_before <= top_p) | (rank < at_least) | (top_p >= 1)
    if at_most is not None:
        keep &= torch.cumsum(sizes.gather(-1, index), dim=-1) <= at_most[..., None, None]
    keep[..., 0] = True
    keep &= ordered > -torch.inf
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def _check(q_centroids, k_centroids, k_sizes, top_p, min_k_ratio, budget):
    if (
        q_centroids.dim() != 4
        or k_centroids.shape[:2] != q_centroids.shape[:2]
        or k_sizes.shape != k_centroids.shape[:3]
    ):
        raise ValueError(
            "q_centroids must be [B, H, Cq, D], k_centroids [B, H, Ck, D] and k_sizes [B, H, Ck], got "
            f"{tuple(q_centroids.shape)}, {tuple(k_centroids.shape)}, {tuple(k_sizes.shape)}: cluster every head"
        )
    if isinstance(top_p, torch.Tensor):
        heads = q_centroids.shape[1]
        if top_p.shape != (heads,) or top_p.dtype != torch.float32:
            raise ValueError(f"top_p must be fp32 [H] = [{heads}], got {top_p.dtype} {tuple(top_p.shape)}: one a head")
    elif not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}: 0.9 is the usual choice")
    if not 0 <= min_k_ratio <= 1:
        raise ValueError(f"min_k_ratio must be in [0, 1], got {min_k_ratio}: 0.1 is the usual choice")
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget}: leave it None for no bound")


# arch -> warps for up to 2048 key clusters (four times as many above); on sm90 1, 2 and 8 are slower
LAUNCH = LaunchTable({80: 4, 89: 4, 90: 4, 100: 4, 120: 4}, measured=[90])


def _select(queries, k_centroids, k_sizes, top_p, at_least, at_most):
    B, H, Cq, _ = queries.shape
    Ck = k_centroids.shape[2]
    if Ck > MAX_CLUSTERS:
        raise NotImplementedError(
            f"top_p needs at most {MAX_CLUSTERS} key clusters, got {Ck}: use fewer num_k_clusters"
        )
    block_map = torch.empty(B, H, Cq, Ck, dtype=torch.bool, device=queries.device)
    num_warps = LAUNCH.row(queries.device) * (1 if Ck <= 2048 else 4)
    head_top_p = top_p.contiguous() if isinstance(top_p, torch.Tensor) else None
    queries, keys, k_sizes = queries.flatten(0, 1), k_centroids.flatten(0, 1).mT, k_sizes.contiguous()
    heads = max(1, SCORES // (Cq * Ck))
    with target.on_device(queries):
        for first in range(0, B * H, heads):
            scores = queries[first : first + heads] @ keys[first : first + heads]
            _select_kernel[(Cq, scores.shape[0])](
                scores, k_sizes, at_most, block_map.view(torch.uint8), first, Cq, Ck,
                1.0 if head_top_p is not None else float(top_p), head_top_p, H, at_least,
                BLOCK_C=max(16, triton.next_power_of_2(Ck)), num_warps=num_warps,
            )  # fmt: skip
    return block_map


@triton.jit
def _sums(count, tokens, mass, more_count, more_tokens, more_mass):
    return count + more_count, tokens + more_tokens, mass + more_mass


@triton.jit
def _above(above, p, n, top_p, at_least):
    """Number and tokens of a set of clusters, and whether one that is behind them all is wanted."""
    shares = above.to(tl.int32), tl.where(above, n, 0), tl.where(above, p, 0.0)
    count, tokens, mass = tl.reduce(shares, 0, _sums)  # together: threads meet once
    return count, tokens, (mass <= top_p) | (count < at_least) | (top_p >= 1)


@triton.jit
def _ordered(bits):
    """Integers in the order of the floats that have these bits, or back: negative ones' magnitude is flipped."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _between(low, high):
    """Of low <= middle < high, the ordered integer of the float in the middle."""
    low_half = _ordered(low).to(tl.float32, bitcast=True) * 0.5
    middle = _ordered((low_half + _ordered(high).to(tl.float32, bitcast=True) * 0.5).to(tl.int32, bitcast=True))
    return tl.maximum(tl.minimum(middle, high - 1), low)


@triton.jit(do_not_specialize=["first_head", "Cq", "Ck", "top_p", "H", "at_least"])
def _select_kernel(
    scores, sizes, at_most, block_map, first_head, Cq, Ck, top_p, head_top_p, H, at_least, BLOCK_C: tl.constexpr
):
    bh = first_head + tl.program_id(1).to(tl.int64)
    if head_top_p is not None:
        top_p = tl.load(head_top_p + bh % H)
    row = bh * Cq + tl.program_id(0)
    offs = tl.arange(0, BLOCK_C)  # [BC]
    n = tl.load(sizes + bh * Ck + offs, mask=offs < Ck, other=0)
    real = n > 0
    score = tl.load(scores + (row - first_head * Cq) * Ck + offs, mask=offs < Ck, other=0.0)
    logit = tl.where(real, score + tl.log(tl.maximum(n, 1).to(tl.float32)), float("-inf"))
    p = tl.exp(logit - tl.max(logit, 0))
    p = p / tl.sum(p, 0)
    bits = tl.where(real, _ordered((logit + 0.0).to(tl.int32, bitcast=True)), -2147483648)
    most = tl.max(n, 0) * 0 + 2147483647
    if at_most is not None:
        most = tl.load(at_most + bh)
    # Above `high` all are kept, below `low` none.
    top = tl.max(bits, 0)
    high = top
    low = tl.min(tl.where(real, bits, 2147483647), 0)
    above_high, above_low = 0, tl.sum(real.to(tl.int32), 0)
    while (low < high) & (above_low - above_high > 1):
        middle = _between(low, high)
        count, tokens, wanted = _above(bits > middle, p, n, top_p, at_least)
        if wanted & (tokens <= most):
            high, above_high = middle, count
        else:
            low, above_low = middle + 1, count
    sure = bits > high
    open = real & (bits >= low) & (bits <= high)
    first = tl.min(tl.where(open, offs, BLOCK_C), 0)
    cut = tl.max(tl.where(open, offs + 1, 0), 0)
    while first < cut:
        middle = (first + cut) // 2
        _, _, wanted = _above(sure | (open & (offs < middle)), p, n, top_p, at_least)
        tokens = tl.sum(tl.where(sure | (open & (offs <= middle)), n, 0), 0)
        if wanted & (tokens <= most):
            first = middle + 1
        else:
            cut = middle
    heaviest = tl.min(tl.where(bits == top, offs, BLOCK_C), 0)  # is always kept
    kept = real & (sure | (open & (offs < cut)) | (offs == heaviest))
    tl.store(block_map + row * Ck + offs, kept.to(tl.uint8), mask=offs < Ck)
