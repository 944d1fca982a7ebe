"""Which step, which branch, which run: read from the pipeline, whatever the pipeline tells."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.hooks.hooks import CacheContext

import svg
from svg.config import DenseConfig
from svg.pipelines.attach import attached
from svg.pipelines.hook import find_step

ONLY_STEPS = DenseConfig()
SCHEDULERS = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
}


def seen(pipe, name="transformer", layer=0):
    state = attached(pipe)[name].state
    return [(record.step, record.branch) for record in state.records if record.layer == layer]


def both(steps):
    return [(step, branch) for step in range(steps) for branch in ("cond", "uncond")]


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("name", ["wan", "wan_i2v", "wan_5b_i2v"])
def test_wan_steps(load, run, name, scheduler):
    """WanPipeline passes step_index; WanImageToVideoPipeline doesn't."""
    pipe = svg.accelerate(load(name), ONLY_STEPS)
    pipe.scheduler = SCHEDULERS[scheduler]()
    for steps in (4, 3):
        run(pipe, steps=steps)
        assert seen(pipe) == both(steps)
        assert attached(pipe)["transformer"].state.num_steps == steps


def test_a_second_order_scheduler_has_more_steps_than_asked_for(load, run):
    pipe = svg.accelerate(load("wan_i2v"), ONLY_STEPS)
    pipe.scheduler = SCHEDULERS["heun"]()
    run(pipe, steps=3)
    assert seen(pipe) == both(5)


def test_hunyuan_video_steps(load, run):
    pipe = svg.accelerate(load("hunyuan"), ONLY_STEPS)
    run(pipe, steps=3)
    assert seen(pipe) == [(step, "cond") for step in range(3)]
    run(pipe, steps=3, negative_prompt="a dog", true_cfg_scale=3.0)
    assert seen(pipe) == both(3)


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_1_5", "cogvideox_i2v"])
def test_cogvideox_steps_come_from_the_timestep(load, run, name):
    """Its DDIM and DPM schedulers have no step_index at all."""
    pipe = svg.accelerate(load(name), ONLY_STEPS)
    assert not hasattr(pipe.scheduler, "step_index")
    run(pipe, steps=4)
    assert seen(pipe) == [(step, "cond_uncond") for step in range(4)]


def test_a_pipeline_without_cache_context(load, run):
    """Branches are then told apart by the call within the step."""
    t2v = load("wan")
    pipe = diffusers.WanVideoToVideoPipeline(**{key: t2v.components[key] for key in (
        "tokenizer", "text_encoder", "transformer", "vae", "scheduler"
    )})  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    svg.accelerate(pipe, ONLY_STEPS)
    pipe(
        video=torch.rand(1, 9, 3, 32, 48), prompt="a dog", height=32, width=48, num_inference_steps=4, strength=0.5,
        output_type="latent", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    # Half the strength starts in the middle of the schedule.
    assert seen(pipe) == [(step, f"call {call}") for step in (2, 3) for call in (0, 1)]


def test_two_transformers_share_one_schedule(load, run):
    pipe = svg.accelerate(load("wan_2_2"), ONLY_STEPS)
    run(pipe, steps=6)
    first, second = seen(pipe, "transformer"), seen(pipe, "transformer_2")
    assert first and second and first + second == both(6)
    assert attached(pipe)["transformer_2"].state.num_steps == 6
    pipe.register_to_config(boundary_ratio=0.0)  # the second transformer has no part in this run
    run(pipe, steps=2)
    parts = svg.report(pipe)["transformers"]
    assert parts["transformer"]["calls"]["total"] == 12 and parts["transformer_2"]["calls"]["total"] == 0
    assert parts["transformer_2"]["transformer_seconds"] == 0


def test_find_step_prefers_context_then_scheduler_then_timestep():
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 500.0, 100.0]), step_index=None)
    timestep = torch.tensor([500.0])
    assert find_step(None, scheduler, timestep) == (1, 3)
    assert find_step(None, scheduler, torch.tensor([[0.0, 0.0, 100.0]])) == (2, 3)  # Wan2.2-5B: the image's tokens at 0
    assert find_step(None, scheduler, torch.tensor(500)) == (1, 3)
    assert find_step(CacheContext("cond"), scheduler, timestep) == (1, 3)
    scheduler.step_index = 2
    assert find_step(None, scheduler, timestep) == (2, 3)
    assert find_step(CacheContext("cond", step_index=0), scheduler, timestep) == (0, 3)
    assert find_step(CacheContext("cond", step_index=0, num_inference_steps=9), None, timestep) == (0, 9)


@pytest.mark.parametrize("scheduler", [None, SimpleNamespace(timesteps=torch.tensor([900.0]), step_index=None)])
def test_find_step_refuses_to_guess(scheduler):
    with pytest.raises(RuntimeError, match="step must be known"):
        find_step(None, scheduler, torch.tensor([500.0]))


def test_a_low_precision_timestep_is_found():
    timesteps = torch.tensor([999.4, 731.9, 12.3])
    scheduler = SimpleNamespace(timesteps=timesteps, step_index=None)
    assert find_step(None, scheduler, timesteps[1].bfloat16()[None]) == (1, 3)
