"""SpargeAttn's prediction: which key blocks a block of queries attends to, from block means alone.

    mean_i = average row of block i        similarity_i = mean of the Gram matrix of its rows, each of length 1
                                                        = |average row of length 1|^2, so no Gram matrix is made
    mass_ij = softmax_j(sm_scale * mean_i . mean_j) over the key blocks that are similar in themselves

A query block keeps its heaviest key blocks (ties: lowest index) while their mass together is <= cdf and while they are at
most topk * Nk; one at least. A block whose similarity is not above simthresh is not described by its mean: such a row, or
column, is computed whole. fp32 throughout; zero rows count as similar to nothing; a short last block counts its own rows.

Two kernels and one product of means: nothing of size S x S, no wait for the device, so a CUDA graph can hold it. The
selection needs no sort: how much is kept is monotone in the smallest score kept, so a bisection over the scores' 32 bits
finds it, and equal scores are counted out by index. Up to 8192 key blocks, head dims up to 128, sm80 and newer.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..common import target
from ..common.launch import LaunchTable
from ..common.target import tl, triton

MAX_HEAD_DIM = 128
MAX_BLOCKS = 8192
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class BlockStatistics(NamedTuple):
    """What the prediction knows of the blocks of one side.

    Args:
        means: fp32 [B, H, N, D].
        similarity: fp32 [B, H, N], in [0, 1].
    """

    means: torch.Tensor
    similarity: torch.Tensor


def block_statistics(x: torch.Tensor, block_size: int, order: torch.Tensor | None = None) -> BlockStatistics:
    """Mean and self-similarity of every block of consecutive tokens, in one read.

    Args:
        x: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous, other strides arbitrary.
        block_size: tokens in a block; the last one may be shorter.
        order: int32 [S], sorted -> original index, the same for all heads; None: identity.

    Returns:
        The statistics of ceil(S / block_size) blocks.

    Raises:
        ValueError: shapes disagree, block_size below 1, or x's last dim is strided.
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.

    Source: arXiv 2502.18137, section 3.2 (block compression and self-similarity).
    """
    _check_tokens(x, block_size, order)
    op = _statistics if target.use_triton(x) else block_statistics_reference
    return op(x, block_size, order)


def block_statistics_reference(x: torch.Tensor, block_size: int, order: torch.Tensor | None = None) -> BlockStatistics:
    """Specification of `block_statistics` in plain torch; same arguments and result (fp64 stays fp64)."""
    S = x.shape[2]
    rows = (x if order is None else x[:, :, order.long()]).to(torch.promote_types(x.dtype, torch.float32))
    length = rows.square().sum(-1, keepdim=True).sqrt()
    units = rows / torch.where(length > 0, length, 1.0)
    blocks = -(-S // block_size)
    counts = (S - torch.arange(blocks, device=x.device) * block_size).clamp_max(block_size)

    def means(y):
        padded = F.pad(y, (0, 0, 0, blocks * block_size - S)).unflatten(2, (blocks, block_size))
        return padded.sum(3) / counts[:, None]

    return BlockStatistics(means(rows), means(units).square().sum(-1))


def sparge_block_map(
    q_blocks: BlockStatistics,
    k_blocks: BlockStatistics,
    *,
    simthresh: torch.Tensor,
    cdf: torch.Tensor | None = None,
    topk: float = 1.0,
    attention_sink: bool = False,
    sm_scale: float,
) -> torch.Tensor:
    """The key blocks that each query block attends to.

    Args:
        q_blocks, k_blocks: statistics of Nq and Nk blocks of the same heads.
        simthresh: fp32 [H]; blocks whose similarity is not above it are computed whole; below 0: all are described.
        cdf: fp32 [H], the most mass that a query block's selected blocks hold together, in (0, 1]; 1, or None: no bound.
        topk: the most key blocks selected, as a share of Nk, rounded down, in (0, 1]; 1: no bound.
        attention_sink: always keep key block 0.
        sm_scale: softmax scale.

    Returns:
        block_map bool [B, H, Nq, Nk].

    Raises:
        ValueError: shapes disagree, or topk lies outside its range.
        NotImplementedError: more than 8192 key blocks on the Triton path.

    Source: arXiv 2502.18137, section 3.2 (selective token compression and prediction).
    """
    _check_blocks(q_blocks, k_blocks, simthresh, cdf, topk)
    op = _select if target.use_triton(simthresh) else _select_reference
    return op(_scores(q_blocks, k_blocks, sm_scale), q_blocks, k_blocks, simthresh, cdf, topk, attention_sink)


def sparge_block_map_reference(
    q_blocks: BlockStatistics,
    k_blocks: BlockStatistics,
    *,
    simthresh: torch.Tensor,
    cdf: torch.Tensor | None = None,
    topk: float = 1.0,
    attention_sink: bool = False,
    sm_scale: float,
) -> torch.Tensor:
    """Specification of `sparge_block_map` in plain torch; same arguments and result."""
    scores = _scores(q_blocks, k_blocks, sm_scale)
    return _select_reference(scores, q_blocks, k_blocks, simthresh, cdf, topk, attention_sink)


def block_masses(scores: torch.Tensor, similar: torch.Tensor) -> torch.Tensor:
    """Softmax over the key blocks that are similar in themselves; all zeros where none is.

    Args:
        scores: fp32 [..., Nk].
        similar: bool, broadcastable to scores.

    Returns:
        fp32, scores' shape.
    """
    return scores.masked_fill(~similar, -torch.inf).softmax(-1).masked_fill(~similar, 0.0)


def _scores(q_blocks, k_blocks, sm_scale):
    return torch.matmul(q_blocks.means, k_blocks.means.transpose(2, 3)) * sm_scale  # [B, H, Nq, Nk]


def _at_most(topk, blocks):
    return max(1, math.floor(topk * blocks + 1e-9))


def _select_reference(scores, q_blocks, k_blocks, simthresh, cdf, topk, attention_sink):
    similar = (k_blocks.similarity > simthresh[:, None])[:, :, None].expand_as(scores)
    index = scores.masked_fill(~similar, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    keep = (rank < _at_most(topk, scores.shape[-1])).expand(scores.shape).clone()
    if cdf is not None:
        mass, limit = block_masses(scores, similar).gather(-1, index).cumsum(-1), cdf[:, None, None]
        keep &= (mass <= limit) | (limit >= 1)
    keep[..., 0] = True
    keep = torch.zeros_like(keep).scatter_(-1, index, keep) & similar
    keep |= ~similar | ~(q_blocks.similarity > simthresh[:, None])[..., None]
    keep[..., 0] |= attention_sink
    return keep


def _check_tokens(x, block_size, order):
    if x.dim() != 4:
        raise ValueError(f"x must be [B, H, S, D], got {tuple(x.shape)}: reshape it")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}: convert it")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if order is not None and order.shape != x.shape[2:3]:
        raise ValueError(f"order must be [S] = [{x.shape[2]}], got {tuple(order.shape)}: one order serves all heads")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"x must be contiguous in its last dim, got strides {x.stride()}: call .contiguous() first")


def _check_blocks(q_blocks, k_blocks, simthresh, cdf, topk):
    q, k = q_blocks.means, k_blocks.means
    if q.dim() != 4 or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            f"q_blocks and k_blocks must be of the same heads, got means {tuple(q.shape)} and {tuple(k.shape)}"
        )
    for name, limit in (("simthresh", simthresh), ("cdf", cdf)):
        if limit is None:
            continue
        if limit.shape != q.shape[1:2] or limit.dtype != torch.float32:
            raise ValueError(
                f"{name} must be fp32 [H] = [{q.shape[1]}], got {limit.dtype} {tuple(limit.shape)}: one number a head"
            )
    if not 0 < topk <= 1:
        raise ValueError(f"topk must be in (0, 1], got {topk}: 1 is no bound")


# arch -> (tokens read together, warps of the statistics, warps of the selection for up to 2048 key blocks; twice as many
# above)
LAUNCH = LaunchTable({80: (32, 4, 4), 89: (32, 4, 4), 90: (32, 4, 4), 100: (32, 4, 4), 120: (32, 4, 4)})


def _statistics(x, block_size, order):
    B, H, S, D = x.shape
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}: convert it")
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dim must be at most {MAX_HEAD_DIM}, got {D}: use dense attention")
    target.refuse_gradients("block_statistics", x)
    blocks = triton.cdiv(S, block_size)
    means = torch.empty(B, H, blocks, D, dtype=torch.float32, device=x.device)
    similarity = torch.empty(B, H, blocks, dtype=torch.float32, device=x.device)
    rows, num_warps, _ = LAUNCH.row(x.device)
    with target.on_device(x):
        _block_statistics_kernel[(blocks, B * H)](
            x, None if order is None else order.contiguous(), means, similarity, H, S, block_size, *x.stride()[:3],
            D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_S=rows, num_warps=num_warps,
        )  # fmt: skip
    return BlockStatistics(means, similarity)


def _select(scores, q_blocks, k_blocks, simthresh, cdf, topk, attention_sink):
    B, H, Nq, Nk = scores.shape
    if Nk > MAX_BLOCKS:
        raise NotImplementedError(f"there must be at most {MAX_BLOCKS} key blocks, got {Nk}: use larger blocks")
    block_map = torch.empty(B, H, Nq, Nk, dtype=torch.bool, device=scores.device)
    num_warps = LAUNCH.row(scores.device)[2] * (1 if Nk <= 2048 else 2)
    with target.on_device(scores):
        _select_blocks_kernel[(Nq, B * H)](
            scores.contiguous(), q_blocks.similarity.contiguous(), k_blocks.similarity.contiguous(),
            None if cdf is None else cdf.contiguous(), simthresh.contiguous(), block_map.view(torch.uint8),
            H, Nq, Nk, _at_most(topk, Nk), BOUNDED=topk < 1, SINK=attention_sink,
            BLOCK_N=max(16, triton.next_power_of_2(Nk)), num_warps=num_warps,
        )  # fmt: skip
    return block_map


@triton.jit(do_not_specialize=["S"])
def _block_statistics_kernel(
    x, order, means, similarity, H, S, block_size, stride_xb, stride_xh, stride_xs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    x += (bh // H) * stride_xb + (bh % H) * stride_xh
    start = tl.program_id(0) * block_size
    size = tl.minimum(S - start, block_size)
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    units = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for first in range(0, size, BLOCK_S):
        inside = first + offs_s < size
        token = start + first + offs_s
        if order is not None:
            token = tl.load(order + token, mask=inside, other=0)
        pointer = x + token.to(tl.int64)[:, None] * stride_xs + offs_d[None, :]
        tile = tl.load(pointer, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)  # [BS, BD]
        length = tl.sqrt(tl.sum(tile * tile, 1))
        total += tile
        units += tile / tl.where(length > 0, length, 1.0)[:, None]
    count = size.to(tl.float32)
    unit = tl.sum(units, 0) / count
    block = bh * tl.num_programs(0) + tl.program_id(0)
    tl.store(means + block * D + offs_d, tl.sum(total, 0) / count, mask=offs_d < D)
    tl.store(similarity + block, tl.sum(unit * unit, 0))


@triton.jit(do_not_specialize=["Nq", "Nk", "at_most"])
def _select_blocks_kernel(
    scores, q_similarity, k_similarity, cdf, simthresh, block_map, H, Nq, Nk, at_most,
    BOUNDED: tl.constexpr, SINK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    row = bh * Nq + tl.program_id(0)
    offs = tl.arange(0, BLOCK_N)  # [BN]
    real = offs < Nk
    theta = tl.load(simthresh + bh % H)
    similar = tl.load(k_similarity + bh * Nk + offs, mask=real, other=0.0) > theta
    open = real & similar  # to be chosen from
    score = tl.where(open, tl.load(scores + row * Nk + offs, mask=real, other=0.0), float("-inf"))
    if cdf is not None:
        limit = tl.load(cdf + bh % H)
        limit = tl.where(limit >= 1, float("inf"), limit)
        top = tl.max(score, 0)
        p = tl.where(open, tl.exp(score - tl.where(top == float("-inf"), 0.0, top)), 0.0)
        total = tl.sum(p, 0)
        p = p / tl.where(total == 0, 1.0, total)
    # Integers in the scores' order: flip the magnitude bits of negative floats. Adding 0 makes -0 equal to 0.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    low = tl.min(tl.where(open, bits, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(tl.where(open, bits, -0x7FFFFFFF), 0).to(tl.int64) + 1  # nothing is above all
    while low < high:
        middle = low + (high - low) // 2
        above = open & (bits >= middle.to(tl.int32))
        fits = True
        exact = False
        if BOUNDED:
            count = tl.sum(above.to(tl.int32), 0)
            fits = count <= at_most
            exact = count == at_most
        if cdf is not None:
            exact = False
            fits = fits & (tl.sum(tl.where(above, p, 0.0), 0) <= limit)
        high = tl.where(fits, middle, high)
        low = tl.where(fits, tl.where(exact, middle, low), middle + 1)
    above = open & (bits >= high.to(tl.int32))
    # Of the equal scores that follow, as many as still fit, lowest index first.
    tied = open & (bits == tl.max(tl.where(open & ~above, bits, -0x7FFFFFFF), 0))
    rank = tl.cumsum(tied.to(tl.int32), 0)  # from 1
    count = tl.sum(above.to(tl.int32), 0) + rank
    more = tied & (count <= at_most)
    if cdf is not None:
        more = more & (tl.sum(tl.where(above, p, 0.0), 0) + rank.to(tl.float32) * p <= limit)
    keep = above | more | (tied & (count == 1))
    keep = keep | ~similar
    if SINK:
        keep = keep | (offs == 0)
    keep = tl.where(tl.load(q_similarity + row) > theta, keep.to(tl.uint8), 1)
    tl.store(block_map + row * Nk + offs, keep, mask=real)
