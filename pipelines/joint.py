"""Families whose text is in the sequence, besides HunyuanVideo and CogVideoX, whose files they lean on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import cogvideox
from .hunyuan_video import HunyuanVideoSparseAttnProcessor, attention_modules
from .layouts import channels_first, frames_first
from .modules import Attention
from .processor import apply_rope
from .spec import FIRST, LAST, ModelSpec
from .stock import StockAttnProcessor


class HunyuanVideo15SparseAttnProcessor(HunyuanVideoSparseAttnProcessor):
    """As HunyuanVideo's dual-stream blocks; its mask, [B, text], is never expanded to S x S."""

    def mask_of_text(self, attention_mask: Tensor | None, video: int) -> Tensor | None:
        return None if attention_mask is None else attention_mask.bool()


class MochiSparseAttnProcessor(HunyuanVideo15SparseAttnProcessor):
    """As HunyuanVideo's dual-stream blocks, with angles of each head's own; padding text is hidden, not cut out."""

    def fuses(self, x: Tensor, *norms: nn.Module | None) -> bool:
        return False

    def rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor], video: int) -> Tensor:
        return apply_rope(x, *(table.repeat_interleave(2, dim=-1) for table in rotary))  # [video, H, D / 2]


class MotifVideoSparseAttnProcessor(StockAttnProcessor):
    """Text last; its blocks that refine the video attend to a second copy of it, which counts as text."""

    def text_mask(self, attn_mask: Tensor | None) -> Tensor | None:
        return None if attn_mask is None else attn_mask[:, 0, 0, self.state.layout.video_tokens :]


def _dual_blocks(transformer: Any) -> list[Attention]:
    return [block.attn for block in transformer.transformer_blocks]


def _first_attention(transformer: Any) -> list[Attention]:
    return [block.attn1 for block in transformer.transformer_blocks]


SPECS = (
    ModelSpec(
        transformer="HunyuanVideo15Transformer3DModel",
        attention_modules=_dual_blocks,
        processor=HunyuanVideo15SparseAttnProcessor,
        replaces=("HunyuanVideo15AttnProcessor2_0",),
        layout=channels_first("last"),
        kind=LAST,
        others=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
        hub=("hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v", "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v"),
    ),
    ModelSpec(
        transformer="MotifVideoTransformer3DModel",
        attention_modules=attention_modules,
        processor=MotifVideoSparseAttnProcessor.stand_for,
        replaces=("MotifVideoAttnProcessor2_0",),
        layout=channels_first("last"),
        kind=LAST,
        others=("MotifVideoPipeline", "MotifVideoImage2VideoPipeline"),
        hub=("Motif-Technologies/Motif-Video-2B",),
    ),
    ModelSpec(
        transformer="MochiTransformer3DModel",
        attention_modules=_first_attention,
        processor=MochiSparseAttnProcessor,
        replaces=("MochiAttnProcessor2_0",),
        layout=channels_first("last"),
        arguments=("hidden_states", "encoder_hidden_states", "timestep"),
        kind=LAST,
        guidance_in_batch=True,
        others=("MochiPipeline",),
        hub=("genmo/mochi-1-preview",),
    ),
    ModelSpec(
        transformer="ConsisIDTransformer3DModel",
        attention_modules=_first_attention,
        processor=cogvideox.CogVideoXSparseAttnProcessor,
        replaces=cogvideox.SPEC.replaces,
        layout=frames_first("first"),
        arguments=("hidden_states", "encoder_hidden_states", "timestep"),
        kind=FIRST,
        guidance_in_batch=True,
        others=("ConsisIDPipeline",),
        hub=("BestWishYsh/ConsisID-preview",),
    ),
    ModelSpec(
        transformer="EasyAnimateTransformer3DModel",
        attention_modules=_first_attention,
        replaces=("EasyAnimateAttnProcessor2_0",),
        layout=channels_first("first"),
        arguments=("hidden_states", "timestep", "timestep_cond", "encoder_hidden_states"),
        kind=FIRST,
        guidance_in_batch=True,
        others=("EasyAnimatePipeline", "EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline"),
        hub=("alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",),
    ),
)
