"""A tail that a kernel does not take itself: an attention of its own, merged by the log-sum-exps."""

import dataclasses

import torch


def attend_tail(op, q, blocks, sm_scale):
    """Attention to the tail alone, without quantisation, and its log-sum-exp."""
    maps, clusters = blocks.q_sizes.shape
    nothing = dataclasses.replace(
        blocks,
        block_map=torch.zeros(maps, clusters, 1, dtype=torch.bool, device=q.device),
        k_sizes=torch.full((maps, 1), blocks.tail.k.shape[2], dtype=torch.int32, device=q.device),
        k_permutation=None,
    )
    return op(q, blocks.tail.k, blocks.tail.v, nothing, sm_scale=sm_scale, return_lse=True)


def merge_tail(op, found, other, return_lse):
    """One attention of the selected keys' and the tail's, each an output and a log-sum-exp."""
    (out, lse), (_, other_lse) = found, other
    op(out, lse, *other)
    return (out, torch.logaddexp(lse, other_lse)) if return_lse else out
