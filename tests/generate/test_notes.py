"""What a report tells its reader of the steps that were dense."""

from types import SimpleNamespace

import pytest
import torch

from svg.config import NearConfig
from svg.generate.report import _busy_notes, _notes

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


@pytest.mark.parametrize(
    ("dense", "accelerated", "changes", "told"),
    [
        ((109.4, 18.8), (36.5, 20.6), {}, "took 90.6 s dense and 15.9 s accelerated"),
        ((23.6, 8.2), (157.5, 108.1), {}, "took 15.4 s dense and 49.4 s accelerated"),
        ((23.6, 8.2), (36.5, 20.6), {}, None),  # as quiet as it gets
        ((10.0, 9.9), (2.0, 1.2), {}, None),  # too short to tell
        ((109.4, 18.8), (36.5, 20.6), {"cache": "first-block"}, None),  # which leaves work out
        ((109.4, 18.8), (36.5, 20.6), {"config": NearConfig(linears="all")}, None),  # which does it in 8 bits
        ((109.4, None), (36.5, None), {}, None),
    ],
)
def test_a_machine_that_was_busier_in_one_run_is_told(dense, accelerated, changes, told):
    runs = {"dense": dense, "accelerated": accelerated}
    runs = {name: {"seconds": {"transformer": all_, "attention": part}} for name, (all_, part) in runs.items()}
    job = SimpleNamespace(**{"config": NearConfig(), "cache": None, **changes})
    notes = _busy_notes(job, runs)
    assert len(notes) == (told is not None) and all(told in note and "run it again alone" in note for note in notes)
    assert _busy_notes(job, {"accelerated": runs["accelerated"]}) == []
