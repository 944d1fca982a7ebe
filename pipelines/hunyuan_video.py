"""HunyuanVideo 1.0: joint attention over video then text, dual-stream blocks first, then single-stream blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svg.kernels import QuantizedRows

from .layouts import channels_first, patches
from .modules import Attention
from .parallel import JOINT_PLAN
from .processor import VideoAttnProcessor, apply_rope, both_streams, norm_and_rotate, project_qkv, register_skip
from .spec import LAST, ModelSpec


class HunyuanVideoSparseAttnProcessor(VideoAttnProcessor):
    """Joint attention of a HunyuanVideo block through `svg.attend`: text last, padding text masked per sample."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text, video = encoder_hidden_states.shape[1], hidden_states.shape[1]
        dual_stream = attn.add_q_proj is not None
        if not dual_stream:
            hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        q, k, v = self._qkv(attn, hidden_states, image_rotary_emb, video)
        if dual_stream:
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), _text_qkv(attn, encoder_hidden_states)))

        out = self.joint(q, k, v, self.mask_of_text(attention_mask, video), text)  # [B, video + text, H * D]
        hidden_states, encoder_hidden_states = out.split([video, text], dim=1)
        if getattr(attn, "to_out", None) is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states

    def single_stream(
        self,
        attn: Attention,
        both: Tensor | QuantizedRows,
        text: int,
        attention_mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The same for a block whose video and text are one sequence, as it is: [B, video + text, C] -> [B, ..., H * D]."""
        video = both.shape[1] - text
        q, k, v = self._qkv(attn, both, rotary, video)
        return self.joint(q, k, v, self.mask_of_text(attention_mask, video), text)

    def _qkv(
        self, attn: Attention, x: Tensor | QuantizedRows, rotary: tuple[Tensor, Tensor] | None, video: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected, normalised and, the first `video` tokens, rotated: three [B, S, H, D]."""
        q, k, v = project_qkv(attn, x, fused=False)
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
        if rotary is not None and self.fuses(q, attn.norm_q, attn.norm_k):
            return norm_and_rotate(q, attn.norm_q, *rotary), norm_and_rotate(k, attn.norm_k, *rotary), v
        q, k = _normalize(q, attn.norm_q), _normalize(k, attn.norm_k)
        if rotary is not None:
            q, k = self.rotate(q, rotary, video), self.rotate(k, rotary, video)
        return q, k, v

    def rotate(self, x: Tensor, rotary: tuple[Tensor, Tensor], video: int) -> Tensor:
        """RoPE on the first `video` of x's tokens."""
        cos, sin = (table.to(x.device)[None, :, None, :] for table in rotary)  # [1, video, 1, D]
        if x.shape[1] == video:
            return apply_rope(x, cos, sin)
        return torch.cat([apply_rope(x[:, :video], cos, sin), x[:, video:]], dim=1)

    def mask_of_text(self, attention_mask: Tensor | None, video: int) -> Tensor | None:
        """The block's mask as bool [B, text]."""
        if attention_mask is None:
            return None
        if attention_mask.dtype != torch.bool or attention_mask.ndim != 4 or attention_mask.shape[1:3] != (1, 1):
            raise NotImplementedError(
                f"attention_mask must be bool [B, 1, 1, N] in HunyuanVideo, got {attention_mask.dtype} "
                f"{tuple(attention_mask.shape)}; other masks are not supported, run this model without svg"
            )
        first = self.state.layout.video_tokens if self.parallel else video
        return attention_mask[:, 0, 0, first:]

    def joint(self, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, text: int) -> Tensor:
        """Attention over video and text, [B, S, H, D] -> [B, S, H * D]."""
        return self.attend(q, k, v, text_mask, text)


def _normalize(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)


def _text_qkv(attn: Attention, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))  # [B, text, H, D]
    return _normalize(q, attn.norm_added_q), _normalize(k, attn.norm_added_k), v


def attention_modules(transformer: Any) -> list[Attention]:
    """Dual-stream blocks, then single-stream blocks."""
    return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]


register_skip(HunyuanVideoSparseAttnProcessor, both_streams)

SPEC = ModelSpec(
    transformer="HunyuanVideoTransformer3DModel",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    arguments=("hidden_states", "timestep", "encoder_hidden_states"),
    attention_modules=attention_modules,
    processor=HunyuanVideoSparseAttnProcessor,
    replaces=("HunyuanVideoAttnProcessor2_0",),
    patch=patches,
    layout=channels_first("last"),
    parallel=True,
    cp_plan=JOINT_PLAN,
    kind=LAST,
    others=("HunyuanSkyreelsImageToVideoPipeline",),
    hub=("hunyuanvideo-community/HunyuanVideo", "hunyuanvideo-community/HunyuanVideo-I2V"),
)
