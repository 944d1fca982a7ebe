"""Wan 2.1 and 2.2: video self-attention `attn1`, text in cross-attention `attn2`, no mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layouts import channels_first, patches
from .modules import Attention
from .processor import VideoAttnProcessor, apply_rope, norm_and_rotate, project_qkv, refuse_mask, register_skip
from .spec import ModelSpec

WAN_PROCESSORS = ("WanAttnProcessor", "WanAttnProcessor2_0")


class WanSparseAttnProcessor(VideoAttnProcessor):
    """Self-attention of a Wan block through `svg.attend`; RMSNorm runs across heads, before the head split."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        refuse_mask(attention_mask, "Wan")
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states must be None in Wan self-attention; only attn1 may be replaced")
        q, k, v = project_qkv(attn, hidden_states, attn.fused_projections)  # [B, S, H * D]
        if rotary_emb is not None and self.fuses(q, attn.norm_q, attn.norm_k):
            q = norm_and_rotate(q.unsqueeze(2), attn.norm_q, *rotary_emb).flatten(2)
            k = norm_and_rotate(k.unsqueeze(2), attn.norm_k, *rotary_emb).flatten(2)
            rotary_emb = None
        else:
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S, H, D]
        if rotary_emb is not None:
            q, k = apply_rope(q, *rotary_emb), apply_rope(k, *rotary_emb)
        out = self.attend(q, k, v)  # [B, S, H * D]
        return attn.to_out[1](attn.to_out[0](out))


def _attention_modules(transformer: Any) -> list[Attention]:
    return [block.attn1 for block in transformer.blocks]


register_skip(WanSparseAttnProcessor, lambda module, hidden_states, *args, **kwargs: hidden_states)

SPEC = ModelSpec(
    transformer="WanTransformer3DModel",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    arguments=("hidden_states", "timestep", "encoder_hidden_states"),
    attention_modules=_attention_modules,
    processor=WanSparseAttnProcessor,
    replaces=WAN_PROCESSORS,
    patch=patches,
    layout=channels_first(),
    parallel=True,
    others=("WanVideoToVideoPipeline", "LucyEditPipeline", "WanModularPipeline", "Wan22ModularPipeline"),
    hub=(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    ),
    fp32_components=("vae", "image_encoder"),
)
