"""Random pipelines of a few hundred kB, by name."""

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "ball",
    "moves",
    "left",
    "right",
    "over",
    "the",
    "water",
    "and",
    "sky",
    "slowly",
]
PROMPT = "a red ball moves right"
SPECIAL = ["<pad>", "</s>", "<unk>"]


def tokenizer(length):
    """Words as tokens; `</s>` closes a prompt."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + sorted(set(WORDS)))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def umt5():
    config = transformers.UMT5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.UMT5EncoderModel(config)


def wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan_transformer(**changes):
    settings = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return diffusers.WanTransformer3DModel(**{**settings, **changes})


def unipc():
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def euler():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def wan(scheduler, **parts):
    settings = dict(transformer=wan_transformer(), transformer_2=None)
    return diffusers.WanPipeline(
        tokenizer=tokenizer(512), text_encoder=umt5(), vae=wan_vae(), scheduler=scheduler, **{**settings, **parts}
    )


def wan_i2v():
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        intermediate_size=16,
    )
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(512),
        text_encoder=umt5(),
        vae=wan_vae(),
        scheduler=unipc(),
        image_encoder=transformers.CLIPVisionModel(vision),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
        transformer=wan_transformer(in_channels=36, image_dim=8, added_kv_proj_dim=32),
    )


def wan_5b_i2v():
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(512),
        text_encoder=umt5(),
        vae=wan_vae(),
        scheduler=euler(),
        transformer=wan_transformer(),
        expand_timesteps=True,
    )


def hunyuan_transformer(**changes):
    settings = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return diffusers.HunyuanVideoTransformer3DModel(**{**settings, **changes})


def hunyuan():
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    llama = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    clip = transformers.CLIPTextConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(llama),
        tokenizer=tokenizer(64),
        transformer=hunyuan_transformer(),
        vae=vae,
        scheduler=euler(),
        text_encoder_2=transformers.CLIPTextModel(clip),
        tokenizer_2=tokenizer(77),
    )


def cogvideox_transformer(**changes):
    settings = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=3,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
    )
    return diffusers.CogVideoXTransformer3DModel(**{**settings, **changes})


def cogvideox(scheduler, kind=diffusers.CogVideoXPipeline, **changes):
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    text = transformers.T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return kind(
        tokenizer=tokenizer(16),
        text_encoder=transformers.T5EncoderModel(text),
        vae=vae,
        transformer=cogvideox_transformer(**changes),
        scheduler=scheduler,
    )


COGVIDEOX_1_5 = dict(patch_size_t=2, use_rotary_positional_embeddings=True)

BUILDERS = {
    "wan": lambda: wan(unipc()),
    "wan_euler": lambda: wan(euler()),
    "wan_5b": lambda: wan(unipc(), expand_timesteps=True),
    "wan_2_2": lambda: wan(unipc(), transformer_2=wan_transformer(), boundary_ratio=0.8),
    "wan_i2v": wan_i2v,
    "wan_5b_i2v": wan_5b_i2v,
    "hunyuan": hunyuan,
    "cogvideox_2b": lambda: cogvideox(diffusers.CogVideoXDDIMScheduler()),
    "cogvideox_1_5": lambda: cogvideox(diffusers.CogVideoXDPMScheduler(), **COGVIDEOX_1_5),
    "cogvideox_i2v": lambda: cogvideox(
        diffusers.CogVideoXDPMScheduler(), diffusers.CogVideoXImageToVideoPipeline, in_channels=8, **COGVIDEOX_1_5
    ),
}


def saver(root):
    """A function of a pipeline's name that saves it below a folder, once, and gives its directory."""

    def save(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            BUILDERS[name]().save_pretrained(root / name)
        return root / name

    return save
