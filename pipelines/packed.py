"""Families that pack more than one video into a sequence: references, history, audio and text before or beside it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from svg.engine.layout import TokenLayout

from .hunyuan_video import HunyuanVideoSparseAttnProcessor, attention_modules
from .layouts import channels_first
from .modules import Attention
from .spec import PACKED, ModelSpec
from .stock import StockAttnProcessor


class Cosmos3SparseAttnProcessor(StockAttnProcessor):
    """Generated tokens attend to text and themselves; the text, causal, to itself, as it is."""

    def dispatch(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        if options.get("is_causal"):
            return dispatch_attention_fn(q, k, v, attn_mask, **options)
        text = k.shape[1] - q.shape[1]
        q = torch.cat([q.new_zeros(q.shape[0], text, *q.shape[2:]), q], dim=1)  # rows of text that nobody reads
        return super().dispatch(q, k, v, attn_mask, **options)[:, text:]


class FramepackSparseAttnProcessor(HunyuanVideoSparseAttnProcessor):
    """Joint attention over history, video, text; run as video, text, history."""

    def mask_of_text(self, attention_mask: Tensor | None, video: int) -> Tensor | None:
        return None if attention_mask is None else attention_mask[:, 0, 0, video:]

    def joint(self, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, text: int) -> Tensor:
        video = self.state.layout.video_tokens
        history = q.shape[1] - text - video
        if text_mask is not None:
            text_mask = torch.cat([text_mask, text_mask.new_ones(text_mask.shape[0], history)], dim=1)
        q, k, v = (x.roll(-history, 1) for x in (q, k, v))
        return self.attend(q, k, v, text_mask).roll(history, 1)


class _Remembered:
    """A layout that is read from a tensor on the device, once for each tensor: a run keeps its tensor."""

    def __init__(self):
        self._tensor: Any = None
        self._layout: TokenLayout | None = None

    def __call__(self, config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
        positions = inputs["position_ids"]
        layout = self._layout
        if layout is None or self._tensor() is not positions:
            layout = self._layout = _minimax_layout(positions, inputs["audio_indices"])
            self._tensor = weakref.ref(positions)
        return layout

    def __reduce__(self):
        return _Remembered, ()


def _minimax_layout(position_ids: Tensor, audio_indices: Tensor) -> TokenLayout:
    """The generated video is what follows the last audio row: frame by frame, each of height x width rows."""
    start = int(audio_indices.max()) + 1
    time, row, column = position_ids[start:].cpu().T  # [3, V]
    frames, height, width = (axis.unique().numel() for axis in (time, row, column))
    per_frame = height * width
    in_order = frames * per_frame == time.numel() and all(
        torch.equal(axis, axis[:per_frame].repeat(frames)) for axis in (row, column)
    )
    if not in_order or not torch.equal(time, time[::per_frame].repeat_interleave(per_frame)):
        raise NotImplementedError(
            f"the rows after the audio must be one video, frame by frame, got {time.numel()} rows over {frames} times, "
            f"{height} rows and {width} columns; run this model without svg"
        )
    return TokenLayout(frames, height, width, start, "first")


def _cosmos3_layout(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    shapes = inputs["vision_token_shapes"]
    if len(shapes) != 1 or inputs.get("sound_tokens") is not None or inputs.get("action_tokens") is not None:
        raise NotImplementedError(
            f"a Cosmos 3 sequence must hold one video and no sound or actions, got {len(shapes)} vision items; run it "
            f"without svg"
        )
    frames, height, width = shapes[0]
    return TokenLayout(frames, height, width, inputs["und_len"], "first")


def _minimax_modules(transformer: Any) -> list[Attention]:
    return [block.attn for block in transformer.transformer_blocks]


def _cosmos3_modules(transformer: Any) -> list[Attention]:
    return [layer.self_attn for layer in transformer.layers]


def _helios_modules(transformer: Any) -> list[Attention]:
    return [block.attn1 for block in transformer.blocks]


SPECS = (
    ModelSpec(
        transformer="MiniMaxH3Transformer3DModel",
        attention_modules=_minimax_modules,
        replaces=("MiniMaxH3AttnProcessor",),
        layout=_Remembered(),
        arguments=(
            "hidden_states",
            "audio_hidden_states",
            "encoder_hidden_states",
            "timestep",
            "timestep_indices",
            "token_tags",
            "position_ids",
            "video_indices",
            "audio_indices",
        ),
        parallel=True,
        kind=PACKED,
        others=("MiniMaxH3ModularPipeline",),
        hub=("MiniMaxAI/MiniMax-H3",),
    ),
    ModelSpec(
        transformer="Cosmos3OmniTransformer",
        attention_modules=_cosmos3_modules,
        processor=Cosmos3SparseAttnProcessor.stand_for,
        replaces=("Cosmos3AttnProcessor",),
        layout=_cosmos3_layout,
        arguments=(
            "input_ids",
            "text_indexes",
            "position_ids",
            "und_len",
            "sequence_length",
            "vision_tokens",
            "vision_token_shapes",
            "vision_sequence_indexes",
            "vision_mse_loss_indexes",
            "vision_timesteps",
        ),
        latents="vision_tokens",
        timestep="vision_timesteps",
        kind=PACKED,
        others=("Cosmos3OmniPipeline",),
        hub=("nvidia/Cosmos3-Super",),
    ),
    ModelSpec(
        transformer="HeliosTransformer3DModel",
        attention_modules=_helios_modules,
        replaces=("HeliosAttnProcessor",),
        layout=channels_first("first"),
        kind=PACKED,
        others=("HeliosPipeline",),
        hub=("BestWishYsh/Helios-Base",),
    ),
    ModelSpec(
        transformer="HunyuanVideoFramepackTransformer3DModel",
        attention_modules=attention_modules,
        processor=FramepackSparseAttnProcessor,
        replaces=("HunyuanVideoAttnProcessor2_0",),
        layout=channels_first("last"),
        kind=PACKED,
        others=("HunyuanVideoFramepackPipeline",),
        hub=("lllyasviel/FramePackI2V_HY",),
    ),
)
