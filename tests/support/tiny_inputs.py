"""Inputs of a forward of every supported class, for a latent video of any size."""

import torch

TEXT = 7


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
