"""A tiny random transformer of every supported class."""

from types import SimpleNamespace

import diffusers
from tiny_inputs import (
    TEXT,
    allegro_inputs,
    animate_inputs,
    anyflow_inputs,
    consisid_inputs,
    cosmos3_inputs,
    cosmos_2_5_inputs,
    cosmos_inputs,
    easyanimate_inputs,
    framepack_inputs,
    helios_inputs,
    hunyuan15_inputs,
    hunyuan_inputs,
    kandinsky5_inputs,
    kandinsky6_inputs,
    ltx2_inputs,
    ltx_inputs,
    minimax_inputs,
    mochi_inputs,
    motif_inputs,
    vace_inputs,
    wan_inputs,
)

HEADS = dict(num_attention_heads=3, attention_head_dim=16)
LATENTS = HEADS | dict(in_channels=4, out_channels=4)
JOINT = LATENTS | dict(mlp_ratio=2.0, text_embed_dim=8, image_embed_dim=8, rope_axes_dim=(4, 6, 6))
KANDINSKY = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, model_dim=48, ff_dim=32,
    num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
)  # fmt: skip
WAN = LATENTS | dict(
    patch_size=(1, 2, 2), text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=256,
)  # fmt: skip


def family(kind, make, inputs, patch=(1, 2, 2), text_tokens=0, position="none", batch=2):
    return SimpleNamespace(
        kind=kind, make=lambda **changes: getattr(diffusers, kind)(**{**make, **changes}), inputs=inputs, patch=patch,
        text_tokens=text_tokens, position=position, batch=batch,
    )  # fmt: skip


HUNYUAN = LATENTS | dict(
    num_layers=1, num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=8,
    pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
LTX2 = LATENTS | dict(
    cross_attention_dim=48, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=3,
    audio_attention_head_dim=8, audio_cross_attention_dim=24, num_layers=2, caption_channels=8,
)  # fmt: skip
COSMOS = LATENTS | dict(
    num_layers=2, mlp_ratio=2.0, text_embed_dim=8, adaln_lora_dim=4, max_size=(8, 32, 32),
)  # fmt: skip

FAMILIES = {
    "wan": family("WanTransformer3DModel", WAN, wan_inputs),
    "wan_vace": family("WanVACETransformer3DModel", WAN | dict(vace_layers=[0], vace_in_channels=6), vace_inputs),
    "wan_animate": family(
        "WanAnimateTransformer3DModel",
        WAN
        | dict(
            in_channels=12,
            latent_channels=4,
            image_dim=8,
            added_kv_proj_dim=48,
            motion_encoder_size=16,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=1,
            inject_face_latents_blocks=2,
        ),
        animate_inputs,
        batch=1,
    ),
    "chronoedit": family("ChronoEditTransformer3DModel", WAN, wan_inputs),
    "skyreels_v2": family("SkyReelsV2Transformer3DModel", WAN, wan_inputs),
    "anyflow": family("AnyFlowTransformer3DModel", WAN, anyflow_inputs),
    "hunyuan_video": family(
        "HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_inputs, text_tokens=TEXT, position="last"
    ),
    "framepack": family(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | dict(has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True),
        framepack_inputs,
        text_tokens=None,
        position="last",
    ),
    "hunyuan_video_1_5": family(
        "HunyuanVideo15Transformer3DModel",
        JOINT | dict(num_layers=2, num_refiner_layers=1, patch_size=1, text_embed_2_dim=8),
        hunyuan15_inputs,
        patch=(1, 1, 1),
        text_tokens=TEXT + 4 + 3,
        position="last",
    ),
    "motif": family(
        "MotifVideoTransformer3DModel",
        JOINT | dict(num_layers=1, num_single_layers=2, num_decoder_layers=1),
        motif_inputs,
        text_tokens=None,
        position="last",
    ),
    "mochi": family(
        "MochiTransformer3DModel",
        HEADS
        | dict(
            num_layers=2,
            pooled_projection_dim=8,
            in_channels=4,
            text_embed_dim=8,
            time_embed_dim=8,
            max_sequence_length=TEXT,
        ),
        mochi_inputs,
        text_tokens=TEXT,
        position="last",
    ),
    "consisid": family(
        "ConsisIDTransformer3DModel",
        LATENTS
        | dict(
            time_embed_dim=8,
            text_embed_dim=8,
            num_layers=2,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
        ),
        consisid_inputs,
        text_tokens=TEXT,
        position="first",
    ),
    "easyanimate": family(
        "EasyAnimateTransformer3DModel",
        LATENTS | dict(patch_size=2, num_layers=2, mmdit_layers=1, time_embed_dim=8, text_embed_dim=8),
        easyanimate_inputs,
        text_tokens=TEXT,
        position="first",
    ),
    "ltx": family(
        "LTXVideoTransformer3DModel",
        LATENTS | dict(cross_attention_dim=48, num_layers=2, caption_channels=8),
        ltx_inputs,
        patch=(1, 1, 1),
    ),
    "ltx2": family("LTX2VideoTransformer3DModel", LTX2, ltx2_inputs, patch=(1, 1, 1)),
    "ltx2_3": family(
        "LTX2VideoTransformer3DModel",
        LTX2 | dict(gated_attn=True, audio_gated_attn=True, perturbed_attn=True, rope_type="split"),
        ltx2_inputs,
        patch=(1, 1, 1),
    ),
    "cosmos": family("CosmosTransformer3DModel", COSMOS, cosmos_inputs),
    "cosmos_2_5": family(
        "CosmosTransformer3DModel",
        COSMOS
        | dict(img_context_dim_in=12, img_context_num_tokens=4, img_context_dim_out=48, extra_pos_embed_type=None),
        cosmos_2_5_inputs,
    ),
    "cosmos3": family(
        "Cosmos3OmniTransformer",
        dict(
            head_dim=16,
            hidden_size=32,
            intermediate_size=32,
            latent_channel=4,
            latent_patch_size=2,
            num_attention_heads=6,
            num_hidden_layers=2,
            num_key_value_heads=2,
            patch_latent_dim=16,
            vocab_size=32,
            rope_axes_dim=(4, 2, 2),
            dtype="float32",
        ),
        cosmos3_inputs,
        text_tokens=TEXT,
        position="first",
        batch=1,
    ),
    "kandinsky5": family(
        "Kandinsky5Transformer3DModel",
        KANDINSKY,
        kandinsky5_inputs,
        batch=1,
    ),
    "kandinsky6": family(
        "Kandinsky6Transformer3DModel",
        KANDINSKY | dict(visual_cond=False, in_audio_dim=4, out_audio_dim=4),
        kandinsky6_inputs,
    ),
    "allegro": family(
        "AllegroTransformer3DModel",
        dict(
            num_attention_heads=3,
            attention_head_dim=36,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=108,
            caption_channels=8,
            sample_height=8,
            sample_width=8,
            sample_frames=5,
        ),
        allegro_inputs,
    ),
    "minimax_h3": family(
        "MiniMaxH3Transformer3DModel",
        HEADS
        | dict(
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=16,
            in_channels=4,
            audio_in_channels=4,
            text_dim=8,
            freq_dim=8,
            time_embed_hidden_dim=8,
            time_embed_dim=8,
            rope_freq_dim=2,
        ),
        minimax_inputs,
        text_tokens=TEXT + 6,
        position="first",
        batch=1,
    ),
    "helios": family(
        "HeliosTransformer3DModel",
        WAN | dict(rope_dim=(4, 6, 6)),
        helios_inputs,
        text_tokens=None,
        position="first",
    ),
}
FAMILIES["helios"].make = lambda **changes: diffusers.HeliosTransformer3DModel(
    **{key: value for key, value in WAN.items() if key != "rope_max_seq_len"}, rope_dim=(4, 6, 6), is_amplify_history=True,
    **changes,
)  # fmt: skip
