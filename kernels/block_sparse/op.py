"""Attention over a map of variable-size blocks: query cluster i attends to key cluster j where block_map[i, j].

    out[t] = sum_s p_ts v_s / sum_s p_ts,   p_ts = exp(sm_scale * q_t . k_s - max),   s in the selected clusters

With a `Tail` the clusters that are not selected take part too, each as one key: n_j equal keys at the mean key.

Three kernels. `_query_tiles_kernel` cuts every query cluster into tiles of BLOCK_M rows. `_key_tiles_kernel` merges
neighbouring selected key clusters of a map row into runs and cuts those into tiles of BLOCK_N keys, full tiles first,
so that `_attention_kernel` has two flat loops: full tiles without a mask, then each run's last tile with one.
K and V tiles come through the tensor memory accelerator (`tma`) or through pointers, as the launch table says; a tile
may start at any row, so what the accelerator brings beyond a run is masked by its score (those values must be finite).
Surplus programs of the upper-bound grid exit at once, so nothing waits for the device and a CUDA graph can hold it all.
Memory besides the output: 4 bytes for each (query cluster, key tile), which is Cq * (S / BLOCK_N + Ck / 2) a map.

fp16, bf16 and fp32 (fp32 as three TF32 products), fp32 accumulation, base-2 softmax. Head dims up to 128, padded to a
power of two. sm80 and newer.
"""

from typing import Any

import torch

from ..common import target
from ..common.numbers import softmax_scale
from .blocks import BlockMap, as_block_map, check
from .reference import block_sparse_attention_reference
from .triton import launch


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: BlockMap | torch.Tensor | None = None,
    *sizes: torch.Tensor,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **fields: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which each query cluster sees only the key clusters its map row selects.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, in original order (in sorted order where q_permutation is None).
        k: [B, H, Sk, D], q's dtype, in sorted order (see `gather_tokens`).
        v: [B, H, Sk, D], q's dtype, in k's order.
        blocks: the map; or its fields one by one: block_map, then q_sizes and k_sizes (`sizes`), then map_index and the
            others as keywords.
        sm_scale: softmax scale; default D ** -0.5.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, H, S, D] in q's original order, dtype and memory layout; with return_lse also lse fp32 [B, H, S],
        natural log. A query with nothing selected gives zeros, and -inf.

    Raises:
        ValueError: shapes disagree, a last dim is strided, sm_scale is not positive, or (on CPU) sizes miss tokens.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: on the Triton path, head dim above 128 or a gradient would be needed.

    Source: arXiv 2505.18875, section 4.4 (attention with dynamic block sizes); the tail: arXiv 2603.08982 (SVG-EAR).
    """
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    blocks = as_block_map(blocks, sizes, fields)
    if blocks.k_permutation is not None:
        raise ValueError(
            "k_permutation must be None, because k and v are in sorted order here: move them by gather_tokens"
        )
    check(q, k, v, blocks, sm_scale)
    op = launch if target.use_triton(q) else block_sparse_attention_reference
    return op(q, k, v, blocks, sm_scale=sm_scale, return_lse=return_lse)
