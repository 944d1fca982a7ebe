"""SVG1: every head is spatial or temporal, and attends to a band, the first frame and the text.

Sequence of a head as executed (text only where it shares the sequence with the video):

    queries  video in the kind's order, in blocks                          | prompt | padding
    keys     sink (first latent frame) | the other video tokens, in blocks | prompt | padding

The kind's order is frame-major for spatial heads and token-major (position_in_frame * frames + frame) for temporal
ones; a token's coordinate is its place in that order, whether or not the sink was taken out of it. A video query block
sees the sink, the prompt and every key block whose coordinates come within the half-width of its own. Text rows see
all; padding text is seen by nobody. The same map is profiled and executed.

Source: Sparse VideoGen (arXiv 2502.01776), sections 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from svg.kernels.common.constants import constant
from svg.kernels.selection.probe import probe_attention

from ...engine.layout import TokenLayout
from ...engine.plan import Plan, map_shares
from ...engine.replay import Steady
from ...engine.state import LayerState
from ..dense import key_mask
from ..text import prompt_first, visible_keys
from .config import SVG1Config

SPATIAL, TEMPORAL = 0, 1
DRAWN = "rows"  # of this call, in the layer's cache
Q_BLOCKS = 2  # a block of queries is as long as two of keys: the kernels' tiles are 128 x 64


@dataclass(frozen=True)
class BandGrid:
    """What depends on the video grid and the block size alone; first dimension: spatial, temporal.

    Args:
        q_order, k_order: int32 [2, V], video tokens as executed.
        q_block, k_block: int64 [2, V], which block holds a video token (key block 0 is the sink).
        q_sizes, k_sizes: int32 [Nq], [Nk], tokens in each block.
        q_range: int32 [2 (low, high), Nq], coordinates of each query block.
        k_range: int32 [2 (low, high), 2, Nk - 1], coordinates of each key block but the sink.
        area: float64 [2, V], (query, key) pairs in band blocks at half-width 0, 1, ...
    """

    q_order: Tensor
    k_order: Tensor
    q_block: Tensor
    k_block: Tensor
    q_sizes: Tensor
    k_sizes: Tensor
    q_range: Tensor
    k_range: Tensor
    area: Tensor


@dataclass(frozen=True)
class BandMaps:
    """Executable maps of N samples (N = 1: all samples alike); map 2 * n + kind is sample n's for a kind.

    Where heads have densities of their own, N counts those of the first density, then those of the next, and so on.

    Args:
        q_permutation, k_permutation: int32 [2N, S], sorted -> original index.
        k_block: int64 [2N, S], which key block holds a token (original index).
        q_sizes, k_sizes: int32 [2N, Cq], [2N, Ck].
        block_map: bool [2N, Cq, Ck].
        visible_keys: int64 [2N].
        share: float32 [2N], the maps' densities.
    """

    q_permutation: Tensor
    k_permutation: Tensor
    k_block: Tensor
    q_sizes: Tensor
    k_sizes: Tensor
    block_map: Tensor
    visible_keys: Tensor
    share: Tensor


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SVG1Config,
    state: LayerState,
    layout: TokenLayout,
    text_mask: Tensor | None = None,
) -> Plan:
    """Decide every head's kind from sampled rows, and what that kind computes.

    Args:
        q, k, v: float [B, H, S, D].
        config: the method's settings.
        state: the layer's state, for its generator.
        layout: where video and text are.
        text_mask: bool [B, text_tokens], True for prompt tokens, or None for all.

    Returns:
        The plan, with `kind` set.

    Source: arXiv 2502.01776, section 3.2 (online profiling) and 4.1 (layout transformation).
    """
    densities = _densities(config.head_density) or (config.density,)
    if text_mask is None:
        maps = _shared_maps(layout, densities, config.block_size, q.device)
    else:
        maps = _maps_of_all(layout, densities, config.block_size, q.device, text_mask)
    drawn = state.cache.pop(DRAWN, None)
    if drawn is None:
        drawn = _draw(q, config, state, layout)
    rows = rows_at(layout.video_tokens, drawn)
    masks = row_masks(maps, rows, layout, config.block_size)
    visible = key_mask(layout, text_mask)
    group = torch.arange(q.shape[0], device=q.device)[:, None] if text_mask is not None else 0
    mask_index = None
    if len(densities) > 1:
        samples = masks.shape[0] // len(densities)
        group = group + samples * _density_index(densities, config, state, q.device)  # [B or 1, H]
        mask_index = group.expand(q.shape[:2]).to(torch.int32)
        visible = None if visible is None else visible.repeat(len(densities), 1)
    kind = head_kinds(q, k, v, rows + layout.video_slice.start, masks, visible, mask_index)
    map_index = kind + 2 * group  # [B, H]
    return Plan(
        q_permutation=maps.q_permutation[map_index],
        k_permutation=maps.k_permutation[map_index],
        q_sizes=maps.q_sizes,
        k_sizes=maps.k_sizes,
        block_map=maps.block_map,
        map_index=map_index.to(torch.int32),
        visible_keys=maps.visible_keys,
        share=maps.share,
        kind=kind.to(torch.int8),
    )


def steady(
    q: Tensor, config: SVG1Config, state: LayerState, layout: TokenLayout, text_mask: Tensor | None
) -> Steady | None:
    """What a captured call needs (see `svg/methods/registry.py`): numbers for its sampled rows, drawn before; none with text."""
    if layout.text_tokens or config.head_density is not None:
        return None
    drawn = state.cache[DRAWN] = _draw(q, config, state, layout)
    maps = _shared_maps(layout, (config.density,), config.block_size, q.device)
    grid = band_grid(_video(layout), config.block_size, q.device)
    return Steady(config, (maps, grid, _stretches(layout.video_tokens, len(drawn), q.device)))


def _draw(q: Tensor, config: SVG1Config, state: LayerState, layout: TokenLayout) -> Tensor:
    return _drawn(min(config.sample_rows, layout.video_tokens), state.generator(q.device))


def sample_rows(video_tokens: int, count: int, generator: torch.Generator) -> Tensor:
    """Distinct video rows, one drawn from each of `count` equal stretches of the video.

    Args:
        video_tokens: V.
        count: rows wanted; all V are taken if there are fewer.
        generator: private generator, on the device of the result.

    Returns:
        int64 [min(count, V)], ascending, in [0, V).
    """
    return rows_at(video_tokens, _drawn(min(count, video_tokens), generator))


def _drawn(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)


def rows_at(video_tokens: int, drawn: Tensor) -> Tensor:
    """The rows of `sample_rows` for numbers in [0, 1), one for each stretch, fp64 [t]."""
    starts, lengths = _stretches(video_tokens, len(drawn), drawn.device)
    return starts + (drawn * lengths).long()


@constant(maxsize=4)
def _stretches(tokens: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Starts and lengths of equal stretches, int64 [count]."""
    edges = torch.arange(count + 1) * tokens // count
    return edges[:-1].to(device), edges.diff().to(device)


def row_masks(maps: BandMaps, rows: Tensor, layout: TokenLayout, block_size: int) -> Tensor:
    """The executed maps, read at token level for some query rows.

    Args:
        maps: executable maps.
        rows: int64 [t], video rows from 0.
        layout: where video and text are.
        block_size: tokens in a block.

    Returns:
        bool [N, 2 (spatial, temporal), t, S].
    """
    q_block = band_grid(_video(layout), block_size, rows.device).q_block[:, rows]  # [2, t]
    num = maps.block_map.shape[0] // 2
    blocks = maps.block_map.unflatten(0, (num, 2))[:, torch.arange(2, device=rows.device)[:, None], q_block]
    columns = maps.k_block.unflatten(0, (num, 2))[:, :, None, :]  # [N, 2, 1, S]
    return blocks.gather(-1, columns.expand(-1, -1, rows.numel(), -1))


def head_kinds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    masks: Tensor,
    visible: Tensor | None,
    mask_index: Tensor | None = None,
) -> Tensor:
    """The kind whose mask changes the sampled rows' output least.

    Args:
        q, k, v: float [B, H, S, D].
        rows: int64 [t], query rows of the sequence.
        masks: bool [N, 2, t, S] with N = 1 or B, spatial and temporal.
        visible: bool [B, S], keys that dense attention sees, or None for all.
        mask_index: int32 [B, H], which of N masks each head has; visible is then [N, S]. None: its sample's.

    Returns:
        int64 [B, H], SPATIAL or TEMPORAL; a tie is SPATIAL.
    """
    probed = probe_attention(q[:, :, rows], k, v, masks, visible, mask_index=mask_index)
    full, spatial, temporal = probed.unbind(2)  # [B, H, t, D]
    lost = [(out - full).square().mean((-2, -1)) for out in (spatial, temporal)]
    return (lost[1] < lost[0]).long()


def band_maps(
    layout: TokenLayout, density: float, block_size: int, device: torch.device, text_mask: Tensor | None = None
) -> BandMaps:
    """Maps of both kinds at the largest half-width whose measured density is not above the target.

    Where sink and text alone are above it, the half-width is 0 and the plan's density tells.

    Args:
        layout: where video and text are.
        density: target in (0, 1]; everything counts: band, sink, text.
        block_size: tokens in a block.
        device: where the result lives.
        text_mask: bool [B, text_tokens], True for prompt tokens; None: one map for all samples, all text seen.

    Returns:
        Maps of N = B samples, or of N = 1 without text_mask.
    """
    grid = band_grid(_video(layout), block_size, device)
    num = 1 if text_mask is None else text_mask.shape[0]
    visible = visible_keys(num, layout.video_tokens, layout.text_tokens, text_mask, device)  # [N]
    block_map = _block_map(grid, half_widths(grid, layout, density, visible), text=layout.text_tokens > 0)
    if text_mask is None:
        text_mask = torch.ones(num, layout.text_tokens, dtype=torch.bool, device=device)
    prompt = text_mask.sum(-1, keepdim=True)  # [N, 1]
    q_sizes, k_sizes = (_sizes(sizes, prompt, layout.text_tokens) for sizes in (grid.q_sizes, grid.k_sizes))
    visible = visible.repeat_interleave(2)
    return BandMaps(
        q_permutation=_sequence(grid.q_order, text_mask, layout),
        k_permutation=_sequence(grid.k_order, text_mask, layout),
        k_block=_blocks_of_tokens(grid, text_mask, layout),
        q_sizes=q_sizes,
        k_sizes=k_sizes,
        block_map=block_map,
        visible_keys=visible,
        share=map_shares(block_map, q_sizes, k_sizes, visible),
    )


@constant(maxsize=4)
def _shared_maps(layout: TokenLayout, densities: tuple[float, ...], block_size: int, device: torch.device) -> BandMaps:
    return _maps_of_all(layout, densities, block_size, device)


def _maps_of_all(
    layout: TokenLayout,
    densities: tuple[float, ...],
    block_size: int,
    device: torch.device,
    text_mask: Tensor | None = None,
) -> BandMaps:
    """`band_maps` of one density after the other."""
    parts = [band_maps(layout, density, block_size, device, text_mask) for density in densities]
    if len(parts) == 1:
        return parts[0]
    return BandMaps(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(BandMaps)})


@lru_cache(maxsize=4)
def _densities(table: tuple[tuple[float, ...], ...] | None) -> tuple[float, ...]:
    """The distinct densities of all heads of all layers, so that layers share maps."""
    return tuple(sorted({density for row in table or () for density in row}))


def _density_index(densities: tuple[float, ...], config: SVG1Config, state: LayerState, device: torch.device) -> Tensor:
    """Which of the densities each head of a layer has, int64 [H]."""
    if "density_index" not in state.cache:
        index = [densities.index(density) for density in config.head_budgets(state.layer) or ()]
        state.cache["density_index"] = torch.tensor(index, device=device)
    return state.cache["density_index"]


@constant(maxsize=4)
def band_grid(layout: TokenLayout, block_size: int, device: torch.device) -> BandGrid:
    """Orders, blocks and band areas of a video grid, computed on the CPU and moved once.

    Args:
        layout: a video grid without text.
        block_size: tokens in a block.
        device: where the result lives.

    Returns:
        The grid's tables.
    """
    video, sink = layout.video_tokens, layout.tokens_per_frame
    index = torch.arange(video)
    token_major = index.view(layout.frames, sink).T.reshape(-1)
    order = torch.stack([index, token_major])  # [2, V], coordinate -> token
    coordinate = order.argsort(-1)  # [2, V], token -> coordinate
    band = torch.stack([row[row >= sink] for row in order])  # [2, V - sink], keys without the sink
    k_order = torch.cat([index[:sink].expand(2, -1), band], -1)
    q_sizes, k_sizes = _split(video, Q_BLOCKS * block_size), _split(video - sink, block_size)
    q_ends, k_ends = q_sizes.cumsum(0), k_sizes.cumsum(0)
    q_range = torch.stack([q_ends - q_sizes, q_ends - 1])
    k_coordinate = coordinate.gather(-1, band)  # ascending
    k_range = torch.stack([k_coordinate[:, k_ends - k_sizes], k_coordinate[:, k_ends - 1]])
    k_block = torch.zeros_like(order)
    k_block.scatter_(-1, band, (torch.arange(video - sink) // block_size + 1).expand(2, -1))
    area = torch.stack([_area(q_range, k_range[:, kind], q_sizes, k_sizes, video) for kind in (SPATIAL, TEMPORAL)])
    k_sizes = torch.cat([torch.tensor([sink]), k_sizes])
    return BandGrid(
        order.to(device, torch.int32),
        k_order.to(device, torch.int32),
        (coordinate // (Q_BLOCKS * block_size)).to(device),
        k_block.to(device),
        q_sizes.to(device, torch.int32),
        k_sizes.to(device, torch.int32),
        q_range.to(device, torch.int32),
        k_range.to(device, torch.int32),
        area.to(device),
    )


def half_widths(grid: BandGrid, layout: TokenLayout, density: float, visible: Tensor) -> Tensor:
    """Largest half-widths whose measured density is not above the target, at least 0.

    Args:
        grid: tables of the video grid.
        layout: where video and text are.
        density: target in (0, 1].
        visible: int64 [N], keys that dense attention would see, per sample.

    Returns:
        int64 [N, 2], in tokens, spatial and temporal.
    """
    video, text = layout.video_tokens, layout.text_tokens
    # Always computed: sink and prompt columns of the video rows, and the text rows.
    golden = video * (layout.tokens_per_frame + visible - video) + text * visible  # [N]
    left = density * (layout.total_tokens * visible).double() - golden
    width = torch.searchsorted(grid.area, left.expand(2, -1).contiguous(), right=True) - 1
    return width.clamp_min(0).T


def _block_map(grid: BandGrid, widths: Tensor, text: bool) -> Tensor:
    q_low, q_high = grid.q_range[:, :, None]  # [Nq, 1]
    k_low, k_high = grid.k_range[:, :, None, :]  # [2, 1, Nk - 1]
    reach = widths[:, :, None, None]  # [N, 2, 1, 1]
    band = (k_low - q_high <= reach) & (q_low - k_high <= reach)  # [N, 2, Nq, Nk - 1]
    num_q, num_k = grid.q_sizes.numel(), grid.k_sizes.numel()
    block_map = band.new_ones(*band.shape[:2], num_q + 2 * text, num_k + 2 * text)
    block_map[..., :num_q, 1:num_k] = band
    if text:
        block_map[..., -1] = False
    return block_map.flatten(0, 1)


def _area(q_range: Tensor, k_range: Tensor, q_sizes: Tensor, k_sizes: Tensor, video: int) -> Tensor:
    apart = torch.maximum(k_range[0] - q_range[1][:, None], q_range[0][:, None] - k_range[1]).clamp_min(0)  # [Nq, Nk]
    pairs = (q_sizes[:, None] * k_sizes).double()
    return torch.bincount(apart.flatten(), pairs.flatten(), minlength=video).cumsum(0)


def _sequence(order: Tensor, text_mask: Tensor, layout: TokenLayout) -> Tensor:
    num = text_mask.shape[0]
    text = prompt_first(text_mask)  # [N, T]
    video = order + layout.video_slice.start  # [2, V]
    text = (text + layout.text_slice.start)[:, None].expand(-1, 2, -1)
    return torch.cat([video.expand(num, -1, -1), text], -1).flatten(0, 1)


def _blocks_of_tokens(grid: BandGrid, text_mask: Tensor, layout: TokenLayout) -> Tensor:
    prompt = grid.k_sizes.numel()
    blocks = grid.k_block.new_empty(text_mask.shape[0], 2, layout.total_tokens)
    blocks[..., layout.video_slice] = grid.k_block
    blocks[..., layout.text_slice] = torch.where(text_mask, prompt, prompt + 1)[:, None]
    return blocks.flatten(0, 1)


def _sizes(video: Tensor, prompt: Tensor, text_tokens: int) -> Tensor:
    sizes = video.expand(prompt.shape[0], -1)
    if text_tokens:
        sizes = torch.cat([sizes, prompt, text_tokens - prompt], -1)
    return sizes.to(torch.int32).repeat_interleave(2, dim=0)


def _split(tokens: int, block_size: int) -> Tensor:
    starts = torch.arange(0, tokens, block_size)
    return (tokens - starts).clamp_max(block_size)


def _video(layout: TokenLayout) -> TokenLayout:
    return TokenLayout(layout.frames, layout.height, layout.width)
