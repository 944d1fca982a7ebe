"""scripts/bench/tile_use.py: tile use and the table, against their definitions."""

import sys

import pytest
import torch
from scripts_support import load_script

from svg.engine.plan import Plan
from svg.pipelines import GenerationRequest, load_pipeline
from svg.recordings.record import record


@pytest.fixture(scope="module")
def script():
    return load_script("bench/tile_use.py")


def plan():
    torch.manual_seed(0)
    q_sizes, k_sizes = (torch.randint(0, 9, (2, n), dtype=torch.int32) for n in (4, 12))
    index = torch.zeros(1, 2, dtype=torch.int32)
    return Plan(
        q_permutation=None, k_permutation=None, q_sizes=q_sizes, k_sizes=k_sizes, block_map=torch.rand(2, 4, 12) < 0.6,
        map_index=index, visible_keys=k_sizes.sum(-1),
    )  # fmt: skip


@pytest.mark.parametrize("block", [1, 4, 16])
def test_tile_use_token_by_token(script, block):
    given, useful, computed = plan(), 0, 0
    for m in range(2):
        for i, rows in enumerate(given.q_sizes[m].tolist()):
            keys = [bool(given.block_map[m, i, j]) for j in range(12) for _ in range(given.k_sizes[m, j])]
            runs, here = [], 0
            for j in range(12):  # an empty cluster that is not selected still ends a run
                if given.block_map[m, i, j]:
                    here += given.k_sizes[m, j].item()
                else:
                    runs, here = [*runs, here], 0
            runs.append(here)
            useful += rows * sum(keys)
            computed += rows * sum(-(-run // block) * block for run in runs)
    assert script.key_tile_use(given, block) == pytest.approx(useful / computed)
    sizes = given.q_sizes.flatten().tolist()
    padded = sum(-(-size // block) * block for size in sizes)
    assert script.query_tile_use(given, block) == pytest.approx(sum(sizes) / padded)


@pytest.mark.parametrize("name", ["as_numbered", "principal", "median_split", "neighbour_order"])
def test_orders_hold_every_cluster_once(script, name):
    order = getattr(script, name)(torch.randn(2, 3, 13, 8))
    assert (order.long().sort(-1).values == torch.arange(13)).all()


def test_table_of_a_recording(script, model, tmp_path, monkeypatch, capsys):
    request = GenerationRequest(prompt="a red ball", height=32, width=48, num_frames=9, steps=3)
    record(load_pipeline(model, device="cpu"), request, tmp_path / "a.safetensors", steps=[1], branches=["cond"])
    arguments = [
        "tile_use.py",
        str(tmp_path / "a.safetensors"),
        "--q-clusters",
        "3",
        "--k-clusters",
        "6",
        "--layers",
        "0",
        "2",
    ]
    monkeypatch.setattr(
        sys, "argv", [*arguments, "--density", "0.5", "--device", "cpu", "--out", str(tmp_path / "a.json")]
    )
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert "18 tokens, 2 calls, 3 / 6 clusters" in lines[0] and "layers 0 / 2" in lines[2]
    assert len(lines) == 13 and all(line.count("|") == 6 for line in lines[2:])
    assert (tmp_path / "a.json").is_file()
