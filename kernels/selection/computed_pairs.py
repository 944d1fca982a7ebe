"""How many (query, key) pairs block maps compute: the numerator of a density, without a number for every block."""

import torch

from ..common import target
from ..common.target import tl, triton

ROWS, COLUMNS = 16, 256  # query and key clusters of a program's step


def computed_pairs(
    block_map: torch.Tensor, q_sizes: torch.Tensor, k_sizes: torch.Tensor, tail_clusters: int = 0
) -> torch.Tensor:
    """Pairs of a query and a key whose block is computed.

    Args:
        block_map: bool [M, Cq, Ck].
        q_sizes: int32 [M, Cq], tokens in each query cluster.
        k_sizes: int32 [M, Ck], tokens in each key cluster.
        tail_clusters: so many first key clusters count as one key where they are not computed and not empty.

    Returns:
        int64 [M], exact.
    """
    if not target.use_triton(block_map):
        return computed_pairs_reference(block_map, q_sizes, k_sizes, tail_clusters)
    M, Cq, Ck = block_map.shape
    parts = torch.empty(M, triton.cdiv(Cq, ROWS), dtype=torch.int64, device=block_map.device)
    with target.on_device(block_map):
        _pairs_kernel[(parts.shape[1], M)](
            block_map.contiguous().view(torch.uint8), q_sizes.contiguous(), k_sizes.contiguous(), parts,
            Cq, Ck, tail_clusters, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return parts.sum(1)


def computed_pairs_reference(
    block_map: torch.Tensor, q_sizes: torch.Tensor, k_sizes: torch.Tensor, tail_clusters: int = 0
) -> torch.Tensor:
    """Specification of `computed_pairs` in plain torch; same arguments and result."""
    seen = torch.where(block_map, k_sizes[:, None, :], 0).sum(-1)  # [M, Cq]
    left_out = ~block_map[..., :tail_clusters] & (k_sizes[:, None, :tail_clusters] > 0)
    return ((seen + left_out.sum(-1)) * q_sizes).sum(-1)


@triton.jit(do_not_specialize=["Cq", "Ck", "tail_clusters"])
def _pairs_kernel(block_map, q_sizes, k_sizes, parts, Cq, Ck, tail_clusters, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = tl.zeros([ROWS], dtype=tl.int32)
    for first in range(0, Ck, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        size = tl.load(k_sizes + m * Ck + column, mask=column < Ck, other=0)[None, :]
        inside = (row < Cq)[:, None] & (column < Ck)[None, :]
        picked = tl.load(block_map + (m * Cq + row)[:, None] * Ck + column[None, :], mask=inside, other=0) != 0
        left_out = ((column < tail_clusters)[None, :] & (size > 0)).to(tl.int32)
        seen += tl.sum(tl.where(picked, size, left_out), 1)
    queries = tl.load(q_sizes + m * Cq + row, mask=row < Cq, other=0)
    tl.store(parts + m * tl.num_programs(0) + tl.program_id(0), tl.sum(seen.to(tl.int64) * queries, 0))
