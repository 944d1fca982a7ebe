"""What decides a block-sparse attention besides q, k and v, and whether it all fits together."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Tail(NamedTuple):
    """Keys that stand for clusters: their means, and how many keys each one is.

    Args:
        k: [B, H, C, D], q's dtype, contiguous: the mean key of each of the first C key clusters.
        v: [B, H, C, D], q's dtype, contiguous: the mean value.
        bias: fp32 [M, Cq, C], added to the logits: log of the cluster's size; -inf where a query cluster selects it.
    """

    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class BlockMap:
    """Which key clusters each query cluster sees, and where the tokens of the clusters are.

    Args:
        block_map: bool [M, Cq, Ck], True where query cluster i sees key cluster j.
        q_sizes: int32 [M, Cq], tokens in each query cluster; a row sums to S. Zeros are allowed.
        k_sizes: int32 [M, Ck], tokens in each key cluster; a row sums to Sk. Zeros are allowed.
        map_index: int32 or int64 [B, H], which of the M maps a head uses.
        q_permutation: int32 or int64 [B, H, S], sorted -> original index of queries; None: identity.
        k_permutation: the same [B, H, Sk] for keys and values.
        tail: what stands for the clusters that are not selected, or None: they are left out.
        key_multiple: every key cluster that is selected begins at a multiple of it; from 64 on, 64 keys share a scale in
            8 bits and not 16, which takes less time.
    """

    block_map: torch.Tensor
    q_sizes: torch.Tensor
    k_sizes: torch.Tensor
    map_index: torch.Tensor
    q_permutation: torch.Tensor | None = None
    k_permutation: torch.Tensor | None = None
    tail: Tail | None = None
    key_multiple: int = 1


def as_block_map(blocks: BlockMap | torch.Tensor | None, sizes: tuple, fields: dict[str, Any]) -> BlockMap:
    """A `BlockMap`, also from its fields one by one.

    Args:
        blocks: the value, or its block_map alone.
        sizes: q_sizes and k_sizes beside a block_map.
        fields: the others, by their names.

    Raises:
        TypeError: fields beside a value, an unknown field, or a missing one.
    """
    if isinstance(blocks, BlockMap):
        if sizes or fields:
            raise TypeError(
                f"blocks is a BlockMap already, got {', '.join(fields) or 'sizes'} beside it: replace its field"
            )
        return blocks
    given: tuple[Any, ...] = sizes if blocks is None else (blocks, *sizes)
    return BlockMap(*given, **fields)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockMap, sm_scale: float) -> None:
    """Raises ValueError or TypeError where the arguments of a block-sparse attention do not fit together."""
    block_map, q_sizes, k_sizes = blocks.block_map, blocks.q_sizes, blocks.k_sizes
    map_index, q_permutation, k_permutation = blocks.map_index, blocks.q_permutation, blocks.k_permutation
    if q.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            "q must be [B, H, S, D] and k, v [B, H, Sk, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: expand k and v to q's heads"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: convert them")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dim, got strides {x.stride()}: call .contiguous()")
    M, Cq, Ck = block_map.shape if block_map.dim() == 3 else (0, 0, 0)
    if block_map.dtype != torch.bool or M == 0 or q_sizes.shape != (M, Cq) or k_sizes.shape != (M, Ck):
        raise ValueError(
            "block_map must be bool [M, Cq, Ck] with q_sizes [M, Cq] and k_sizes [M, Ck], "
            f"got {block_map.dtype} {tuple(block_map.shape)}, {tuple(q_sizes.shape)}, {tuple(k_sizes.shape)}: reshape them"
        )
    if map_index.shape != q.shape[:2]:
        raise ValueError(f"map_index must be [B, H] = {tuple(q.shape[:2])}, got {tuple(map_index.shape)}: expand it")
    if q_permutation is not None and q_permutation.shape != q.shape[:3]:
        raise ValueError(
            f"q_permutation must be [B, H, S] = {tuple(q.shape[:3])}, got {tuple(q_permutation.shape)}: expand it"
        )
    if k_permutation is not None and k_permutation.shape != k.shape[:3]:
        raise ValueError(
            f"k_permutation must be [B, H, Sk] = {tuple(k.shape[:3])}, got {tuple(k_permutation.shape)}: expand it"
        )
    if blocks.key_multiple < 1:
        raise ValueError(f"key_multiple must be 1 or more, got {blocks.key_multiple}")
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be positive, got {sm_scale}: scale q instead")
    # On CUDA the sums would cost a wait for the device.
    if not q.is_cuda:
        for name, sizes, total in (("q_sizes", q_sizes, q.shape[2]), ("k_sizes", k_sizes, k.shape[2])):
            if bool((sizes.sum(1) != total).any()):
                raise ValueError(
                    f"{name} must sum to {total} tokens in each row, got {sizes.sum(1).tolist()}: "
                    "count every token once, also text and padding"
                )
    if blocks.tail is not None:
        _check_tail(q, q_sizes, blocks.tail)


def _check_tail(q: torch.Tensor, q_sizes: torch.Tensor, tail: Tail) -> None:
    B, H, _, D = q.shape
    C = tail.k.shape[2] if tail.k.dim() == 4 else 0
    if tail.k.shape != (B, H, C, D) or tail.v.shape != tail.k.shape or tail.bias.shape != (*q_sizes.shape, C):
        raise ValueError(
            f"tail must hold k and v [B, H, C, D] = [{B}, {H}, C, {D}] and bias [M, Cq, C], "
            f"got {tuple(tail.k.shape)}, {tuple(tail.v.shape)}, {tuple(tail.bias.shape)}: reshape them"
        )
    if not tail.k.dtype == tail.v.dtype == q.dtype or tail.bias.dtype != torch.float32:
        raise TypeError(
            f"tail must hold k and v of q's dtype {q.dtype} and an fp32 bias, "
            f"got {tail.k.dtype}, {tail.v.dtype}, {tail.bias.dtype}: convert them"
        )
