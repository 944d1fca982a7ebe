"""A tail that a kernel does not take itself: an attention of its own, merged by the log-sum-exps."""

import torch


def attend_tail(op, q, q_sizes, map_index, q_permutation, sm_scale, tail):
    """Attention to the tail alone, without quantisation, and its log-sum-exp."""
    maps, clusters = q_sizes.shape
    nothing = torch.zeros(maps, clusters, 1, dtype=torch.bool, device=q.device)
    k_sizes = torch.full((maps, 1), tail.k.shape[2], dtype=torch.int32, device=q.device)
    return op(
        q, tail.k, tail.v, nothing, q_sizes, k_sizes,
        map_index=map_index, q_permutation=q_permutation, sm_scale=sm_scale, return_lse=True, tail=tail,
    )  # fmt: skip


def merge_tail(op, found, other, return_lse):
    """One attention of the selected keys' and the tail's, each an output and a log-sum-exp."""
    (out, lse), (_, other_lse) = found, other
    op(out, lse, *other)
    return (out, torch.logaddexp(lse, other_lse)) if return_lse else out
