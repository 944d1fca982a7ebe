"""Real pipelines of further families, from prompt embeddings to latents: steps, branches, and the stock result."""

import diffusers
import pytest
import torch
from tiny_transformers import FAMILIES

import svg
from svg.config import DenseConfig, SVG2Config
from svg.pipelines.attach import attached, transformers_of
from svg.pipelines.position import running_pipeline

BOTH = ["cond", "uncond"]


def embeddings(*names):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(1, 7, 8, generator=generator) for name in names}


def masks(dtype):
    return {name: torch.ones(1, 7, dtype=dtype) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def unipc():
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


TEXT = embeddings("prompt_embeds", "negative_prompt_embeds")
QWEN = embeddings("prompt_embeds_qwen", "negative_prompt_embeds_qwen")
CLIP = {name: torch.ones(1, 8) for name in ("prompt_embeds_clip", "negative_prompt_embeds_clip")}
LENGTHS = {name: torch.tensor([0, 7]) for name in ("prompt_cu_seqlens", "negative_prompt_cu_seqlens")}

# transformer, and which of its pipelines -> pipeline around it; arguments of its call; branches of a step
PIPELINES = {
    "ltx": (
        lambda t: diffusers.LTXPipeline(flow(), None, None, None, t),
        {**TEXT, **masks(torch.bool), "num_frames": 17, "guidance_scale": 3.0}, ["cond_uncond"],
    ),
    "mochi": (
        lambda t: diffusers.MochiPipeline(flow(), None, None, None, t),
        {**TEXT, **masks(torch.bool), "num_frames": 7}, ["cond_uncond"],
    ),
    "allegro": (
        lambda t: diffusers.AllegroPipeline(None, None, None, t, diffusers.EulerAncestralDiscreteScheduler()),
        {**TEXT, **masks(torch.long), "num_frames": 4, "negative_prompt": None}, ["call 0"],
    ),
    "skyreels_v2": (
        lambda t: diffusers.SkyReelsV2Pipeline(None, None, t, None, unipc()), {**TEXT, "num_frames": 17}, BOTH,
    ),
    "skyreels_v2/forcing": (
        lambda t: diffusers.SkyReelsV2DiffusionForcingPipeline(None, None, t, None, unipc()),
        {**TEXT, "prompt": None, "num_frames": 17, "base_num_frames": 17}, BOTH,
    ),
    "kandinsky5": (
        lambda t: diffusers.Kandinsky5T2VPipeline(t, None, None, None, None, None, flow()),
        {**QWEN, **CLIP, **LENGTHS, "num_frames": 9}, ["call 0", "call 1"],
    ),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    build, arguments, branches = PIPELINES[name]
    pipe = build(FAMILIES[name.partition("/")[0]].make().eval())
    pipe.set_progress_bar_config(disable=True)

    def run(steps=3):
        out = pipe(
            **arguments, height=64, width=96, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return out.frames

    return pipe, run, branches


@pytest.mark.parametrize("name", PIPELINES)
def test_steps_branches_and_the_stock_result(name):
    pipe, run, branches = made(name)
    stock = run()
    allowed = dict(rtol=0, atol=1e-5 * max(1, stock.abs().max().item()))  # Allegro's latents reach 600
    svg.accelerate(pipe, DenseConfig())
    for steps in (4, 3):
        out = run(steps)
        state = attached(pipe)["transformer"].state
        seen = [(record.step, record.branch) for record in state.records if record.layer == 0]
        assert seen == [(step, branch) for step in range(steps) for branch in branches]
        assert state.num_steps == steps
    torch.testing.assert_close(out, stock, **allowed)
    full = SVG2Config(top_p=1.0, num_q_clusters=4, num_k_clusters=6, warmup_steps=0.0, warmup_layers=0.0)
    svg.accelerate(pipe, full)
    torch.testing.assert_close(run(), stock, **allowed)
    svg.restore(pipe)
    assert torch.equal(run(), stock)


def test_a_modular_pipeline():
    """Its transformer is a component, and the running pipeline is found from within its call."""
    pipe = diffusers.MiniMaxH3ModularPipeline()
    transformer = FAMILIES["minimax_h3"].make()
    pipe.update_components(transformer=transformer)
    before = [block.attn.processor for block in transformer.transformer_blocks]
    svg.accelerate(pipe, DenseConfig())
    assert transformers_of(pipe) == {"transformer": transformer} and list(attached(pipe)) == ["transformer"]

    def call(self):
        return running_pipeline(self.transformer)

    assert call(pipe) is pipe and running_pipeline(transformer) is None
    svg.restore(pipe)
    assert [block.attn.processor for block in transformer.transformer_blocks] == before


def test_attaching_to_a_model_of_40_layers_is_quick():
    import time

    with torch.device("meta"):
        transformer = diffusers.WanTransformer3DModel()
    svg.accelerate(FAMILIES["wan"].make(), DenseConfig())  # imports
    start = time.perf_counter()
    svg.accelerate(transformer, "near")
    svg.report(transformer)
    svg.restore(transformer)
    assert time.perf_counter() - start < 1
