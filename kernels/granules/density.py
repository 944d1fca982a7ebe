"""What lists of granules compute, as a share of what dense attention would: one small launch, nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import target
from ..common.target import tl, triton
from .values import GranuleLists


def listed_density(lists: GranuleLists, prompt: Tensor | None, *, video: int, text: int, size: int) -> Tensor:
    """Computed share of every head's visible pairs: the granules listed, a mean for each other, and the text's rows.

    Args:
        lists: what each group of the video's query rows computes.
        prompt: int64 [B], text tokens that are no padding; None: all of them.
        video, text: tokens of the video and of the text.
        size: keys of a granule.

    Returns:
        fp32 [B, H].
    """
    op = _density if target.use_triton(lists.whole) else listed_density_reference
    return op(lists, prompt, video=video, text=text, size=size)


def listed_density_reference(lists: GranuleLists, prompt: Tensor | None, *, video: int, text: int, size: int) -> Tensor:
    """Specification of `listed_density` in plain torch; same arguments and result."""
    device, batch = lists.whole.device, lists.whole.shape[0]
    if prompt is None:
        prompt = torch.full((batch,), text, device=device)
    visible = (video + prompt)[:, None].double()  # [B, 1]
    partial = (prompt % size + video % size)[:, None, None]
    keys = (lists.whole * size + partial).double()  # [B, H, NG]
    keys = torch.where(keys == visible[..., None], keys, keys + -(-video // size))
    starts = torch.arange(0, video, lists.rows, device=device)
    rows = (video - starts).clamp_max(lists.rows).double()
    pairs = (keys * rows).sum(-1) + text * visible
    return (pairs / ((video + text) * visible)).float()


def _density(lists, prompt, *, video, text, size):
    B, H, NG = lists.whole.shape
    out = torch.empty(B, H, dtype=torch.float32, device=lists.whole.device)
    with target.on_device(out):
        _density_kernel[(B * H,)](lists.whole, prompt, out, H, NG, video, text, size, lists.rows, BLOCK=1024)
    return out


@triton.jit(do_not_specialize=["NG", "video", "text"])
def _density_kernel(whole, prompt, out, H, NG, video, text, size, rows, BLOCK: tl.constexpr):
    bh = tl.program_id(0).to(tl.int64)
    words = text
    if prompt is not None:
        words = tl.load(prompt + bh // H).to(tl.int32)
    visible = video + words
    partial = words % size + video % size
    means = (video + size - 1) // size
    pairs = tl.zeros([BLOCK], dtype=tl.int64)
    for first in range(0, NG, BLOCK):
        group = first + tl.arange(0, BLOCK)
        keys = tl.load(whole + bh * NG + group, mask=group < NG, other=0) * size + partial
        keys = tl.where(keys == visible, keys, keys + means)
        row = tl.minimum(tl.maximum(video - group * rows, 0), rows)
        pairs += tl.where(group < NG, keys.to(tl.int64) * row, 0)
    share = (tl.sum(pairs, 0) + text.to(tl.int64) * visible).to(tl.float64)
    tl.store(out + bh, (share / ((video + text).to(tl.int64) * visible).to(tl.float64)).to(tl.float32))
