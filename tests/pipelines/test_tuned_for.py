"""Settings that were tuned for one model's weights are refused on a pipeline that was loaded from others."""

import dataclasses

import pytest

import svg
from svg.pipelines.fingerprint import fingerprint

GRID = (5, 2, 3)


def settings(**changes):
    tuned = {"model": "some/model", "fingerprint": "0" * 16, "tokens": GRID, "device": "cpu", **changes}
    return svg.SVG2Config(head_top_p=[[0.5, 0.5]] * 3, tuned_for=tuned)


def test_other_weights_are_refused(load, directory):
    pipe, mark = load("wan"), fingerprint(str(directory("wan")))
    with pytest.raises(ValueError, match=f"config must be tuned for this pipeline's weights, .*{mark}.*some/model"):
        svg.accelerate(pipe, settings())
    with pytest.raises(ValueError, match="call svg.accelerate"):
        svg.report(pipe)
    svg.restore(svg.accelerate(pipe, settings(fingerprint=mark, model="it was elsewhere then")))
    svg.restore(svg.accelerate(pipe, dataclasses.replace(settings(), tuned_for=None)))
    svg.restore(svg.accelerate(pipe, settings(fingerprint=None)))
    svg.accelerate(pipe.transformer, settings())
