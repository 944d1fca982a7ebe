import json

import pytest
import torch

from svg.attend import attend
from svg.config import DenseConfig, SVG1Config, SVG2Config
from svg.engine.layout import TokenLayout
from svg.engine.records import AttentionRecord, Timer
from svg.engine.state import RunState
from svg.engine.summary import summarize

LAYOUT = TokenLayout(3, 3, 4, 5, "last")


def run(config, make_qkv, layers=3, batch=2):
    state = RunState(config, layers, name="transformer_2")
    for step in range(4):
        for branch in ("cond", "uncond"):
            state.begin_forward(step, 4, branch, LAYOUT)
            for layer in range(layers):
                attend(*make_qkv(LAYOUT, batch=batch, seed=step), state, layer)
    return state


def test_hand_made_records():
    state = RunState(SVG1Config(), 2)
    timer = Timer(torch.device("cpu"))
    timer.stop()
    dense = torch.ones(1, 2)
    sparse, kind = torch.tensor([[0.2, 0.4]]), torch.tensor([[0, 1]], dtype=torch.int8)
    state.records = [
        AttentionRecord(0, 0, "cond", dense, None, True, timer),
        AttentionRecord(0, 1, "cond", dense, None, True, timer),
        AttentionRecord(1, 0, "cond", dense, None, True, timer),
        AttentionRecord(1, 1, "cond", sparse, kind, False, timer),
        AttentionRecord(1, 1, "uncond", 2 * sparse, 1 - kind, False, timer),
    ]
    summary = summarize(state)
    assert summary["calls"] == {"total": 5, "dense": 3, "sparse": 2, "reused": 0}
    density = summary["density"]
    assert density["all_calls"] == pytest.approx((3 + 0.3 + 0.6) / 5)
    assert density["sparse_calls"] == pytest.approx(0.45)
    assert density["per_step"][0] == {"step": 0, "all_calls": 1.0, "sparse_calls": None}
    assert density["per_step"][1]["all_calls"] == pytest.approx(1.9 / 3)
    assert density["per_layer"][0] == {"layer": 0, "all_calls": 1.0, "sparse_calls": None}
    assert density["per_layer"][1]["sparse_calls"] == pytest.approx(0.45)
    assert density["per_branch"]["uncond"]["all_calls"] == pytest.approx(0.6)
    assert density["per_head"] == {"1": [pytest.approx(0.3), pytest.approx(0.6)]}
    assert density["map"]["steps"] == [0, 1] and density["map"]["layers"] == [0, 1] and density["map"]["heads"] == 2
    assert density["map"]["values"] == [[[1, 1], [1, 1]], [[1, 1], [0.3, 0.6]]]
    assert summary["head_kinds"] == {"1": {"spatial": 0.5, "temporal": 0.5}}
    assert summary["head_kinds_map"] == {"steps": [1], "layers": [1], "heads": 2, "values": [[[0.5, 0.5]]]}


@pytest.mark.parametrize(
    "config",
    [
        SVG1Config(density=0.6, block_size=4, warmup_steps=0.5),
        SVG2Config(num_q_clusters=4, num_k_clusters=6, warmup_steps=0.5),
        DenseConfig(),
    ],
    ids=lambda config: config.method,
)
def test_a_run_is_json(config, make_qkv):
    summary = summarize(run(config, make_qkv))
    assert json.loads(json.dumps(summary)) == summary
    dense = config.method == "dense"
    assert summary["name"] == "transformer_2" and summary["config"] == config.to_dict()
    # Two of four steps and one of three layers are warm-up.
    assert summary["calls"] == {"total": 24, "dense": 24 if dense else 16, "sparse": 0 if dense else 8, "reused": 0}
    assert set(summary["density"]["per_head"]) == (set() if dense else {"1", "2"})
    assert all(len(heads) == 3 for heads in summary["density"]["per_head"].values())
    assert set(summary["density"]["per_branch"]) == {"cond", "uncond"}
    assert (summary["head_kinds"] is None) == (summary["head_kinds_map"] is None) == (config.method != "svg1")
    seconds = summary["attention_seconds"]
    assert seconds["total"] == pytest.approx(seconds["dense"] + seconds["sparse"]) and seconds["total"] > 0


def test_an_empty_run_and_an_untimed_one(make_qkv):
    state = RunState(SVG1Config(), 2)
    summary = summarize(state)
    assert summary["calls"]["total"] == 0 and summary["density"]["all_calls"] is None
    assert summary["attention_seconds"] is None
    json.dumps(summary)
