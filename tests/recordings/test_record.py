"""Recorded q, k, v: they are what attention saw, and methods are measured on them without a model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svg.attend import attend
from svg.cli import main
from svg.config import DenseConfig, SVG1Config, SVG2Config
from svg.engine.layout import TokenLayout
from svg.engine.plan import Plan
from svg.engine.state import RunState
from svg.methods.dense import dense_attention, key_mask
from svg.pipelines import GenerationRequest, load_pipeline
from svg.recordings.record import Recorder, open_recording, record
from svg.recordings.sweep import Measure, dense_rows, recall, sweep_recorded

REQUEST = GenerationRequest(prompt="a red ball", height=32, width=48, num_frames=9, steps=4)


@pytest.fixture(scope="session")
def recording(model, tmp_path_factory):
    """Steps 1 and 3, layers 0 and 2, both branches of a run of four steps."""
    path = tmp_path_factory.mktemp("recorded") / "qkv.safetensors"
    record(load_pipeline(model, device="cpu"), REQUEST, path, steps=[1, -1], layers=[0, -1], source={"model": "tiny"})
    return path


def test_layout(recording):
    found = open_recording(recording)
    assert [(c.step, c.layer) for c in found.calls] == [(1, 0), (1, 2)] * 2 + [(3, 0), (3, 2)] * 2
    assert [c.name for c in found.calls] == [str(i) for i in range(8)]
    assert {c.branch for c in found.calls} == {"cond", "uncond"}
    call = found.calls[0]
    assert (call.num_steps, call.num_layers, call.transformer) == (4, 3, "transformer")
    assert call.layout.total_tokens == 3 * 2 * 3
    q, k, v, text_mask = found.tensors(call)
    assert q.shape == k.shape == v.shape == (1, 2, 18, 16) and q.dtype == torch.float32 and text_mask is None
    assert found.source["model"] == "tiny" and found.source["generation"]["seed"] == 0


def test_tensors_are_what_attention_saw(model, recording, monkeypatch):
    """Against the arguments of scaled-dot-product attention in a plain pipeline's own processors."""
    pipe = load_pipeline(model, device="cpu")
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    attn = pipe.transformer.blocks[2].attn1
    inside = []
    attn.register_forward_pre_hook(lambda *_: inside.append(True))
    attn.register_forward_hook(lambda *_: inside.clear())

    def spy(query, key, value, **options):
        if inside:
            seen.append((query, key, value))
        return original(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    pipe.set_progress_bar_config(disable=True)
    pipe(
        "a red ball", height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=5.0, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert len(seen) == 8  # 4 steps x 2 branches
    found = open_recording(recording)
    for call, expected in zip([c for c in found.calls if c.layer == 2], (seen[2], seen[3], seen[6], seen[7])):
        for ours, theirs in zip(found.tensors(call)[:3], expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_pipeline_is_plain_afterwards_and_branches_choose(model, tmp_path):
    pipe = load_pipeline(model, device="cpu")
    before = list(pipe.transformer.attn_processors.values())
    calls = record(pipe, REQUEST, tmp_path / "a.safetensors", branches=["cond"])
    assert [(c.step, c.layer) for c in calls] == [(s, layer) for s in (0, 2, 3) for layer in range(3)]
    assert list(pipe.transformer.attn_processors.values()) == before
    for options, words in (
        ({"branches": ["other"]}, "cond, uncond"),
        ({"steps": [4]}, r"steps must be in \[-4, 4\)"),
        ({"layers": [3]}, r"layers must be in \[-3, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            record(pipe, REQUEST, tmp_path / "b.safetensors", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_padding_is_recorded(tmp_path):
    """The recorder on a state as HunyuanVideo has it: text at the end, the last tokens padding."""
    layout = TokenLayout(2, 2, 3, text_tokens=4, text_position="last")
    state = RunState(DenseConfig(), 1)
    tensors, calls = {}, []
    state.observer = Recorder(state, [0], None, None, tensors, calls)
    state.begin_forward(step=0, num_steps=1, branch="cond", layout=layout)
    q, k, v = (torch.randn(2, 16, 1, 8) for _ in range(3))
    text_mask = torch.tensor([[True] * 4, [True, True, False, False]])
    attend(q, k, v, state, 0, text_mask)
    assert (tensors["0.text_mask"] == text_mask).all() and torch.equal(tensors["0.q"], q.transpose(1, 2))
    assert calls[0].layout == layout
    measured = list(Measure("svg2", SVG2Config(num_q_clusters=2, num_k_clusters=3, top_p=1.0))(
        calls[0], tensors["0.q"], tensors["0.k"], tensors["0.v"], text_mask,
        *dense_rows(tensors["0.q"], tensors["0.k"], tensors["0.v"], key_mask(layout, text_mask)),
    ))  # fmt: skip
    assert measured[0]["density"] == pytest.approx(1) and measured[0]["recall"] == pytest.approx(1, abs=1e-5)
    assert measured[0]["error"] < 1e-5


def test_measures(recording, tmp_path):
    methods = [
        ("dense", DenseConfig()),
        ("all", SVG2Config(top_p=1.0, num_q_clusters=3, num_k_clusters=5)),
        ("half", SVG2Config(top_p=0.5, num_q_clusters=3, num_k_clusters=5, min_k_ratio=0.0)),
        ("svg1", SVG1Config(density=0.5, block_size=2)),
    ]
    result = sweep_recorded(recording, methods, torch.device("cpu"), tmp_path / "out", "svg sweep")
    assert json.loads((tmp_path / "out" / "recorded.json").read_text())["rows"] == result["rows"]
    assert len(result["rows"]) == 4 * 8 * 2
    for label in ("dense", "all"):
        for row in (row for row in result["rows"] if row["label"] == label):
            assert row["density"] == 1 and row["error"] < 1e-5 and row["recall"] == pytest.approx(1, abs=1e-5)
    for label in ("half", "svg1"):
        for row in (row for row in result["rows"] if row["label"] == label):
            assert 0 < row["density"] < 1 and 0 < row["recall"] < 1 and row["error"] > 1e-3


def test_recall_against_the_whole_map():
    """Recall and dense rows from their definitions, on a plan with permutations and two maps."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    permutations = torch.stack([torch.randperm(12), torch.randperm(12)])[None]
    sizes = torch.tensor([[5, 3, 4], [2, 4, 6]], dtype=torch.int32)
    block_map = torch.tensor([[[1, 0, 1], [0, 1, 0], [1, 1, 0]], [[1, 1, 0], [0, 0, 1], [0, 1, 1]]]).bool()
    plan = Plan(
        q_permutation=permutations, k_permutation=permutations.flip(1), q_sizes=sizes, k_sizes=sizes.flip(0),
        block_map=block_map, map_index=torch.tensor([[0, 1]], dtype=torch.int32), visible_keys=torch.tensor([12, 12]),
    )  # fmt: skip
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    expected = []
    for head in range(2):
        q_block = torch.empty(12, dtype=torch.long)
        q_block[plan.q_permutation[0, head]] = torch.arange(3).repeat_interleave(plan.q_sizes[head].long())
        k_block = torch.empty(12, dtype=torch.long)
        k_block[plan.k_permutation[0, head]] = torch.arange(3).repeat_interleave(plan.k_sizes[head].long())
        mask = block_map[head][q_block][:, k_block]
        expected.append((weights[0, head] * mask).sum(-1).mean().item())
    out, lse = dense_rows(q, k, v, None)
    assert recall(plan, q, k, v, lse) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(out, dense_attention(q, k, v), rtol=1e-5, atol=1e-5)
    visible = torch.arange(12)[None] < 9
    out, lse = dense_rows(q, k, v, visible)
    torch.testing.assert_close(out, dense_attention(q, k, v, visible), rtol=1e-5, atol=1e-5)


def test_command_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "3"]
    arguments = ["--model", str(model), *size, "--record-steps", "2", "--record-layers", "1", "--out", "a.safetensors"]
    assert main(["record", "a red ball", *arguments]) == 0
    assert "2 attention calls" in capsys.readouterr().out
    Path("grid.yaml").write_text(
        "methods:\n  - method: svg2\n    top_p: [0.5, 0.9]\n    num_k_clusters: 5\n"
        + "height: 32\nwidth: 48\nframes: 9\n"
    )
    assert main(["sweep", "grid.yaml", "--recorded", "a.safetensors", "--out", "out"]) == 0
    assert "svg2 top_p=0.5" in capsys.readouterr().out
    rows = json.loads(Path("out/recorded.json").read_text())["rows"]
    assert [(row["label"], row["branch"], row["head"]) for row in rows][:3] == [
        ("svg2 top_p=0.5", "cond", 0), ("svg2 top_p=0.5", "cond", 1), ("svg2 top_p=0.9", "cond", 0),
    ]  # fmt: skip


def test_not_a_recording(tmp_path):
    with pytest.raises(ValueError, match="not there; make one with `svg record`"):
        open_recording(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="a whole safetensors file"):
        open_recording(tmp_path / "a.safetensors")
    for metadata in (None, {"format": "svg-record", "version": "9"}):
        save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", metadata)
        with pytest.raises(ValueError, match="must be a recording"):
            open_recording(tmp_path / "b.safetensors")


def test_cut_recording(recording, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(recording.read_bytes()[:-100])
    with pytest.raises(ValueError, match="a whole safetensors file"):
        open_recording(tmp_path / "cut.safetensors")
