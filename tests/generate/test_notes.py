"""What a report tells its reader of the steps that were dense."""

from types import SimpleNamespace

import pytest
import torch

from svg.config import NearConfig
from svg.generate.report import _notes

JOB = SimpleNamespace(model="elsewhere", config=NearConfig(), split="sequence")


@pytest.mark.parametrize(
    ("dense", "sparse_calls", "told"),
    [(0, 0.3, ["every step was sparse"]), (4, None, ["no attention call was sparse"]), (2, 0.3, [])],
)
def test_runs_without_a_dense_step_or_without_a_sparse_one_are_told(dense, sparse_calls, told):
    run = {"transformers": {"transformer": {"steps": {"total": 4, "dense": dense}, "quantised": None}}}
    report = {"runs": {"accelerated": run}, "quality": {}, "density": {"all_calls": 0.5, "sparse_calls": sparse_calls}}
    notes = _notes(JOB, torch.device("cuda"), report)
    assert [note.split(":")[0] for note in notes] == told
