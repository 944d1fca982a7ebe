"""An order of clusters in which neighbours are alike: a greedy chain through their centroids.

    order[0]     = the centroid farthest from their mean
    order[i + 1] = the centroid nearest to order[i] that is not yet in the order   (ties: lowest index)

With clusters sorted so, a query's key clusters lie in fewer and longer runs, and a tile that spans a border between
clusters still holds tokens that are alike. fp32, sm80 and newer, up to 8192 clusters; nothing waits for the device.
"""

import torch

from ..common import target
from ..common.target import tl, triton

MAX_CLUSTERS = 8192


def neighbour_order(centroids: torch.Tensor) -> torch.Tensor:
    """Order of clusters in which each is followed by the most similar one left.

    Args:
        centroids: fp32 [B, H, C, D].

    Returns:
        int32 [B, H, C], place in the order -> cluster.

    Raises:
        ValueError: centroids are not [B, H, C, D].
        NotImplementedError: more than 8192 clusters on the Triton path.
    """
    if centroids.dim() != 4:
        raise ValueError(f"centroids must be [B, H, C, D], got {tuple(centroids.shape)}: make one set for each head")
    if not target.use_triton(centroids):
        return neighbour_order_reference(centroids)
    B, H, C, _ = centroids.shape
    if C > MAX_CLUSTERS:
        raise NotImplementedError(f"neighbour_order needs at most {MAX_CLUSTERS} clusters, got {C}: use fewer")
    distances, start = _distances(centroids)
    order = torch.empty(B, H, C, dtype=torch.int32, device=centroids.device)
    with target.on_device(centroids):
        _chain_kernel[(B * H,)](
            distances, start, order, C, BLOCK_C=max(16, triton.next_power_of_2(C)), num_warps=4 if C <= 2048 else 8
        )
    return order


def neighbour_order_reference(centroids: torch.Tensor) -> torch.Tensor:
    """Specification of `neighbour_order` in plain torch; same arguments and result."""
    distances, current = _distances(centroids)
    taken = torch.zeros(centroids.shape[:3], dtype=torch.bool, device=centroids.device)
    order = []
    for _ in range(centroids.shape[2]):
        order.append(current)
        taken.scatter_(2, current[..., None].long(), True)
        row = distances.gather(2, current[..., None, None].long().expand(-1, -1, 1, taken.shape[2])).squeeze(2)
        current = row.masked_fill(taken, torch.inf).argmin(-1).to(torch.int32)
    return torch.stack(order, -1)


def _distances(centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances up to each row's own norm, fp32 [B, H, C, C], and where the chain starts, int32 [B, H]."""
    centred = centroids - centroids.mean(2, keepdim=True)
    norms = centred.square().sum(-1)  # [B, H, C]
    return norms.unsqueeze(2) - 2 * centred @ centred.transpose(2, 3), norms.argmax(-1).to(torch.int32)


@triton.jit(do_not_specialize=["C"])
def _chain_kernel(distances, start, order, C, BLOCK_C: tl.constexpr):
    bh = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_C)  # [BC]
    left = offs < C
    current = tl.load(start + bh)
    for i in range(C):
        tl.store(order + bh * C + i, current)
        left = left & (offs != current)
        row = tl.load(distances + (bh * C + current) * C + offs, mask=left, other=float("inf"))
        # NaN distances must not lead out of range: the caller's finite check reports them.
        current = tl.minimum(tl.argmin(row, 0), C - 1)
