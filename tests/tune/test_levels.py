"""Which levels of near's budget are measured: not those that the means of a short video are more than."""

from types import SimpleNamespace

import pytest
from tiny_model import model  # noqa: F401

from svg.config import NearConfig, SVG1Config
from svg.pipelines import GenerationRequest
from svg.tune.curves import probed_level
from svg.tune.levels import levels_for


def job(model, config, height, width, frames):  # noqa: F811
    request = GenerationRequest(prompt="-", height=height, width=width, num_frames=frames, steps=12)
    return SimpleNamespace(model=str(model), revision=None, config=config, request=request)


def test_levels_that_a_video_is_too_short_for_are_left_out(model):  # noqa: F811
    assert levels_for(job(model, NearConfig(), 96, 112, 13)) == NearConfig.levels[3:]
    assert levels_for(job(model, NearConfig(early=0.0), 64, 64, 9)) == NearConfig.levels[1:]
    assert levels_for(job(model, SVG1Config(), 32, 48, 9)) == SVG1Config.levels
    # Means of larger granules cost less, so that lower levels are there.
    assert levels_for(job(model, NearConfig(early=0.0, granule=32), 128, 128, 17)) == NearConfig.levels


def test_single_heads_are_tried_at_a_level_that_is_measured():
    assert probed_level(NearConfig(), NearConfig.levels) == 0.1
    assert probed_level(NearConfig(), NearConfig.levels[4:]) == 0.2
    assert probed_level(SVG1Config(), SVG1Config.levels) == SVG1Config.probed_level


def test_too_short_to_try_single_heads(model):  # noqa: F811
    with pytest.raises(ValueError, match="frames, height and width must give near more to tune, got 9 x 32 x 32"):
        levels_for(job(model, NearConfig(), 32, 32, 9))
