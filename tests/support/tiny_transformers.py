"""A tiny random transformer of every supported class, and inputs of its forward for a latent video of any size."""

from types import SimpleNamespace

import diffusers
import torch

TEXT = 7
WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
    freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=256,
)  # fmt: skip


def text(batch, dim=8, tokens=TEXT):
    return torch.randn(batch, tokens, dim)


def time(batch, value=500.0):
    return torch.full((batch,), value)


def wan_inputs(batch, f, h, w, channels=4):
    return dict(
        hidden_states=torch.randn(batch, channels, f, h, w), timestep=time(batch), encoder_hidden_states=text(batch)
    )


def vace_inputs(batch, f, h, w):
    return wan_inputs(batch, f, h, w) | dict(
        control_hidden_states=torch.randn(batch, 6, f, h, w), control_hidden_states_scale=torch.ones(1)
    )


def animate_inputs(batch, f, h, w):
    return wan_inputs(batch, f, h, w, channels=12) | dict(
        encoder_hidden_states_image=torch.randn(batch, 5, 8),
        pose_hidden_states=torch.randn(batch, 4, f - 1, h, w),
        face_pixel_values=torch.rand(batch, 3, 4 * (f - 2) + 1, 16, 16),
    )


def anyflow_inputs(batch, f, h, w):
    return dict(
        hidden_states=torch.randn(batch, f, 4, h, w), timestep=torch.full((batch, f), 500.0),
        r_timestep=torch.full((batch, f), 400.0), encoder_hidden_states=text(batch),
    )  # fmt: skip


def ltx_inputs(batch, f, h, w):
    return dict(
        hidden_states=torch.randn(batch, f * h * w, 4), encoder_hidden_states=text(batch), timestep=time(batch),
        encoder_attention_mask=torch.ones(batch, TEXT), num_frames=f, height=h, width=w,
    )  # fmt: skip


def ltx2_inputs(batch, f, h, w):
    return dict(
        hidden_states=torch.randn(batch, f * h * w, 4), audio_hidden_states=torch.randn(batch, 5, 4),
        encoder_hidden_states=text(batch), audio_encoder_hidden_states=text(batch), timestep=time(batch),
        encoder_attention_mask=torch.ones(batch, TEXT), audio_encoder_attention_mask=torch.ones(batch, TEXT),
        num_frames=f, height=h, width=w, audio_num_frames=5,
    )  # fmt: skip


def cosmos_inputs(batch, f, h, w):
    return dict(
        hidden_states=torch.randn(batch, 4, f, h, w), timestep=time(batch, 0.5), encoder_hidden_states=text(batch),
        fps=24, padding_mask=torch.zeros(1, 1, 8 * h, 8 * w),
    )  # fmt: skip


def cosmos_2_5_inputs(batch, f, h, w):
    return cosmos_inputs(batch, f, h, w) | dict(encoder_hidden_states=(text(batch), text(batch, 12, 4)))


def kandinsky5_inputs(batch, f, h, w):
    return dict(
        hidden_states=torch.randn(batch, f, h, w, 4), encoder_hidden_states=text(batch), timestep=time(batch),
        pooled_projections=torch.randn(batch, 8), visual_rope_pos=[torch.arange(n) for n in (f, h // 2, w // 2)],
        text_rope_pos=torch.arange(TEXT),
    )  # fmt: skip


def kandinsky6_inputs(batch, f, h, w):
    return dict(
        hidden_states=torch.randn(batch, f, h, w, 4), encoder_hidden_states=text(batch),
        pooled_projections=torch.randn(batch, 8), timestep=time(batch), audio_hidden_states=torch.randn(batch, 6, 4),
    )  # fmt: skip


def allegro_inputs(batch, f, h, w):
    grid = [torch.arange(n) for n in (f, h // 2, w // 2)]
    places = torch.cartesian_prod(*grid).T[:, None]  # [3, 1, tokens]
    angles = [torch.randn(n, 12) for n in (f, h // 2, w // 2)]
    return dict(
        hidden_states=torch.randn(batch, 4, f, h, w), encoder_hidden_states=text(batch), timestep=time(batch),
        encoder_attention_mask=torch.ones(batch, TEXT),
        image_rotary_emb=(tuple((a.cos(), a.sin()) for a in angles), tuple(places)),
    )  # fmt: skip


def minimax_inputs(batch, f, h, w):
    from diffusers.modular_pipelines.minimax_h3 import before_denoise

    step = next(x for x in vars(before_denoise).values() if hasattr(x, "build_packed_sequence"))
    audio = 3
    positions, tags, video, sound, words, _, _ = step.build_packed_sequence(
        torch.ones(TEXT, dtype=torch.long), f, h, w, audio, (1, 2, 2), audio_channels=2, audio_tag=2, video_tag=0
    )
    return dict(
        hidden_states=torch.randn(batch, len(video), 16), audio_hidden_states=torch.randn(batch, len(sound), 4),
        encoder_hidden_states=text(batch), timestep=torch.tensor([0.0, 0.5]),
        timestep_indices=(torch.arange(len(tags)) >= TEXT).long(), token_tags=tags, position_ids=positions,
        video_indices=video, audio_indices=sound, text_indices=words,
    )  # fmt: skip


def cosmos3_inputs(batch, f, h, w):
    shape = (f, h // 2, w // 2)
    tokens = shape[0] * shape[1] * shape[2]
    total = TEXT + tokens
    return dict(
        input_ids=torch.arange(TEXT), text_indexes=torch.arange(TEXT), position_ids=torch.arange(total).expand(3, -1),
        und_len=TEXT, sequence_length=total, vision_tokens=[torch.randn(1, 4, f, h, w)], vision_token_shapes=[shape],
        vision_sequence_indexes=torch.arange(TEXT, total), vision_mse_loss_indexes=torch.arange(TEXT, total),
        vision_timesteps=torch.full((tokens,), 500.0), vision_noisy_frame_indexes=[torch.arange(f)],
    )  # fmt: skip


def helios_inputs(batch, f, h, w):
    return wan_inputs(batch, f, h, w) | dict(
        indices_hidden_states=torch.arange(19, 19 + f).expand(batch, -1),
        indices_latents_history_short=torch.arange(17, 19).expand(batch, -1),
        indices_latents_history_mid=torch.arange(16, 18).expand(batch, -1),
        indices_latents_history_long=torch.arange(16).expand(batch, -1),
        latents_history_short=torch.randn(batch, 4, 2, h, w),
        latents_history_mid=torch.randn(batch, 4, 2, h, w),
        latents_history_long=torch.randn(batch, 4, 16, h, w),
    )


def framepack_inputs(batch, f, h, w):
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[-1, 5:] = 0
    return dict(
        hidden_states=torch.randn(batch, 4, f, h, w), timestep=time(batch), encoder_hidden_states=text(batch),
        encoder_attention_mask=mask, pooled_projections=torch.randn(batch, 8), image_embeds=torch.randn(batch, 3, 8),
        indices_latents=torch.arange(19, 19 + f), guidance=time(batch, 6000.0),
        latents_clean=torch.randn(batch, 4, 2, h, w), indices_latents_clean=torch.arange(2),
        latents_history_2x=torch.randn(batch, 4, 2, h, w), indices_latents_history_2x=torch.arange(2, 4),
        latents_history_4x=torch.randn(batch, 4, 4, h, w), indices_latents_history_4x=torch.arange(4, 8),
    )  # fmt: skip


def hunyuan15_inputs(batch, f, h, w):
    masks = torch.ones(batch, TEXT, dtype=torch.long), torch.ones(batch, 4, dtype=torch.long)
    masks[0][0, 5:] = 0
    masks[1][-1, 1:] = 0
    return dict(
        hidden_states=torch.randn(batch, 4, f, h, w), timestep=time(batch), encoder_hidden_states=text(batch),
        encoder_attention_mask=masks[0], encoder_hidden_states_2=text(batch, 8, 4), encoder_attention_mask_2=masks[1],
        image_embeds=torch.zeros(batch, 3, 8),
    )  # fmt: skip


def motif_inputs(batch, f, h, w):
    mask = torch.ones(batch, TEXT)
    mask[0, 4:] = 0
    return wan_inputs(batch, f, h, w) | dict(encoder_attention_mask=mask, image_embeds=torch.randn(batch, 3, 8))


def mochi_inputs(batch, f, h, w):
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[0, 4:] = False
    return wan_inputs(batch, f, h, w) | dict(encoder_attention_mask=mask)


def consisid_inputs(batch, f, h, w):
    angles = torch.randn(f * (h // 2) * (w // 2), 8).repeat_interleave(2, dim=1)
    return dict(
        hidden_states=torch.randn(batch, f, 4, h, w), encoder_hidden_states=text(batch), timestep=time(batch),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )  # fmt: skip


def easyanimate_inputs(batch, f, h, w):
    return wan_inputs(batch, f, h, w)


def hunyuan_inputs(batch, f, h, w):
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[0, 4:] = 0
    return wan_inputs(batch, f, h, w) | dict(
        encoder_attention_mask=mask, pooled_projections=torch.randn(batch, 8), guidance=time(batch, 6000.0)
    )


def family(kind, make, inputs, patch=(1, 2, 2), text_tokens=0, position="none", batch=2):
    return SimpleNamespace(
        kind=kind, make=lambda **changes: getattr(diffusers, kind)(**{**make, **changes}), inputs=inputs, patch=patch,
        text_tokens=text_tokens, position=position, batch=batch,
    )  # fmt: skip


HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
LTX2 = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16, cross_attention_dim=48,
    audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=3, audio_attention_head_dim=8,
    audio_cross_attention_dim=24, num_layers=2, caption_channels=8,
)  # fmt: skip
COSMOS = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16, num_layers=2, mlp_ratio=2.0,
    text_embed_dim=8, adaln_lora_dim=4, max_size=(8, 32, 32),
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
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            text_embed_dim=8,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        hunyuan15_inputs,
        patch=(1, 1, 1),
        text_tokens=TEXT + 4 + 3,
        position="last",
    ),
    "motif": family(
        "MotifVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        motif_inputs,
        text_tokens=None,
        position="last",
    ),
    "mochi": family(
        "MochiTransformer3DModel",
        dict(
            num_attention_heads=3,
            attention_head_dim=16,
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
        dict(
            num_attention_heads=3,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
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
        dict(
            num_attention_heads=3,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=8,
        ),
        easyanimate_inputs,
        text_tokens=TEXT,
        position="first",
    ),
    "ltx": family(
        "LTXVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=16,
            cross_attention_dim=48,
            num_layers=2,
            caption_channels=8,
        ),
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
        dict(
            in_visual_dim=4,
            in_text_dim=8,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            model_dim=48,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        kandinsky5_inputs,
        batch=1,
    ),
    "kandinsky6": family(
        "Kandinsky6Transformer3DModel",
        dict(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=8,
            in_text_dim2=8,
            time_dim=16,
            model_dim=48,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            visual_cond=False,
            in_audio_dim=4,
            out_audio_dim=4,
        ),
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
        dict(
            num_attention_heads=3,
            attention_head_dim=16,
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
        WAN | dict(rope_dim=(4, 6, 6)) | {},
        helios_inputs,
        text_tokens=None,
        position="first",
    ),
}
FAMILIES["helios"].make = lambda **changes: diffusers.HeliosTransformer3DModel(
    **{key: value for key, value in WAN.items() if key != "rope_max_seq_len"}, rope_dim=(4, 6, 6), is_amplify_history=True,
    **changes,
)  # fmt: skip
