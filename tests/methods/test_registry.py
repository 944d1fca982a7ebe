"""A method is a folder and a name in the registry: one of ten lines runs wherever the others do."""

import importlib
import sys

import pytest
import torch

import svg
from svg.attend import attend
from svg.config import METHODS, config_from_dict
from svg.engine.layout import TokenLayout
from svg.methods.registry import method_flags, planner

LAYOUT = TokenLayout(3, 4, 4)
CONFIG = """
from dataclasses import dataclass
from typing import ClassVar
from svg.config.base import PRECISIONS, GuardedConfig, setting

@dataclass(frozen=True, kw_only=True)
class ToyConfig(GuardedConfig):
    method: ClassVar[str] = "toy"
    every: int = setting(2, flag=int, help="keep every so many key frames.", sweep="strides")
    precision: str = "native"
"""
PLAN = """
import torch
from svg.engine.plan import Plan

def plan(q, k, v, config, state, layout, text_mask=None):
    frames = torch.full((1, layout.frames), layout.height * layout.width, dtype=torch.int32)
    kept = (torch.arange(layout.frames) % config.every == 0).expand(1, layout.frames, -1)
    heads = torch.zeros(q.shape[:2], dtype=torch.int32)
    return Plan(q_permutation=None, k_permutation=None, q_sizes=frames, k_sizes=frames, block_map=kept,
                map_index=heads, visible_keys=frames.sum(-1))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, text in (("__init__", ""), ("config", CONFIG), ("plan", PLAN)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config = importlib.import_module("toy.config").ToyConfig
    monkeypatch.setitem(METHODS, "toy", config)
    yield config
    for name in ("toy", "toy.config", "toy.plan"):
        sys.modules.pop(name, None)


def test_a_new_method_runs(toy, make_qkv, make_state, masked_attention):
    q, k, v = make_qkv(LAYOUT)
    seen = (torch.arange(48) // 16 % 2 == 0).expand(48, -1)  # frames 0 and 2
    for precision, close in (("native", 1e-5), ("int8-fp16", 0.05)):
        state = make_state(toy(precision=precision), LAYOUT)
        out = attend(q, k, v, state, 2)
        expected = masked_attention(q[1, :, 2], k[1, :, 2], v[1, :, 2], seen)
        torch.testing.assert_close(out[1, :, 2].double(), expected, rtol=close, atol=close)
        assert state.records[0].density.tolist() == [[pytest.approx(2 / 3)] * 3] * 2


def test_a_new_method_is_everywhere(toy):
    assert config_from_dict({"method": "toy", "every": 3}) == toy(every=3) == config_from_dict(toy(every=3).to_dict())
    assert svg.ToyConfig is toy and svg.config.ToyConfig is toy
    assert method_flags()["every"] == (int, "toy: keep every so many key frames.")
    assert toy.sweep_field() == ("every", "strides")
    from svg.sweep.grid import read_grid  # its budgets are the method's strides

    grid = read_grid(None, {"prompts": ["a ball"], "methods": ["toy"], "budgets": [2, 3]})
    assert [settings["every"] for settings, _ in grid.methods] == [2, 3]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_every_method_has_a_plan(name):
    assert callable(planner(METHODS[name]()).plan)


def test_flags_and_tuning_of_the_methods():
    from svg.cli import cli

    options = {option: one for one in cli.get_command(None, "generate").params for option in one.opts}
    for name, (_, help_text) in method_flags().items():
        assert help_text in options[f"--{name.replace('_', '-')}"].help
    for config in METHODS.values():
        names = {field.name for field in config.__dataclass_fields__.values()}
        assert {config.budget_field, config.head_field} - {None} <= names
        if config.head_field:
            assert config.levels == tuple(sorted(config.levels)) and config.levels[-1] == 1
            assert config.probed_level in config.levels and 0 < config.probed_level < 1
