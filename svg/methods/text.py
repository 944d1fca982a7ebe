"""Text in a plan: the prompt is one more block after the video's and the padding another, on both sides.

Prompt columns and all text rows are always computed; padding columns never.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.layout import TokenLayout


def prompt_first(text_mask: Tensor) -> Tensor:
    """Order of the text's tokens, the prompt's before the padding's, each in its own order.

    Args:
        text_mask: bool [B, text_tokens], True for prompt tokens.

    Returns:
        int32 [B, text_tokens], sorted -> original index from 0.
    """
    return text_mask.logical_not().to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)


def with_text(block_map: Tensor, layout: TokenLayout) -> Tensor:
    """A map of the video's blocks with the prompt's and the padding's, where there is text.

    Args:
        block_map: bool [..., Nq, Nk].
        layout: where video and text are.

    Returns:
        bool [..., Nq + 2, Nk + 2].
    """
    if not layout.text_tokens:
        return block_map
    block_map = F.pad(block_map, (0, 2, 0, 2), value=True)
    block_map[..., -1] = False
    return block_map


def tile_multiple(tile: int, layout: TokenLayout) -> int:
    """What selected key clusters begin at multiples of, where the video is cut into tiles and text comes after it.

    Args:
        tile: keys of a tile; the video's last one may have fewer.
        layout: where the text is, and how many tokens the video has.

    Returns:
        The tile, or 1 where the text may begin anywhere.
    """
    return tile if not layout.text_tokens or layout.video_tokens % tile == 0 else 1


def visible_keys(num: int, video_tokens: int, text_tokens: int, text_mask: Tensor | None, device) -> Tensor:
    """Keys that dense attention would see, per sample.

    Args:
        num: samples.
        video_tokens: video tokens, all seen.
        text_tokens: text tokens, padding included.
        text_mask: bool [num, text_tokens], True for prompt tokens, or None for all.
        device: where the result lives.

    Returns:
        int64 [num].
    """
    if text_mask is None:
        return torch.full((num,), video_tokens + text_tokens, device=device)
    return video_tokens + text_mask.sum(-1)
