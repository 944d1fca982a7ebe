"""Warm-up by noise: which steps of a schedule are dense, from any scheduler; and what a report says of it."""

import diffusers
import pytest
import torch

import svg
from svg.config import NearConfig, SVG1Config
from svg.configs import load_preset, preset_names
from svg.generate.job import _config as job_config
from svg.methods.near.levels import LEVELS
from svg.pipelines.attach import attached
from svg.pipelines.choose import FEW_STEPS_NOISE, resolve, settings_of
from svg.pipelines.position import noise_of


def flow(shift, steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler


def test_noise_of_flow_matching_is_its_sigma():
    scheduler = flow(5.0, 4)
    assert noise_of(scheduler) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    unipc.set_timesteps(6)
    assert noise_of(unipc) == pytest.approx(unipc.sigmas[:-1].tolist(), abs=2e-3)  # its timesteps are whole numbers


def test_noise_of_other_schedulers_falls_from_nearly_all_to_little():
    for scheduler in (diffusers.CogVideoXDDIMScheduler(), diffusers.DDIMScheduler(), diffusers.EDMEulerScheduler()):
        scheduler.set_timesteps(8)
        noise = noise_of(scheduler)
        assert len(noise) == 8 and noise == sorted(noise, reverse=True) and noise[0] > 0.9 and noise[-1] < 0.5, (
            scheduler
        )
    assert noise_of(None) is None


@pytest.mark.parametrize(("shift", "steps", "level", "dense"), [
    (5.0, 4, 0.95, 1), (8.0, 4, 0.9, 2), (5.0, 8, 0.95, 2), (5.0, 50, 0.95, 11), (1.0, 50, 0.95, 3), (5.0, 4, 1.0, 0),
])  # fmt: skip
def test_steps_above_a_level_of_noise_are_dense(shift, steps, level, dense):
    config = SVG1Config(warmup_noise=level, warmup_steps=1.0, warmup_layers=0.0).on_schedule(
        noise_of(flow(shift, steps))
    )
    assert [config.is_warmup(step, steps, 0, 1) for step in range(steps)] == [step < dense for step in range(steps)]
    assert config.warmup_noise is None


def test_without_warmup_by_noise_the_settings_stay():
    config = SVG1Config()
    assert config.on_schedule([1.0, 0.5]) is config and config.on_schedule(None) is config


def test_a_pipeline_warms_up_by_noise(load, run):
    pipe = svg.accelerate(load("wan"), SVG1Config(warmup_noise=0.9, warmup_layers=0.0, density=0.5))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    run(pipe, steps=4)
    state = attached(pipe)["transformer"].state
    assert {record.step for record in state.records if record.dense} == {0, 1}  # 1 and .96, then .89
    assert svg.report(pipe)["transformers"]["transformer"]["steps"] == {"total": 4, "dense": 2}
    assert svg.report(pipe)["config"]["warmup_noise"] == 0.9
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    run(pipe, steps=4)
    assert svg.report(pipe)["transformers"]["transformer"]["steps"] == {"total": 4, "dense": 1}


FEW = SVG1Config(few_steps_noise=0.85, warmup_steps=0.2, warmup_layers=0.0)


@pytest.mark.parametrize(
    ("shift", "steps", "dense"), [(3.0, 4, 2), (8.0, 4, 2), (3.0, 8, 3), (3.0, 9, 2), (8.0, 50, 10)]
)
def test_runs_of_few_steps_warm_up_by_noise_and_others_by_a_share(shift, steps, dense):
    config = FEW.on_schedule(noise_of(flow(shift, steps)))
    assert [config.is_warmup(step, steps, 0, 1) for step in range(steps)] == [step < dense for step in range(steps)]


def test_a_warmup_by_noise_goes_before_that_of_few_steps_and_unknown_noise_leaves_the_share():
    noise = noise_of(flow(3.0, 4))  # 1, .86, .6, 0
    assert SVG1Config(warmup_noise=0.95, few_steps_noise=0.5).on_schedule(noise).warmup_steps == 0.25
    assert FEW.on_schedule(None) is FEW
    with pytest.raises(ValueError, match="few_steps_noise must be in"):
        SVG1Config(few_steps_noise=1.5)


def test_words_and_presets_of_near_have_it_unless_a_warmup_is_asked_for():
    assert {resolve(level).few_steps_noise for level in LEVELS} == {FEW_STEPS_NOISE}
    presets = [load_preset(name) for name in preset_names() if name != "tiny-wan"]
    assert {preset.config("near").few_steps_noise for preset in presets} == {FEW_STEPS_NOISE}
    for given, left in (
        ({"budget": 0.3}, FEW_STEPS_NOISE),
        ({"warmup_steps": 0.5}, None),
        ({"warmup_noise": 0.5}, None),
    ):
        assert job_config(presets[0], "near", given, {}).few_steps_noise == left
    fast = job_config(load_preset("wan2.1-t2v-1.3b-480p"), "near", {}, settings_of("fast", "cpu"))
    assert (fast.warmup_steps, fast.warmup_layers, fast.residual, fast.few_steps_noise) == (
        0.1,
        0.0,
        0.0,
        FEW_STEPS_NOISE,
    )
    assert job_config(presets[0], "near", {"warmup_steps": 0.5}, settings_of("fast", "cpu")).warmup_steps == 0.5


def test_a_pipeline_of_few_steps_warms_up_by_noise(load, run):
    pipe = svg.accelerate(load("wan"), SVG1Config(few_steps_noise=0.85, warmup_layers=0.0, density=0.5))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps, dense in ((4, 2), (10, 2)):
        run(pipe, steps=steps)
        assert svg.report(pipe)["transformers"]["transformer"]["steps"] == {"total": steps, "dense": dense}
        assert svg.summary(pipe).dense_steps == dense and f"{dense} of {steps}" in str(svg.summary(pipe))


def test_a_summary_says_when_every_step_was_sparse_and_when_none_was(load, run):
    for warmup, words in ((0.0, "0 of 4, every step was sparse"), (1.0, "4 of 4, no step was sparse")):
        pipe = svg.accelerate(load("wan"), SVG1Config(warmup_steps=warmup, warmup_layers=0.0, density=0.5))
        run(pipe, steps=4)
        assert words in str(svg.summary(pipe))


def test_budgets_that_fall_over_the_steps_begin_where_the_noise_ends():
    config = NearConfig(warmup_noise=0.95, early=0.5).on_schedule(noise_of(flow(8.0, 12)))
    assert config.at_step(3, 12) is config and config.at_step(4, 12).budget > config.budget  # four are dense


def test_noise_that_nobody_tells_is_asked_for(load):
    transformer = svg.accelerate(load("wan").transformer, SVG1Config(warmup_noise=0.9, density=0.5, warmup_layers=0.0))
    inputs = {
        "hidden_states": torch.randn(1, transformer.config.in_channels, 3, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, transformer.config.text_dim),
    }
    with (
        torch.no_grad(),
        svg.at_step(transformer, 0, 2),
        pytest.raises(ValueError, match="pass the noise of all steps"),
    ):
        transformer(**inputs)
    for step in range(2):
        with torch.no_grad(), svg.at_step(transformer, step, 2, noise=(1.0, 0.5)):
            transformer(**inputs)
    records = attached(transformer)["transformer"].state.records
    assert [record.dense for record in records if record.layer == 0] == [True, False]


@pytest.mark.parametrize("level", [-0.1, 1.1, "much"])
def test_a_level_outside_its_range_is_refused(level):
    with pytest.raises((ValueError, TypeError), match="warmup_noise must be"):
        SVG1Config(warmup_noise=level)


@pytest.mark.parametrize(
    ("noise", "error"),
    [
        (3, TypeError), ("ab", TypeError), (True, TypeError), ({1: 2}, TypeError), (torch.tensor([0.9, 0.2]), TypeError),
        (["a", "b"], TypeError), ([None, 0.5], TypeError), ([True, 0.5], TypeError), ([], ValueError), ([0.5], ValueError),
        ([0.5] * 3, ValueError), ([float("nan"), 0.5], ValueError), ([5, 0.1], ValueError), ([0.5, -0.1], ValueError),
    ],
)  # fmt: skip
def test_noise_that_no_run_can_have_is_refused_where_it_is_told(load, noise, error):
    transformer = svg.accelerate(load("wan").transformer, SVG1Config(warmup_noise=0.5))
    with pytest.raises(error, match="noise must be .*one a step, got"), svg.at_step(transformer, 0, 2, noise=noise):
        pass
