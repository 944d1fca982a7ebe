"""`svg bench training` without a GPU: its section runs once on CPU tensors with a stopped clock."""

import pytest
from torch.nn.attention import SDPBackend

from svg.bench import report, run, sweep, training

pytestmark = pytest.mark.filterwarnings("ignore:svg.training_attention computes its plain PyTorch reference")


def test_the_section_runs_and_its_goal_is_measured(monkeypatch):
    def once(op, *args):
        op()
        return 1.0

    for module in (run, sweep, training):
        monkeypatch.setattr(module, "median_ms", once)
    for module in (run, training):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for name, value in {"MATMUL": 16, "COPY": 16, "HEADS": 2, "DIM": 64, "TRAINING_TOKENS": 80}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(training, "BASELINES", dict.fromkeys(training.BASELINES, SDPBackend.MATH))
    monkeypatch.setattr(run, "_require_gpu", lambda: None)
    launched = []
    for module, kernel in (
        (training.forward, "attend_packed"),
        (training.backward, "query_gradient"),
        (training.backward, "key_gradients"),
    ):
        monkeypatch.setattr(module, kernel, lambda *args, kernel=kernel: launched.append(kernel))
    bench = run.Bench("svg bench training --sweep", lambda key, entry: None, lambda line: None, sweep=True)
    run.run(["training"], bench)
    goals = [goal.replace("S32768", "S80") for goal in report.GOALS if goal.startswith("training/")]
    assert goals and set(goals) <= set(bench.results)
    rows = [key for key in bench.results if "/sweep/" in key]
    candidates = list(training.forward.candidates())
    for products in training.PRODUCTS:
        candidates += training.backward.query_candidates(products)
        candidates += training.backward.key_candidates(products)
    assert len(rows) == len(candidates)
    assert set(launched) == {"attend_packed", "query_gradient", "key_gradients"}
