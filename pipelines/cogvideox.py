"""CogVideoX 1.0 and 1.5: joint attention over text then video, guidance branches in one batch, no mask."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import FusedCogVideoXAttnProcessor2_0
from torch import Tensor

from svg.engine.state import RunState

from .layouts import frames_first, patches
from .modules import Attention
from .processor import (
    VideoAttnProcessor,
    apply_rope,
    both_streams,
    norm_and_rotate,
    project_qkv,
    refuse_mask,
    register_skip,
)
from .spec import FIRST, ModelSpec


class CogVideoXSparseAttnProcessor(VideoAttnProcessor):
    """Joint attention of a CogVideoX block through `svg.attend`: text first, RoPE (if any) on the video tokens only."""

    def __init__(self, original: Any, state: RunState, layer: int):
        super().__init__(original, state, layer)
        # Diffusers keeps `attn.fused_projections` set after unfusing this family, so the replaced processor says it.
        self.fused_projections = isinstance(original, FusedCogVideoXAttnProcessor2_0)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        refuse_mask(attention_mask, "CogVideoX")
        text, video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # [B, text + video, C]
        q, k, v = project_qkv(attn, joint, self.fused_projections)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S, H, D]
        if image_rotary_emb is not None and self.fuses(q, attn.norm_q, attn.norm_k):
            norms = (q, attn.norm_q), (k, attn.norm_k)
            q, k = (norm_and_rotate(x, norm, *image_rotary_emb, first=text) for x, norm in norms)
            image_rotary_emb = None
        elif attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = _rotate_video(q, image_rotary_emb, text), _rotate_video(k, image_rotary_emb, text)
        out = attn.to_out[1](attn.to_out[0](self.attend(q, k, v, text=text)))  # [B, S, C]
        encoder_hidden_states, hidden_states = out.split([text, video], dim=1)
        return hidden_states, encoder_hidden_states


def _rotate_video(x: Tensor, rotary: tuple[Tensor, Tensor], text: int) -> Tensor:
    cos, sin = (table.to(x.device)[None, :, None, :] for table in rotary)  # [1, video, 1, D]
    return torch.cat([x[:, :text], apply_rope(x[:, text:], cos, sin)], dim=1)


def _attention_modules(transformer: Any) -> list[Attention]:
    return [block.attn1 for block in transformer.transformer_blocks]


register_skip(CogVideoXSparseAttnProcessor, both_streams)

SPEC = ModelSpec(
    transformer="CogVideoXTransformer3DModel",
    pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    arguments=("hidden_states", "encoder_hidden_states", "timestep"),
    attention_modules=_attention_modules,
    processor=CogVideoXSparseAttnProcessor,
    replaces=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    patch=patches,
    layout=frames_first("first"),
    kind=FIRST,
    guidance_in_batch=True,
    others=("CogVideoXVideoToVideoPipeline", "CogVideoXFunControlPipeline"),
    hub=("zai-org/CogVideoX-2b", "zai-org/CogVideoX-5b", "zai-org/CogVideoX1.5-5B-I2V"),
)
