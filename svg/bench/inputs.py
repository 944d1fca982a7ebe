"""Queries, keys and values to benchmark with: recorded from tiny-wan, or synthetic with the structure of a video."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..engine.layout import TokenLayout

PROMPT = "a large red circle moving right over a navy and beige striped background, the camera is still"
STEPS = 8
JITTER = 0.05


@dataclass(frozen=True)
class Inputs:
    """Inputs of one attention call.

    Args:
        q, k, v: [B, S, H, D], after QK-norm and RoPE, contiguous as a transformer's projections leave them.
        layout: the video grid of the tokens.
        description: what the tokens are, for the report.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    description: str

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as views [B, H, S, D]."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        return q, k, v


@cache
def record(device: str, size: tuple[int, int, int] = (33, 256, 256)) -> tuple[dict[str, Tensor], TokenLayout]:
    """What the layers of the bundled tiny-wan attend with, halfway through a generation.

    Args:
        device: where to run, such as "cuda".
        size: frames, height and width of the video in pixels.

    Returns:
        {"q", "k", "v": float [layers * H, S, 64], the first layer left out} and the layout of the S tokens.
    """
    from svg.pipelines import GenerationRequest, accelerate, generate, load_pipeline
    from svg.pipelines.attach import attached

    from ..config import DenseConfig

    pipe = accelerate(load_pipeline("tiny-wan", device=device), DenseConfig())
    (hook,) = attached(pipe).values()
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for processor in hook.processors[1:]:
        _listen(processor, hook.state, seen)
    frames, height, width = size
    request = GenerationRequest(prompt=PROMPT, num_frames=frames, height=height, width=width, steps=STEPS)
    generate(pipe, request, on_step=lambda progress: None)
    parts = zip(*(seen[layer] for layer in sorted(seen)))
    return {name: torch.cat(part) for name, part in zip("qkv", parts)}, hook.state.layout


def _listen(processor, state, seen) -> None:
    inner = processor.attend

    def attend(q, k, v, text_mask=None):
        if state.step == STEPS // 2 and processor.layer not in seen:  # the first branch only
            seen[processor.layer] = tuple(x[0].transpose(0, 1).clone() for x in (q, k, v))  # [H, S, D]
        return inner(q, k, v, text_mask)

    processor.attend = attend


def recorded(layout: TokenLayout, heads: int, dim: int, device: str, dtype=torch.bfloat16, **options) -> Inputs:
    """tiny-wan's tokens, mirrored in time and space to fill a larger grid, each copy slightly perturbed.

    A head of dim 128 is two of tiny-wan's heads side by side, its logits their sum.

    Args:
        layout: the video grid wanted; text tokens, if any, are further copies of video tokens.
        heads: H.
        dim: 64 or 128.
        device: where the tensors live.
        dtype: their dtype.
        options: for `record`.

    Returns:
        Inputs of batch 1.
    """
    tokens, source = record(device, **options)
    index = _mirror(source, layout, device)
    generator = torch.Generator(device).manual_seed(0)
    together = dim // tokens["q"].shape[-1]
    out = {}
    for name, x in tokens.items():
        pick = torch.linspace(0, x.shape[0] // together - 1, heads).round().long().to(device)
        x = x.float().unflatten(0, (-1, together))[pick]  # [H, together, S0, 64]
        x = x.movedim(1, 2).flatten(2)[:, index]  # [H, S, D]
        # 1 / sqrt(dim) is smaller for the joined head: q makes up for it.
        x = x * together**0.5 if name == "q" else x
        noise = torch.randn(x.shape, generator=generator, device=device)
        out[name] = (x + JITTER * x.std() * noise).to(dtype).transpose(0, 1).contiguous()[None]
    size = f"{source.frames}x{source.height}x{source.width}"
    return Inputs(
        **out, layout=layout, description=f"tiny-wan, step {STEPS // 2} of {STEPS}, {size} tokens mirrored, 5 % noise"
    )


def _mirror(source: TokenLayout, wanted: TokenLayout, device: str) -> Tensor:
    axes = []
    for have, want in zip(
        (source.frames, source.height, source.width), (wanted.frames, wanted.height, wanted.width), strict=True
    ):
        place = torch.arange(want, device=device) % (2 * have)
        axes.append(torch.where(place < have, place, 2 * have - 1 - place))
    frame, row, column = torch.meshgrid(*axes, indexing="ij")
    video = ((frame * source.height + row) * source.width + column).flatten()
    index = video.new_zeros(wanted.total_tokens)
    index[wanted.video_slice] = video
    index[wanted.text_slice] = video[: wanted.text_tokens]
    return index


def synthetic(
    layout: TokenLayout, heads: int, dim: int, device: str, dtype=torch.bfloat16, objects: int = 40
) -> Inputs:
    """Tokens of moving objects: what a token is, where it is, and when, in every query and key.

    Each token belongs to the nearest of `objects` points that drift over time. Keys and queries add the object's
    direction, smooth waves of the position, and noise; heads weigh the three differently.

    Args:
        layout: the video grid, text (if any) unstructured.
        heads: H.
        dim: D.
        device: where the tensors live.
        dtype: their dtype.
        objects: number of moving points.

    Returns:
        Inputs of batch 1.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    place = _places(layout, device)  # [V, 3], in [0, 1]
    start, speed = torch.rand(2, objects, 2, generator=generator, device=device)
    object_of = _nearest(place, start, speed - 0.5)
    waves = (place @ (2 * torch.pi * normal(3, dim // 2))).repeat(1, 2)
    waves[:, dim // 2 :] += torch.pi / 2
    weight = torch.linspace(0.5, 1.5, heads, device=device)
    shape = (layout.total_tokens, heads, dim)
    q, k, v = normal(3, *shape).mul_(0.6).unbind(0)
    meaning = 1.1 * normal(objects, heads, dim)[object_of]
    position = waves.sin()[:, None, :]
    video = layout.video_slice
    for x in (q, k):
        x[video] += weight[:, None] * meaning + (2 - weight)[:, None] * position
    v[video] += meaning
    q, k, v = (x.to(dtype)[None] for x in (q, k, v))
    return Inputs(q, k, v, layout, f"synthetic: {objects} moving objects, position waves, noise")


def _places(layout: TokenLayout, device: str) -> Tensor:
    axes = [torch.linspace(0, 1, n, device=device) for n in (layout.frames, layout.height, layout.width)]
    return torch.cartesian_prod(*axes).view(-1, 3)


def _nearest(place: Tensor, start: Tensor, speed: Tensor) -> Tensor:
    when = place[:, :1, None]  # [V, 1, 1]
    centre = start + when * speed  # [V, objects, 2]
    return (place[:, None, 1:] - centre).square().sum(-1).argmin(-1)
