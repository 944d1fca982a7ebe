"""Block-sparse attention in 8 bits in plain torch: the specification of both kernels."""

from functools import partial

import torch

from ..block_sparse.blocks import Tail
from ..block_sparse.reference import block_sparse_attention_reference
from ..clustering.permute import gather_tokens_reference
from ..common.merge import merge_attention_reference
from ..common.numbers import LOG2_E
from ..common.rounded import note_failure_reference, rounded_attention
from ..common.smoothing import unsmoothed_lse_reference
from ..quantize.channels import fp8_values, quantize_channels_reference, statistics_reference
from ..quantize.precision import PRECISIONS, pv_dtype
from ..quantize.tokens import dequantize_tokens, key_groups, quantize_tokens_reference
from .tail import attend_tail, merge_tail

PV_TILE = 64  # keys of a tile that pv_threshold skips, in the specification


def block_sparse_attention_quantised_reference(
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
    """Specification of `block_sparse_attention_quantised` in plain torch; same arguments and result.

    Quantised and turned back into fp32, then the unquantised specification with P rounded in its attention. For
    pv_threshold a query cluster is one query tile, and each PV_TILE of its selected keys one tile of keys. The tail is
    not quantised.
    """
    if tail is not None:
        found = block_sparse_attention_quantised_reference(
            q, k, v, block_map, q_sizes, k_sizes, map_index=map_index, q_permutation=q_permutation,
            k_permutation=k_permutation, sm_scale=sm_scale, precision=precision, smooth_k=smooth_k, smooth_v=smooth_v,
            pv_threshold=pv_threshold, key_multiple=key_multiple, failed=failed, return_lse=True,
        )  # fmt: skip
        other = attend_tail(block_sparse_attention_reference, q, q_sizes, map_index, q_permutation, sm_scale, tail)
        return merge_tail(merge_attention_reference, found, other, return_lse)
    D = q.shape[-1]
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    kind = PRECISIONS[precision]
    stats = statistics_reference(k, v)
    mean = stats.k_mean if smooth_k else None
    keys = quantize_tokens_reference(k, side="k", groups=key_groups(key_multiple), mean=mean, permutation=k_permutation)
    if kind.fp8:
        channels = quantize_channels_reference(v, stats, smooth=smooth_v, limit=kind.v_range, permutation=k_permutation)
        values = fp8_values(channels, v.shape[2], D)
    else:
        values = v if k_permutation is None else gather_tokens_reference(v, k_permutation)
        values = values.to(pv_dtype(v)).float()
    rows, keys = dequantize_tokens(quantize_tokens_reference(q, side="q"), D), dequantize_tokens(keys, D)
    attend = partial(_attend, p_dtype=kind.p_dtype(v), acc16=kind.acc16)

    def sparse(heads, attend):
        order = None if q_permutation is None else q_permutation[:, heads]
        return block_sparse_attention_reference(
            rows[:, heads], keys[:, heads], values[:, heads], block_map, q_sizes, k_sizes,
            map_index=map_index[:, heads], q_permutation=order, sm_scale=sm_scale, return_lse=True, attend=attend,
        )  # fmt: skip

    if pv_threshold is None:
        out, lse = sparse(slice(None), attend)
    else:
        limits = pv_threshold.tolist()
        parts = [sparse(slice(h, h + 1), partial(attend, threshold=limit)) for h, limit in enumerate(limits)]
        out, lse = (torch.cat(part, 1) for part in zip(*parts))
    if kind.fp8:
        out = out * channels.scale[:, :, None, :D]
    if smooth_v:
        out = torch.where(lse[..., None] == -torch.inf, 0.0, out + channels.mean[:, :, None, :D])
    note_failure_reference(failed, out)
    out = torch.empty_like(q).copy_(out)
    return (out, unsmoothed_lse_reference(lse, q, mean, sm_scale)) if return_lse else out


def _attend(q, k, v, scale, p_dtype, acc16, threshold=None):
    if threshold is None:
        return rounded_attention(q, k, v, scale, p_dtype, acc16=acc16)[0]
    scores = q @ k.transpose(2, 3) * (scale * LOG2_E)  # [1, N, s, n], base 2
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
