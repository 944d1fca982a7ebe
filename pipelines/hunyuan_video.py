"""HunyuanVideo 1.0: joint attention over video then text, dual-stream blocks first, then single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svg.engine.layout import TokenLayout

from .processor import VideoAttnProcessor, apply_rope, norm_and_rotate, project_qkv, register_skip
from .spec import ModelSpec


class HunyuanVideoSparseAttnProcessor(VideoAttnProcessor):
    """Joint attention of a HunyuanVideo block through `svg.attend`: text last, padding text masked per sample."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        video = hidden_states.shape[1]
        dual_stream = attn.add_q_proj is not None
        if not dual_stream:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)

        q, k, v = project_qkv(attn, hidden_states, fused=False)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, S or video, H, D]
        if self.fused and image_rotary_emb is not None and attn.norm_q is not None:
            q, k = (norm_and_rotate(x, norm, *image_rotary_emb) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
            image_rotary_emb = None
        else:
            q, k = _normalise(q, attn.norm_q), _normalise(k, attn.norm_k)
        if image_rotary_emb is not None:
            q, k = _rotate_video(q, image_rotary_emb, video), _rotate_video(k, image_rotary_emb, video)
        if dual_stream:
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), _text_qkv(attn, encoder_hidden_states)))

        out = self.attend(q, k, v, _text_mask(attention_mask, video))  # [B, video + text, H * D]
        hidden_states, encoder_hidden_states = out.split([video, text], dim=1)
        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


def _normalise(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)


def _rotate_video(x: Tensor, rotary: tuple[Tensor, Tensor], video: int) -> Tensor:
    cos, sin = (table.to(x.device)[None, :, None, :] for table in rotary)  # [1, video, 1, D]
    if x.shape[1] == video:
        return apply_rope(x, cos, sin)
    return torch.cat([apply_rope(x[:, :video], cos, sin), x[:, video:]], dim=1)


def _text_qkv(attn: nn.Module, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, text, H, D]
    return _normalise(q, attn.norm_added_q), _normalise(k, attn.norm_added_k), v


def _text_mask(attention_mask: Tensor | None, video: int) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.bool or attention_mask.ndim != 4 or attention_mask.shape[1:3] != (1, 1):
        raise NotImplementedError(
            f"attention_mask must be bool [B, 1, 1, N] in HunyuanVideo, got {attention_mask.dtype} "
            f"{tuple(attention_mask.shape)}; other masks are not supported, run this model without svg"
        )
    return attention_mask[:, 0, 0, video:]  # [B, text]


def _patch(config: Any) -> tuple[int, int, int]:
    return config.patch_size_t, config.patch_size, config.patch_size


def _layout(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    latents = inputs["hidden_states"].shape[2:]  # [B, C, F, H, W]
    grid = (size // patch for size, patch in zip(latents, _patch(config)))
    return TokenLayout(*grid, inputs["encoder_hidden_states"].shape[1], "last")


def _attention_modules(transformer: nn.Module) -> list[nn.Module]:
    return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]


def _skipped(module, hidden_states, encoder_hidden_states, *args, **kwargs):
    return hidden_states, encoder_hidden_states


register_skip(HunyuanVideoSparseAttnProcessor, _skipped)

SPEC = ModelSpec(
    transformer="HunyuanVideoTransformer3DModel",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    arguments=("hidden_states", "timestep", "encoder_hidden_states"),
    attention_modules=_attention_modules,
    processor=HunyuanVideoSparseAttnProcessor,
    replaces=("HunyuanVideoAttnProcessor2_0",),
    patch=_patch,
    layout=_layout,
)
