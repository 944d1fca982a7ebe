"""Block-sparse attention in 8 bits in plain torch: the specification of both kernels."""

import dataclasses
from functools import partial
from typing import Any

import torch

from ..block_sparse.blocks import BlockMap, as_block_map
from ..block_sparse.reference import block_sparse_attention_reference
from ..clustering.permute import gather_tokens_reference
from ..common.merge import merge_attention_reference
from ..common.numbers import base2, softmax_scale
from ..common.rounded import note_failure_reference, rounded_attention
from ..common.smoothing import unsmoothed_lse_reference
from ..quantize.channels import fp8_values, quantize_channels_reference, statistics_reference
from ..quantize.precision import Quantisation, as_quantisation, pv_dtype
from ..quantize.tokens import dequantize_tokens, key_groups, quantize_tokens_reference
from .tail import attend_tail, merge_tail

PV_TILE = 64  # keys of a tile that pv_threshold skips, in the specification


def block_sparse_attention_quantised_reference(
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
    """Specification of `block_sparse_attention_quantised` in plain torch; same arguments and result.

    Quantised and turned back into fp32, then the unquantised specification with P rounded in its attention. For
    pv_threshold a query cluster is one query tile, and each PV_TILE of its selected keys one tile of keys. The tail is
    not quantised.
    """
    D = q.shape[-1]
    sm_scale = softmax_scale(sm_scale, D)
    how = as_quantisation(how, fields)
    blocks = as_block_map(blocks, sizes, fields)
    if blocks.tail is not None:
        alone = dataclasses.replace(blocks, tail=None)
        found = block_sparse_attention_quantised_reference(
            q, k, v, alone, how=how, sm_scale=sm_scale, failed=failed, return_lse=True
        )
        other = attend_tail(block_sparse_attention_reference, q, blocks, sm_scale)
        return merge_tail(merge_attention_reference, found, other, return_lse)
    kind, k_permutation = how.kind, blocks.k_permutation
    stats = statistics_reference(k, v)
    mean = stats.k_mean if how.smooth_k else None
    keys = quantize_tokens_reference(
        k, side="k", groups=key_groups(blocks.key_multiple), mean=mean, permutation=k_permutation
    )
    if kind.fp8:
        channels = quantize_channels_reference(
            v, stats, smooth=how.smooth_v, limit=kind.v_range, permutation=k_permutation
        )
        values = fp8_values(channels, v.shape[2], D)
    else:
        values = v if k_permutation is None else gather_tokens_reference(v, k_permutation)
        values = values.to(pv_dtype(v)).float()
    rows, keys = dequantize_tokens(quantize_tokens_reference(q, side="q"), D), dequantize_tokens(keys, D)
    attend = partial(_attend, p_dtype=kind.p_dtype(v), acc16=kind.acc16)

    def sparse(heads, attend):
        order = None if blocks.q_permutation is None else blocks.q_permutation[:, heads]
        part = dataclasses.replace(
            blocks, map_index=blocks.map_index[:, heads], q_permutation=order, k_permutation=None
        )
        return block_sparse_attention_reference(
            rows[:, heads], keys[:, heads], values[:, heads], part, sm_scale=sm_scale, return_lse=True, attend=attend
        )

    if how.pv_threshold is None:
        out, lse = sparse(slice(None), attend)
    else:
        limits = how.pv_threshold.tolist()
        parts = [sparse(slice(h, h + 1), partial(attend, threshold=limit)) for h, limit in enumerate(limits)]
        out, lse = (torch.cat(part, 1) for part in zip(*parts))
    if kind.fp8:
        out = out * channels.scale[:, :, None, :D]
    if how.smooth_v:
        assert channels.mean is not None
        out = torch.where(lse[..., None] == -torch.inf, 0.0, out + channels.mean[:, :, None, :D])
    note_failure_reference(failed, out)
    out = torch.empty_like(q).copy_(out)
    return (out, unsmoothed_lse_reference(lse, q, mean, sm_scale)) if return_lse else out


def _attend(q, k, v, scale, p_dtype, acc16, threshold=None):
    if threshold is None:
        return rounded_attention(q, k, v, scale, p_dtype, acc16=acc16)[0]
    scores = q @ k.transpose(2, 3) * base2(scale)  # [1, N, s, n], base 2
    p = torch.exp2(scores - scores.amax(-1, keepdim=True))
    largest = 448 if p_dtype == torch.float8_e4m3fn else 1
    rounded = (p * largest).to(p_dtype).float() / largest
    skipped = skipped_tiles(scores, threshold).repeat_interleave(PV_TILE, -1)[..., : k.shape[2]]  # [1, N, n]
    return rounded.masked_fill(skipped[:, :, None], 0) @ v / p.sum(-1, keepdim=True)


def skipped_tiles(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which tiles of PV_TILE keys are left out of P V, where `threshold` is given and the rows are one query tile.

    Args:
        scores: fp32 [..., s, n], base 2, keys in the order in which they are computed.
        threshold: powers of two.

    Returns:
        bool [..., ceil(n / PV_TILE)].

    Source: arXiv 2502.18137, section 3.4 (sparse warp online softmax).
    """
    peaks = torch.stack([tile.amax(-1) for tile in scores.split(PV_TILE, -1)], -1)  # [..., s, tiles]
    before = peaks.cummax(-1).values.roll(1, -1)
    before[..., 0] = -torch.inf
    return (peaks - before < -threshold).all(-2)
