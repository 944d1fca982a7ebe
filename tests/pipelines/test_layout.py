"""The grid of every supported setting, as the transformer itself counts it; every other family is refused."""

import diffusers
import pytest
import torch
from torch import nn

import svg
from svg.config import DenseConfig
from svg.engine.layout import TokenLayout
from svg.pipelines.attach import attached

SMALL = dict(num_layers=1, num_attention_heads=1)
WAN = dict(SMALL, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8)
HUNYUAN = dict(
    SMALL, num_single_layers=1, num_refiner_layers=1, attention_head_dim=8, text_embed_dim=8, pooled_projection_dim=8,
    rope_axes_dim=(4, 2, 2),
)  # fmt: skip
COGVIDEOX = dict(
    SMALL, attention_head_dim=16, text_embed_dim=8, time_embed_dim=8, use_rotary_positional_embeddings=True
)
COGVIDEOX_1_5 = dict(COGVIDEOX, patch_size_t=2)

# family, VAE's time and space stride, frames x height x width of the video, grid
SETTINGS = [
    ("wan", WAN, (4, 8), (81, 480, 832), (21, 30, 52)),
    ("wan", WAN, (4, 8), (81, 720, 1280), (21, 45, 80)),
    ("wan", dict(WAN, in_channels=48), (4, 16), (121, 704, 1280), (31, 22, 40)),
    ("wan", WAN, (4, 8), (61, 480, 832), (16, 30, 52)),
    ("wan", WAN, (4, 8), (81, 832, 480), (21, 52, 30)),
    ("wan", WAN, (4, 8), (49, 272, 416), (13, 17, 26)),
    ("wan", dict(WAN, in_channels=36), (4, 8), (81, 480, 832), (21, 30, 52)),
    ("wan", WAN, (4, 8), (1, 480, 832), (1, 30, 52)),
    ("hunyuan", HUNYUAN, (4, 8), (129, 720, 1280), (33, 45, 80)),
    ("hunyuan", HUNYUAN, (4, 8), (129, 1280, 720), (33, 80, 45)),
    ("hunyuan", HUNYUAN, (4, 8), (49, 272, 416), (13, 17, 26)),
    ("cogvideox", COGVIDEOX, (4, 8), (49, 480, 720), (13, 30, 45)),
    ("cogvideox", COGVIDEOX_1_5, (4, 8), (81, 768, 1360), (11, 48, 85)),
    ("cogvideox", COGVIDEOX, (4, 8), (49, 272, 416), (13, 17, 26)),
]
TOKENS = {(21, 30, 52): 32_760, (21, 45, 80): 75_600, (33, 45, 80): 118_800, (13, 30, 45): 17_550, (11, 48, 85): 44_880}

REFUSED = ["FluxTransformer2DModel", "StableAudioDiTModel", "SD3Transformer2DModel"]


class Pipe:
    """The least that svg.accelerate needs of a pipeline."""

    scheduler = None

    def __init__(self, transformer):
        self.transformer = transformer


def forward(family, config, latents):
    """One forward on the meta device; returns nothing, costs nothing."""
    frames, height, width = latents
    with torch.device("meta"):
        text, timestep = torch.zeros(1, 7, 8), torch.zeros(1)
        if family == "wan":
            transformer = diffusers.WanTransformer3DModel(**config)
            channels = transformer.config.in_channels
            arguments = (torch.zeros(1, channels, *latents), timestep, text)
        elif family == "hunyuan":
            transformer = diffusers.HunyuanVideoTransformer3DModel(**config)
            arguments = (torch.zeros(1, 16, *latents), timestep, text, torch.ones(1, 7), torch.zeros(1, 8), timestep)
        else:
            transformer = diffusers.CogVideoXTransformer3DModel(**config)
            arguments = (torch.zeros(1, frames, 16, height, width), text, timestep)
        pipe = svg.accelerate(Pipe(transformer), DenseConfig(check_finite=False))
        with torch.no_grad(), transformer.cache_context("cond", step_index=0, num_inference_steps=1):
            transformer(*arguments)
    return attached(pipe)["transformer"].state


@pytest.mark.parametrize("family, config, stride, video, grid", SETTINGS)
def test_grid(family, config, stride, video, grid):
    latents = [(video[0] - 1) // stride[0] + 1, video[1] // stride[1], video[2] // stride[1]]
    if config is COGVIDEOX_1_5:
        latents[0] += latents[0] % 2  # the pipeline pads to whole patches
    state = forward(family, config, latents)
    text = {"wan": (0, "none"), "hunyuan": (7, "last"), "cogvideox": (7, "first")}[family]
    assert state.layout == TokenLayout(*grid, *text)
    assert state.layout.video_tokens == TOKENS.get(grid, state.layout.video_tokens)
    assert len(state.records) == state.num_layers  # attend compared the layout with the length of q


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused(name):
    kind = getattr(diffusers, name)
    with pytest.raises(
        ValueError, match=f"transformer must be one of WanTransformer3DModel, .* got {name}; register it"
    ):
        svg.accelerate(Pipe(kind.__new__(kind)), DenseConfig())


def test_a_subclass_is_not_guessed_at():
    class MyWan(diffusers.WanTransformer3DModel):
        pass

    with pytest.raises(ValueError, match="got MyWan"):
        svg.accelerate(Pipe(MyWan.__new__(MyWan)), DenseConfig())


def test_one_bad_transformer_leaves_the_other_alone(load):
    pipe = load("wan_2_2")
    before = pipe.transformer.attn_processors
    pipe.transformer_2 = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="got Linear"):
        svg.accelerate(pipe, DenseConfig())
    assert all(after is before[name] for name, after in pipe.transformer.attn_processors.items())


def test_a_pipeline_without_a_transformer():
    with pytest.raises(ValueError, match="pipe must have a video transformer"):
        svg.accelerate(Pipe(None), DenseConfig())


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_hunyuan_video_image_conditioning(kind):
    """Both of HunyuanVideo I2V's transformers: other blocks, the same attention."""
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(**{
        **HUNYUAN, "image_condition_type": kind, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    }).eval()  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    arguments = (
        torch.randn(2, 4, 3, 4, 6), torch.tensor([500.0, 500.0]), torch.randn(2, 7, 8), mask, torch.randn(2, 8),
        torch.full((2,), 6000.0),
    )  # fmt: skip
    context = dict(step_index=0, num_inference_steps=1)
    with torch.no_grad():
        stock = transformer(*arguments)[0]
        svg.accelerate(Pipe(transformer), DenseConfig())
        with transformer.cache_context("cond", **context):
            dense = transformer(*arguments)[0]
        pipe = Pipe(transformer)
        svg.accelerate(
            pipe, {"method": "svg2", "top_p": 1.0, "num_q_clusters": 3, "num_k_clusters": 4, "warmup_steps": 0}
        )
        with transformer.cache_context("cond", **context):
            full = transformer(*arguments)[0]
    torch.testing.assert_close(dense, stock, rtol=0, atol=1e-5)
    torch.testing.assert_close(full, stock, rtol=0, atol=1e-5)
