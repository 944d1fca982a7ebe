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

import torch

from ..block_sparse.blocks import Tail, check, check_tail
from ..common import target
from ..quantize.precision import SPARSE_PRECISIONS, find_precision
from .reference import block_sparse_attention_quantised_reference
from .triton import launch


def block_sparse_attention_quantised(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    q_sizes: torch.Tensor,
    k_sizes: torch.Tensor,
    *,
    map_index: torch.Tensor,
    q_permutation: torch.Tensor | None = None,
    k_permutation: torch.Tensor | None = None,
    sm_scale: float | None = None,
    precision: str = "int8-fp8",
    smooth_k: bool = True,
    smooth_v: bool = False,
    pv_threshold: torch.Tensor | None = None,
    key_multiple: int = 1,
    failed: torch.Tensor | None = None,
    return_lse: bool = False,
    tail: Tail | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in 8 bits in which each query cluster sees only the key clusters its map row selects.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, in original order (in sorted order where q_permutation is None).
        k, v: [B, H, Sk, D], q's dtype, in original order (in sorted order where k_permutation is None).
        block_map: bool [M, Cq, Ck].
        q_sizes: int32 [M, Cq], tokens in each query cluster; a row sums to S. Zeros are allowed.
        k_sizes: int32 [M, Ck], tokens in each key cluster; a row sums to Sk. Zeros are allowed.
        map_index: int32 or int64 [B, H], which of the M maps a head uses.
        q_permutation: int32 or int64 [B, H, S], sorted -> original index of queries; None: identity.
        k_permutation: the same [B, H, Sk] for keys and values.
        sm_scale: softmax scale; default D ** -0.5.
        precision: "int8-fp8", "int8-fp8-acc16" (FP8 products summed in fp16) or "int8-fp16" (P V in 16 bits).
        smooth_k: take K's mean over all tokens off.
        smooth_v: take V's channel means off and add them to the output (FP8 only).
        pv_threshold: fp32 [H], >= 0: skip P V of a tile of keys where in no row of the query tile the tile's largest
            score comes within this many powers of two of the running maximum; None: never.
        key_multiple: every key cluster that is selected begins at a multiple of it; from 64 on, 64 keys share a scale and
            not 16, which takes less time.
        failed: int32 [B, H], set to 1 for a head whose sums are not finite or left the range of the quantised values.
        return_lse: also return the log-sum-exp.
        tail: what stands for the clusters that are not selected, or None: they are left out.

    Returns:
        out [B, H, S, D] in q's original order, dtype and memory layout; with return_lse also lse fp32 [B, H, S],
        natural log, of the scores before smoothing. A query with nothing selected gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, an unknown precision, smooth_v without FP8, a last dim is strided.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: head dim above 128; on the Triton path, a GPU without FP8 or a gradient would be needed.

    Source: arXiv 2505.18875, section 4.4 (dynamic block sizes), with the quantisation of arXiv 2411.10958, section 3.
    """
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    check(q, k, v, block_map, q_sizes, k_sizes, map_index, q_permutation, sm_scale)
    check_tail(q, q_sizes, tail)
    if pv_threshold is not None and (pv_threshold.shape != q.shape[1:2] or pv_threshold.dtype != torch.float32):
        raise ValueError(
            f"pv_threshold must be fp32 [H] = [{q.shape[1]}], got {pv_threshold.dtype} {tuple(pv_threshold.shape)}"
        )
    find_precision(precision, SPARSE_PRECISIONS, smooth_v)
    if key_multiple < 1:
        raise ValueError(f"key_multiple must be 1 or more, got {key_multiple}")
    if k_permutation is not None and k_permutation.shape != k.shape[:3]:
        raise ValueError(
            f"k_permutation must be [B, H, Sk] = {tuple(k.shape[:3])}, got {tuple(k_permutation.shape)}: expand it"
        )
    target.refuse_gradients("block_sparse_attention_quantised", q, k, v)
    if tail is not None and tail.bias.shape[2] == 0:
        tail = None
    op = launch if target.use_triton(q) else block_sparse_attention_quantised_reference
    return op(
        q, k, v, block_map, q_sizes, k_sizes, map_index=map_index, q_permutation=q_permutation,
        k_permutation=k_permutation, sm_scale=sm_scale, precision=precision, smooth_k=smooth_k, smooth_v=smooth_v,
        pv_threshold=pv_threshold, key_multiple=key_multiple, failed=failed, return_lse=return_lse, tail=tail,
    )  # fmt: skip
