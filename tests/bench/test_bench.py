"""`svg bench` without a GPU: every section runs once on CPU tensors with a stopped clock, and its page is written."""

import functools
import json

import pytest
import torch

from svg.bench import elementwise, inputs, layers, linears, near, report, run, scale, sparge, sweep, whole_blocks
from svg.cli import main
from svg.cli.bench import BENCHES
from svg.engine.layout import TokenLayout

WAN, HUNYUAN = TokenLayout(3, 6, 8), TokenLayout(2, 6, 8, 8, "last")
SMALL_VIDEO = (9, 32, 48)


@pytest.fixture(scope="module")
def video():
    return inputs.record("cpu", SMALL_VIDEO)


@pytest.fixture
def small(monkeypatch):
    """The sections at small sizes on CPU tensors; every call runs once and takes a millisecond."""

    def once(op, *args):
        op()
        return 1.0

    for module in (run, layers, linears, near, sweep, elementwise, sparge, scale, whole_blocks):
        monkeypatch.setattr(module, "median_ms", once)
    monkeypatch.setattr(run, "_require_gpu", lambda: None)
    for name, value in {
        "DEVICE": "cpu", "MATMUL": 16, "COPY": 16, "HEADS": 2, "DIM": 64, "WAN_720P": WAN, "HUNYUAN_720P": HUNYUAN,
    }.items():  # fmt: skip
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(layers, "DEVICE", "cpu")
    for name, value in {"FRAMES": (2, 3), "GRID": (3, 4), "peak_bytes": lambda call: call().nbytes}.items():
        monkeypatch.setattr(scale, name, value)
    monkeypatch.setattr(linears, "FEED_FORWARD", 64)
    monkeypatch.setattr(linears, "LAYERS", {
        model: {name: (32, 48, users) for name, (_, _, users) in layers.items()} for model, layers in linears.LAYERS.items()
    })  # fmt: skip
    monkeypatch.setattr(scale, "dense_attention", lambda q, k, v, backend: q)
    monkeypatch.setattr(run, "dense_attention", lambda q, k, v, backend: q)
    monkeypatch.setattr(near, "dense_attention", lambda q, k, v, backend: q)
    monkeypatch.setattr(run, "recorded", functools.partial(inputs.recorded, size=SMALL_VIDEO))
    monkeypatch.setattr(layers, "wan_layer", functools.partial(layers.wan_layer, heads=2, dim=32, ffn=64))
    monkeypatch.setattr(layers, "hunyuan_layer", functools.partial(layers.hunyuan_layer, heads=2, dim=32))


def test_every_section_runs_and_every_goal_is_measured(small, video):
    shown, said = [], []
    bench = run.Bench(command="svg bench all", show=lambda key, entry: shown.append(key), say=said.append)
    for section in sorted(set(BENCHES) - {"quantised", "training", "all"}):
        run.run([section], bench)
    sizes = {"75600": WAN.total_tokens, "119056": HUNYUAN.total_tokens}
    for goal in (goal for goal in report.GOALS if "int8" not in goal):
        for full, tiny in sizes.items():
            goal = goal.replace(f"S{full}", f"S{tiny}").replace(f"M{full}", f"M{tiny}")
        assert goal in bench.results
    assert list(bench.results) == list(dict.fromkeys(shown))
    assert {
        "block_sparse/bf16/S144/density0.25/clusters/recall",
        "layer/wan14b_720p/bf16/speedup_fused_only",
        "layer/hunyuan_720p/fp8/speedup_linears_only",
        "layer/hunyuan_720p/error",
        "linear/fp8/M144/hunyuan/proj_out/exact_sums/speedup",
        "linear/int8-rows/M144/hunyuan/proj_out/speedup",
        "linear/passes/gelu_joined/tb_per_s",
        "sparge/int8_fp8/S144/topk0.25/speedup_vs_cudnn",
        "sparge/bf16/S144/topk0.25/rowmajor/recall",
        "sparge/int8_fp8/S144/topk0.25/pv20/ms",
        "scale/dense/cudnn/bf16/S24/ms",
        "scale/svg2/bf16/S36/clusters/memory_mib",
        "scale/svg2/bf16/S36/plan_ms",
    } <= set(shown)
    assert bench.results["scale/svg2/bf16/clusters/memory_exponent"]["value"] == pytest.approx(1)  # the output alone
    for entry in bench.results.values():
        assert tuple(entry) == report.FIELDS and entry["value"] >= 0
    assert "synthetic" not in " ".join(said)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_growth_is_a_power_of_the_larger_sizes(power):
    points = [(tokens, round(1e6 * tokens**power)) for tokens in (8, 16, 32, 64, 128, 300)]
    points[0] = (8, 5)  # small sizes don't count
    assert scale.exponent(points) == pytest.approx(power, abs=1e-4)


def test_without_a_gpu_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "attention", "--save"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "svg: error: svg bench needs a CUDA device" in error
    assert not list(tmp_path.iterdir())


def entry(value, unit="TFLOP/s", **changed):
    made = {
        "value": value, "unit": unit, "shape": "S=8", "density": 0.25, "inputs": "made up", "baseline": "dense 2 ms",
        "versions": {"torch": "2.11", "diffusers": None}, "command": "svg bench all", "date": "2026-01-02",
    }  # fmt: skip
    return made | changed


def test_results_are_saved_beside_earlier_ones_and_rendered(tmp_path):
    (tmp_path / "benchmarks.md").write_text("# Benchmarks\n\nSaid by hand.\n")
    key = "block_sparse/bf16/S75600/density0.25/tflops"
    report.save(tmp_path, "NVIDIA H100 80GB HBM3", {key: entry(559.0), "other": entry(1.5, "ms", density=None)})
    (tmp_path / "benchmarks" / "quality.json").write_text('{"seeds": [1, 2]}')
    path, page = report.save(tmp_path, "NVIDIA H100 80GB HBM3", {key: entry(561.0)})
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    saved = json.loads(path.read_text())
    assert saved[key]["value"] == 561 and saved["other"]["value"] == 1.5
    text = page.read_text()
    assert text.startswith("# Benchmarks\n\nSaid by hand.\n") and text.count(report.PAGE_START) == 1
    assert f"| `{key}` | 561 TFLOP/s | >= 560: yes | S=8 | 0.25 | made up | dense 2 ms |" in text
    assert "| `other` | 1.5 ms |  | S=8 |  | made up | dense 2 ms |" in text
    assert "- 2026-01-02, `svg bench all`: torch 2.11\n" in text and "quality" not in text


def test_a_result_without_a_field_is_refused(tmp_path):
    bad = entry(1.0)
    del bad["inputs"]
    with pytest.raises(ValueError, match="result a must have the fields value, unit"):
        report.save(tmp_path, "gpu", {"a": bad})


def test_recorded_tokens_fill_the_grid_and_keep_their_logits(video):
    tokens, source = video
    wanted = TokenLayout(source.frames + 1, 2 * source.height + 1, source.width, 5, "last")
    made = inputs.recorded(wanted, 2, 128, "cpu", torch.float32, size=SMALL_VIDEO)
    assert made.q.shape == (1, wanted.total_tokens, 2, 128)
    q, k, _ = made.heads_first()
    pair = torch.stack([tokens["q"][i, 0] @ tokens["k"][i, 1] for i in (0, 1)]).float().sum() * 64**-0.5
    got = q[0, 0, 0] @ k[0, 0, 1] * 128**-0.5
    assert (got - pair).abs() <= 0.15 * q[0, 0, 0].norm() * k[0, 0, 1].norm() * 128**-0.5
    column = wanted.width * (2 * source.height - 1)  # the mirror image of row 0
    assert (q[0, 0, column] - q[0, 0, 0]).norm() < 0.3 * q[0, 0, 0].norm()


def test_synthetic_tokens_reward_choosing_clusters():
    made = inputs.synthetic(TokenLayout(3, 10, 12), 2, 64, "cpu", torch.float32)
    plan = run.cluster_plan(made, 0.3, "clusters", 8, 24)
    q, k, _ = made.heads_first()
    density = plan.density().mean().item()
    assert 0.15 < density <= 0.3
    assert run.recall(plan, q, k) > 2 * density
    everything = run.cluster_plan(made, 1.0, "tiles", 8, 24)
    assert run.recall(everything, q, k) == pytest.approx(1, abs=1e-5)
