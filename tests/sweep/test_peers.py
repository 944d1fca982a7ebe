"""Other people's ways as cells of a sweep: Diffusers' backend, packages that are stood in for, and those that are not there."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from svg.cli import main
from svg.eval.page import build_page
from svg.pipelines.peers import find_peer, why_not

PEERS = "diffusers:native,spargeattn,cache-dit,sageattention"


@pytest.fixture
def stubs(monkeypatch):
    """SpargeAttn and cache-dit as modules of this test: the first leaves every second key out, the other counts."""
    calls = {"sparge": 0, "cache": []}
    original = F.scaled_dot_product_attention

    def attention(q, k, v, topk, is_causal):
        calls["sparge"] += 1
        assert topk == 0.5 and not is_causal and q.shape == k.shape == v.shape
        return original(q, k[:, :, ::2], v[:, :, ::2])

    sparge, cache = types.ModuleType("spas_sage_attn"), types.ModuleType("cache_dit")
    sparge.spas_sage2_attn_meansim_topk_cuda = attention
    cache.enable_cache = lambda pipe: calls["cache"].append("on")
    cache.disable_cache = lambda pipe: calls["cache"].append("off")
    monkeypatch.setitem(sys.modules, "spas_sage_attn", sparge)
    monkeypatch.setitem(sys.modules, "cache_dit", cache)
    yield calls
    assert F.scaled_dot_product_attention is original


def cells(out="out"):
    summary = json.loads(Path(out, "sweep.json").read_text())
    return {cell["label"]: cell for cell in summary["cells"]}, summary["notes"]


def test_peers_are_cells_and_missing_ones_are_notes(write_grid, stubs, capsys):
    name = write_grid(seeds=[0], methods=[{"method": "svg1", "density": 0.5, "block_size": 4}], control=False)
    assert main(["sweep", name, "--peers", PEERS, "--device", "cpu", "--out", "out"]) == 0
    found, notes = cells()
    assert set(found) == {"dense", "svg1", "peer diffusers:native", "peer spargeattn", "peer cache-dit"}
    assert any(note == "peer sageattention is left out: its package sageattention is not installed" for note in notes)
    assert all(cell["status"] == "finished" for cell in found.values())
    native, sparge = found["peer diffusers:native"], found["peer spargeattn"]
    assert float(native["quality"]["psnr"]["mean"]) > 60 > float(sparge["quality"]["psnr"]["mean"])
    assert native["density"]["all_calls"] == 1.0 and sparge["density"]["all_calls"] is None
    assert stubs["sparge"] > 0 and stubs["cache"] == ["on", "off"]
    assert native["speedup"]["end_to_end"] > 0 and "attention" not in native["speedup"]
    assert "--peers spargeattn" in sparge["reproduce"] and sparge["run"]["peer"] == "spargeattn"
    out = capsys.readouterr().out
    assert "peer spargeattn" in out and "is left out" in out
    page = build_page("out").read_text()
    assert '"method":"spargeattn"' in page
    csv = Path("out/sweep.csv").read_text()
    assert "peer cache-dit,accelerated,finished" in csv


def test_ids_of_cells_without_peers_are_as_before(write_grid, stubs):
    from svg.sweep.grid import cells_of, read_grid

    name = write_grid()
    before = {cell.label: cell.id for cell in cells_of(read_grid(name, {}), "cpu")}
    after = {cell.label: cell.id for cell in cells_of(read_grid(name, {"peers": ["spargeattn"]}), "cpu")}
    assert {**after, **before} == after and set(after) - set(before) == {"peer spargeattn"}
    assert all("peer" not in cell.run for cell in cells_of(read_grid(name, {}), "cpu"))


def test_a_package_is_asked_only_for_self_attention_without_a_mask(stubs):
    q, text = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 4, 8)
    undo = find_peer("spargeattn").begin(None)
    try:
        plain = F.scaled_dot_product_attention(q, text, text)
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(6, 6, dtype=torch.bool))
        assert stubs["sparge"] == 0 and plain.shape == q.shape
        F.scaled_dot_product_attention(q, q, q)
        assert stubs["sparge"] == 1
    finally:
        undo()


def test_unknown_peers_are_refused_with_the_line(write_grid, capsys):
    assert main(["sweep", write_grid(peers=["magic"]), "--out", "out"]) == 2
    assert "a peer must be one of sageattention, spargeattn, cache-dit, or diffusers:" in capsys.readouterr().err
    assert main(["sweep", write_grid(), "--peers", "diffusers:magic", "--out", "out"]) == 2
    assert not Path("out").exists()


def test_a_backend_that_cannot_run_says_why():
    assert why_not("diffusers:native") is None
    assert why_not("diffusers:sage") is not None  # needs a package that is not here


def test_prompts_of_a_file(write_grid):
    name = write_grid(prompts=["a red ball"], seeds=[0], methods=[{"method": "dense"}], control=False)
    Path("prompts.txt").write_text("# mine\na blue box\n\na green ring\n")
    assert main(["sweep", name, "--prompts", "prompts.txt", "--device", "cpu", "--out", "out"]) == 0
    summary = json.loads(Path("out/sweep.json").read_text())
    assert [cell["generation"]["prompt"] for cell in summary["cells"]] == ["a blue box", "a green ring"]
    frames = [np.load(f"out/{cell['frames']}")["frames"] for cell in summary["cells"]]
    assert (frames[0] != frames[1]).any()
    Path("empty.txt").write_text("# nothing\n")
    assert main(["sweep", name, "--prompts", "empty.txt", "--out", "other"]) == 2
