"""Block-sparse attention with INT8 Q K^T, and P V in FP8 or 16 bits: `block_sparse_attention`'s tiles, quantised.

Keys and values are quantised while they are gathered into sorted order, one pass each after one read for statistics; a
tile of queries is quantised by the program that attends with it. Every query and every 16 keys have a scale of their own,
because runs of keys may start anywhere. V is stored transposed, and its tiles begin at multiples of 16 tokens: the tensor
memory accelerator takes no others, and wide loads through pointers want the same.

SpargeAttn's second stage (`pv_threshold`): a tile of keys whose scores are all far below the running maximum of all
rows of the query tile still counts in the row sums and maxima, but its P V is skipped. Which tiles those are depends on
the order of the keys and on the tile sizes of the launch.

A `Tail` is quantised too where Hopper's kernel takes it. Elsewhere it is an attention of its own, in the inputs' precision,
and the two are put together by their log-sum-exps.

Precisions, dtypes, head dims and archs as in `quantised_attention`, but no INT4: its smoothing of Q needs fixed blocks.
"""

import dataclasses
from typing import Any

import torch

from ..block_sparse.blocks import BlockMap, as_block_map, check
from ..common import target
from ..common.numbers import softmax_scale
from ..quantize.precision import SPARSE_PRECISIONS, Quantisation, as_quantisation, find_precision
from .reference import block_sparse_attention_quantised_reference
from .triton import launch


def block_sparse_attention_quantised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockMap | torch.Tensor | None = None,
    *sizes: torch.Tensor,
    how: Quantisation | None = None,
    sm_scale: float | None = None,
    failed: torch.Tensor | None = None,
    return_lse: bool = False,
    **fields: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in 8 bits in which each query cluster sees only the key clusters its map row selects.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, in original order (in sorted order where q_permutation is None).
        k, v: [B, H, Sk, D], q's dtype, in original order (in sorted order where k_permutation is None).
        blocks: the map; or its fields one by one: block_map, then q_sizes and k_sizes (`sizes`), then map_index and the
            others as keywords.
        how: precision "int8-fp8", "int8-fp8-acc16" (FP8 products summed in fp16) or "int8-fp16" (P V in 16 bits), smooth_k,
            smooth_v and pv_threshold; or these as keywords.
        sm_scale: softmax scale; default D ** -0.5.
        failed: int32 [B, H], set to 1 for a head whose sums are not finite or left the range of the quantised values.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, H, S, D] in q's original order, dtype and memory layout; with return_lse also lse fp32 [B, H, S],
        natural log, of the scores before smoothing. A query with nothing selected gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, an unknown precision, smooth_v without FP8, a last dim is strided.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: head dim above 128; on the Triton path, a GPU without FP8 or a gradient would be needed.

    Source: arXiv 2505.18875, section 4.4 (dynamic block sizes), with the quantisation of arXiv 2411.10958, section 3.
    """
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    how = as_quantisation(how, fields)
    blocks = as_block_map(blocks, sizes, fields)
    check(q, k, v, blocks, sm_scale)
    how.refuse("block_sparse_attention_quantised", "smooth_q", "q_groups", "k_groups")
    floor = how.pv_threshold
    if floor is not None and (floor.shape != q.shape[1:2] or floor.dtype != torch.float32):
        raise ValueError(f"pv_threshold must be fp32 [H] = [{q.shape[1]}], got {floor.dtype} {tuple(floor.shape)}")
    find_precision(how.precision, SPARSE_PRECISIONS, how.smooth_v)
    target.refuse_gradients("block_sparse_attention_quantised", q, k, v)
    if blocks.tail is not None and blocks.tail.bias.shape[2] == 0:
        blocks = dataclasses.replace(blocks, tail=None)
    op = launch if target.use_triton(q) else block_sparse_attention_quantised_reference
    return op(q, k, v, blocks, how=how, sm_scale=sm_scale, failed=failed, return_lse=return_lse)
