"""Full-width transformers of a few layers with random weights, and inputs whose tokens have the structure of a video.

A `Stack` is one of Diffusers' own classes with the shapes of its published weights, but for the number of layers; its narrow
version, of a few heads, is for checks. Random weights give latents no structure, so what the first block sees is
replaced: hidden states of moving objects (`svg.bench.inputs.synthetic`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd, prod
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import svg
from svg.bench.layers import structured_hidden_states
from svg.engine.layout import TokenLayout

PATCH = 2  # of all families but those that say 1


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One family.

    Args:
        kind: the transformer's class.
        grid: video tokens along (time, height, width) at the family's default size.
        config: what its published weights change in the class' default shapes, layers apart.
        layers: the settings that hold the number of layers, and how many.
        narrow: (heads, head dim) -> what a narrow version changes.
        width: of its hidden states.
        inputs: (config, grid, most text tokens) -> arguments of its forward, in fp32.
        embed: the module whose output is replaced by hidden states with structure.
        size: what the grid is of, in words.
        timestep_as_latents: whether its pipeline gives the timestep in the latents' dtype.
    """

    kind: str
    grid: tuple[int, int, int]
    config: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, int]
    narrow: Callable[[int, int], dict[str, Any]]
    width: Callable[[Any], int] = lambda config: config.num_attention_heads * config.attention_head_dim
    inputs: Callable[[Any, tuple[int, int, int], int], dict[str, Any]]
    embed: str
    size: str
    timestep_as_latents: bool = False

    def make(self, device: str, dtype: torch.dtype, heads: int | None = None, dim: int = 128) -> nn.Module:
        """The transformer with random weights of seed 0, at full width or with a few heads."""
        changes = self.narrow(heads, dim) if heads else {}
        torch.manual_seed(0)
        with torch.device(device):
            transformer = getattr(diffusers, self.kind)(**{**self.config, **self.layers, **changes})
        kept = transformer._keep_in_fp32_modules or ()
        for name, parameter in transformer.named_parameters():
            if not any(part in name for part in kept):
                parameter.data = parameter.data.to(dtype)
        return transformer.eval().requires_grad_(False)

    def arguments(self, transformer: nn.Module, grid: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict:
        """What its forward takes for a grid, seed 0; from then on its embedding gives hidden states with structure."""
        config = transformer.config
        torch.manual_seed(1)
        with torch.device(device):
            given = self.inputs(config, grid, prod(grid) // 12)
        width, layout = self.width(config), TokenLayout(*grid)
        dim = gcd(width, 64)
        hidden = structured_hidden_states(layout, width // dim, dim, device, dtype)  # [1, V, width]
        transformer.get_submodule(self.embed).register_forward_hook(lambda module, args, out: _in_shape(hidden, out))
        found = {name: _cast(value, dtype) for name, value in given.items()}
        return found | ({"timestep": found["timestep"].to(dtype)} if self.timestep_as_latents else {})


def forward(transformer: nn.Module, arguments: dict[str, Any], step: int = 0, steps: int = 1) -> Tensor:
    """The video output of one forward, in a step of a run."""
    with torch.no_grad(), svg.at_step(transformer, step, steps):
        return transformer(**arguments, return_dict=False)[0]


def _in_shape(hidden: Tensor, out: Tensor) -> Tensor:
    """Hidden states [1, V, C] as an embedding gives them: rows, [B, T, H, W, C], or a convolution's [B, C, T, H, W]."""
    if out.ndim == 5 and out.shape[1] == hidden.shape[2]:
        hidden = hidden.mT
    return hidden.reshape(out.shape).to(out.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    floating = isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim > 1
    return value.to(dtype) if floating else value


def _wan(config: Any, grid: tuple[int, int, int], most: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(1, config.in_channels, frames, PATCH * height, PATCH * width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim),
    }


def _hunyuan(config: Any, grid: tuple[int, int, int], most: int) -> dict[str, Any]:
    frames, height, width = grid
    text = min(256, most)
    return {
        "hidden_states": torch.randn(1, config.in_channels, frames, PATCH * height, PATCH * width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.long),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0]),
    }


def _hunyuan_1_5(config: Any, grid: tuple[int, int, int], most: int) -> dict[str, Any]:
    """Half of the first text's 1,000 tokens, all of the second's and of the picture's are padding, as for most prompts."""
    texts = [min(tokens, most) for tokens in (1000, 256, 729)]
    first, second = torch.ones(1, texts[0], dtype=torch.long), torch.zeros(1, texts[1], dtype=torch.long)
    first[:, texts[0] // 2 :] = 0
    return {
        "hidden_states": torch.randn(1, config.in_channels, *grid),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, texts[0], config.text_embed_dim),
        "encoder_attention_mask": first,
        "encoder_hidden_states_2": torch.randn(1, texts[1], config.text_embed_2_dim),
        "encoder_attention_mask_2": second,
        "image_embeds": torch.zeros(1, texts[2], config.image_embed_dim),
    }


def _minimax(config: Any, grid: tuple[int, int, int], most: int) -> dict[str, Any]:
    from diffusers.modular_pipelines.minimax_h3 import before_denoise

    step = next(x for x in vars(before_denoise).values() if hasattr(x, "build_packed_sequence"))
    frames, height, width = grid
    text = min(256, most)
    audio = max(1, min(frames * 7 // 2, most))  # 40 a second, where a second of video has some 7 latent frames
    with torch.device("cpu"):
        positions, tags, video, sound, words, _, _ = step.build_packed_sequence(
            torch.ones(text, dtype=torch.long), frames, PATCH * height, PATCH * width, audio, config.patch_size,
            audio_channels=2, audio_tag=2, video_tag=0,
        )  # fmt: skip
    indices = {"token_tags": tags, "position_ids": positions, "video_indices": video, "audio_indices": sound}
    indices |= {"text_indices": words, "timestep_indices": (torch.arange(len(tags), device="cpu") >= text).long()}
    here = torch.empty(0).device
    return {
        "hidden_states": torch.randn(1, len(video), config.in_channels * PATCH * PATCH),
        "audio_hidden_states": torch.randn(1, len(sound), config.audio_in_channels),
        "encoder_hidden_states": torch.randn(1, text, config.text_dim),
        "timestep": torch.tensor([0.0, 0.5]),
        **{name: value.to(here) for name, value in indices.items()},
    }


def _ltx2(config: Any, grid: tuple[int, int, int], most: int) -> dict[str, Any]:
    frames, height, width = grid
    audio = 8 * frames
    return {
        "hidden_states": torch.randn(1, frames * height * width, config.in_channels),
        "audio_hidden_states": torch.randn(1, audio, config.audio_in_channels),
        "encoder_hidden_states": torch.randn(1, 1024, config.caption_channels),
        "audio_encoder_hidden_states": torch.randn(1, 1024, config.caption_channels),
        "timestep": torch.tensor([500.0]),
        "sigma": torch.tensor([0.5]),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": audio,
    }


def _cosmos(config: Any, grid: tuple[int, int, int], most: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(1, config.in_channels - 1, frames, PATCH * height, PATCH * width),
        "condition_mask": torch.zeros(1, 1, frames, PATCH * height, PATCH * width),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 512, config.crossattn_proj_in_channels),
        "fps": 16,
        "padding_mask": torch.zeros(1, 1, 16 * height, 16 * width),
    }


def _heads(heads: int, dim: int) -> dict[str, Any]:
    return {"num_attention_heads": heads, "attention_head_dim": dim}


def _rope(heads: int, dim: int) -> dict[str, Any]:
    third = 2 * (dim * 7 // 32)
    return {**_heads(heads, dim), "rope_axes_dim": (dim - 2 * third, third, third)}


STACKS = {
    "wan": Stack(
        kind="WanTransformer3DModel",
        grid=(21, 45, 80),
        layers={"num_layers": 2},
        narrow=lambda heads, dim: {**_heads(heads, dim), "ffn_dim": 4 * heads * dim, "text_dim": 128},
        inputs=_wan,
        embed="patch_embedding",
        size="Wan 2.1 14B and each of the two transformers of Wan 2.2 A14B, 81 frames of 720p",
    ),
    "hunyuan_video": Stack(
        kind="HunyuanVideoTransformer3DModel",
        grid=(33, 45, 80),
        layers={"num_layers": 1, "num_single_layers": 2},
        narrow=lambda heads, dim: {**_rope(heads, dim), "text_embed_dim": 128},
        inputs=_hunyuan,
        embed="x_embedder",
        size="HunyuanVideo, 129 frames of 720p, 256 text tokens; one dual-stream block, two single-stream",
    ),
    "minimax_h3": Stack(
        kind="MiniMaxH3Transformer3DModel",
        grid=(37, 24, 42),
        layers={"num_layers": 2, "num_refiner_layers": 1},
        narrow=lambda heads, dim: {
            **_heads(heads, dim), "hidden_size": heads * dim, "ffn_dim": 4 * heads * dim, "text_dim": 128,
            "time_embed_hidden_dim": 128, "time_embed_dim": 128, "rope_freq_dim": dim // 8,
        },
        width=lambda config: config.hidden_size,
        inputs=_minimax,
        embed="proj_in",
        size="MiniMax-H3, 124 frames of 768 x 1344, 256 text tokens, audio",
    ),
    "ltx2_3": Stack(
        kind="LTX2VideoTransformer3DModel",
        grid=(16, 32, 48),
        config={
            "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
            "perturbed_attn": True, "rope_type": "split",
        },
        layers={"num_layers": 2},
        narrow=lambda heads, dim: {
            **_heads(heads, dim), "cross_attention_dim": heads * dim, "audio_num_attention_heads": heads,
            "audio_attention_head_dim": dim // 2, "audio_cross_attention_dim": heads * dim // 2, "caption_channels": 128,
        },
        inputs=_ltx2,
        embed="proj_in",
        size="LTX-2.3, 121 frames of 1024 x 1536, the second of its two stages; audio",
    ),
    "hunyuan_video_1_5": Stack(
        kind="HunyuanVideo15Transformer3DModel",
        grid=(31, 45, 80),
        config={"task_type": "t2v"},
        layers={"num_layers": 2},
        narrow=lambda heads, dim: {**_rope(heads, dim), "text_embed_dim": 128},
        inputs=_hunyuan_1_5,
        embed="x_embedder",
        size="HunyuanVideo-1.5, 121 frames of 720p, 500 of 1,985 text tokens seen",
        timestep_as_latents=True,
    ),
    "cosmos_2_5": Stack(
        kind="CosmosTransformer3DModel",
        grid=(24, 44, 80),
        config={
            "in_channels": 17, "num_attention_heads": 16, "rope_scale": (1.0, 3.0, 3.0), "extra_pos_embed_type": None,
            "use_crossattn_projection": True, "crossattn_proj_in_channels": 100352,
        },
        layers={"num_layers": 2},
        narrow=lambda heads, dim: {**_heads(heads, dim), "crossattn_proj_in_channels": 128},
        inputs=_cosmos,
        embed="patch_embed",
        size="Cosmos-Predict2.5 2B, 93 frames of 704 x 1280",
    ),
}  # fmt: skip
