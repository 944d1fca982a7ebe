"""Families whose video attends to itself alone: text, audio and images come in by cross-attention, which stays theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models._modeling_parallel import ContextParallelInput

from svg.engine.layout import TokenLayout

from .layouts import channels_first, channels_last, frames_first, grid
from .modules import Attention
from .spec import ModelSpec
from .wan import WAN_PROCESSORS, WanSparseAttnProcessor


def _of_blocks(transformer: Any) -> list[Attention]:
    return [block.attn1 for block in transformer.blocks]


def _of_transformer_blocks(transformer: Any) -> list[Attention]:
    return [block.attn1 for block in transformer.transformer_blocks]


def _of_both_stacks(transformer: Any) -> list[Attention]:
    return [block.attn1 for block in (*transformer.blocks, *transformer.vace_blocks)]


def _of_visual_blocks(transformer: Any) -> list[Attention]:
    return [block.self_attention for block in transformer.visual_transformer_blocks]


def _of_video_decoders(transformer: Any) -> list[Attention]:
    return [block.video_dec_block.self_attention for block in transformer.visual_transformer_blocks]


def _packed_latents(position: str):
    """Layout of latents [B, S, C] with `num_frames`, `height` and `width`; conditions, if any, are at `position`."""
    return _PackedLatents(position)


class _PackedLatents:
    def __init__(self, position: str):
        self.position = position

    def __call__(self, config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
        names = ("num_frames", "height", "width")
        if any(inputs.get(name) is None for name in names):
            raise ValueError(
                "num_frames, height and width must be given to the transformer's forward, got none: a packed sequence does "
                "not tell its grid"
            )
        sizes = grid(tuple(inputs[name] for name in names), (config.patch_size_t, config.patch_size, config.patch_size))
        rest = inputs["hidden_states"].shape[1] - sizes[0] * sizes[1] * sizes[2]
        return TokenLayout(*sizes, *((rest, self.position) if rest else (0, "none")))


def _ltx2_plan(transformer: Any) -> dict[str, Any]:
    """Diffusers' plan, which leaves the angles of audio-to-video attention whole, and expects one kind of angles."""
    dims, split = (4, 2) if transformer.config.rope_type == "split" else (3, 1)
    angles = ContextParallelInput(split_dim=split, expected_dims=dims, split_output=True)
    return {**transformer._cp_plan, "rope": {0: angles, 1: angles}, "cross_attn_rope": {0: angles, 1: angles}}


SPECS = (
    ModelSpec(
        transformer="WanVACETransformer3DModel",
        attention_modules=_of_both_stacks,
        processor=WanSparseAttnProcessor,
        replaces=WAN_PROCESSORS,
        layout=channels_first(),
        others=("WanVACEPipeline",),
        hub=("Wan-AI/Wan2.1-VACE-14B-diffusers", "Wan-AI/Wan2.1-VACE-1.3B-diffusers"),
    ),
    ModelSpec(
        transformer="WanAnimateTransformer3DModel",
        attention_modules=_of_blocks,
        replaces=WAN_PROCESSORS,
        layout=channels_first(),
        others=("WanAnimatePipeline",),
        hub=("Wan-AI/Wan2.2-Animate-14B-Diffusers",),
    ),
    ModelSpec(
        transformer="ChronoEditTransformer3DModel",
        attention_modules=_of_blocks,
        replaces=WAN_PROCESSORS,
        layout=channels_first(),
        parallel=True,
        others=("ChronoEditPipeline",),
        hub=("nvidia/ChronoEdit-14B-Diffusers",),
    ),
    ModelSpec(
        transformer="SkyReelsV2Transformer3DModel",
        attention_modules=_of_blocks,
        replaces=("SkyReelsV2AttnProcessor", "SkyReelsV2AttnProcessor2_0"),
        layout=channels_first(),
        others=(
            "SkyReelsV2Pipeline",
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        hub=("Skywork/SkyReels-V2-T2V-14B-720P-Diffusers",),
    ),
    ModelSpec(
        transformer="AnyFlowTransformer3DModel",
        attention_modules=_of_blocks,
        replaces=("AnyFlowAttnProcessor",),
        layout=frames_first(),
        arguments=("hidden_states", "timestep"),
        others=("AnyFlowPipeline",),
        hub=("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",),
    ),
    ModelSpec(
        transformer="LTXVideoTransformer3DModel",
        attention_modules=_of_transformer_blocks,
        replaces=("LTXVideoAttnProcessor", "LTXVideoAttentionProcessor2_0"),
        layout=_packed_latents("first"),
        arguments=(
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "encoder_attention_mask",
            "num_frames",
            "height",
            "width",
        ),
        parallel=True,
        guidance_in_batch=True,
        others=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline"),
        hub=("Lightricks/LTX-Video",),
    ),
    ModelSpec(
        transformer="LTX2VideoTransformer3DModel",
        attention_modules=_of_transformer_blocks,
        replaces=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
        layout=_packed_latents("last"),
        arguments=(
            "hidden_states",
            "audio_hidden_states",
            "encoder_hidden_states",
            "audio_encoder_hidden_states",
            "timestep",
            "audio_timestep",
            "sigma",
            "audio_sigma",
            "encoder_attention_mask",
            "audio_encoder_attention_mask",
            "num_frames",
            "height",
            "width",
        ),
        parallel=True,
        cp_plan=_ltx2_plan,
        guidance_in_batch=True,
        others=("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline", "LTX25ModularPipeline"),
        hub=("Lightricks/LTX-2", "diffusers/LTX-2.3-Diffusers", "Lightricks/LTX-2.5-Diffusers"),
    ),
    ModelSpec(
        transformer="CosmosTransformer3DModel",
        attention_modules=_of_transformer_blocks,
        replaces=("CosmosAttnProcessor2_0", "CosmosAttnProcessor2_5"),
        layout=channels_first(),
        others=(
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
        ),
        hub=("nvidia/Cosmos-1.0-Diffusion-7B-Text2World", "nvidia/Cosmos-Predict2.5-2B"),
    ),
    ModelSpec(
        transformer="Kandinsky5Transformer3DModel",
        attention_modules=_of_visual_blocks,
        replaces=("Kandinsky5AttnProcessor",),
        layout=channels_last(),
        arguments=("hidden_states", "encoder_hidden_states", "timestep"),
        others=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline"),
        hub=("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",),
    ),
    ModelSpec(
        transformer="Kandinsky6Transformer3DModel",
        attention_modules=_of_video_decoders,
        replaces=("Kandinsky6AttnProcessor",),
        layout=channels_last(),
        arguments=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        others=("Kandinsky6TI2VAPipeline",),
        hub=("kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",),
    ),
    ModelSpec(
        transformer="AllegroTransformer3DModel",
        attention_modules=_of_transformer_blocks,
        replaces=("AllegroAttnProcessor2_0",),
        layout=channels_first(),
        arguments=("hidden_states", "encoder_hidden_states", "timestep"),
        guidance_in_batch=True,
        others=("AllegroPipeline",),
        hub=("rhymes-ai/Allegro",),
    ),
)
