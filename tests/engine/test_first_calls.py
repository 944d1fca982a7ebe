"""Kernels compiled in parallel before they are launched, with a driver that stands in for a GPU."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from svg.config import NearConfig
from svg.engine import first_calls
from svg.kernels.common import ahead, target

pytestmark = [pytest.mark.skipif(target.INTERPRETED or not target.HAS_TRITON, reason="nothing is compiled")]
PROGRAM = Path(__file__).parents[1] / "support" / "ahead_run.py"


def traced(tmp_path, *arguments):
    run = subprocess.run(
        [sys.executable, "-P", PROGRAM, *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_what_near_launches_is_compiled_in_threads_and_found_by_the_call(tmp_path):
    found = traced(tmp_path, "near", "warmup_steps=0.2")
    kernels = Counter(found["kernels"])
    assert {
        "_hopper_assign_few_kernel",
        "_cut_kernel",
        "_scores_kernel",
        "_lists_kernel",
        "_hopper_granules_kernel",
    } <= set(kernels)
    assert (
        sum(kernels.values()) < 40 and kernels["_hopper_granules_kernel"] == 1
    )  # what is compiled to the same counts once
    assert found["quick"] >= 2 and found["threads"] == ["svg-compile"] and found["compiled again"] == 0
    assert found["records"] == 0 and found["order is real"]  # the run itself has seen nothing of it


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [
        (("near", "precision=int8-fp8"), "_hopper_granules_kernel"),
        (("sage2", "min_cosine=0.99"), "_hopper_attention_kernel"),
    ],
    ids=["near", "sage2"],
)
def test_what_the_guard_probes_with_is_compiled_too(tmp_path, settings, kernel):
    # Of the 16-bit kernel there are two: one repairs heads that failed, one computes what probed rows are compared with.
    assert Counter(traced(tmp_path, *settings)["kernels"])[kernel] == 2


def test_a_run_of_dense_steps_alone_compiles_nothing(tmp_path):
    assert traced(tmp_path, "near", "warmup_steps=1.0")["kernels"] == []


def test_a_cpu_has_nothing_to_compile(make_qkv, make_state, layout):
    q, k, v = make_qkv(layout)
    assert first_calls.begin(make_state(NearConfig(), layout), q, k, v, None, None) == []


def test_a_program_that_ends_does_not_wait_for_what_has_not_begun(monkeypatch):
    class Over:
        is_alive = staticmethod(lambda: False)

    compiled = []
    launch = ahead.Noted(None, (), {})
    monkeypatch.setattr(ahead.Noted, "compile", lambda self, device: compiled.append(device))
    cpu = torch.device("cpu")
    first_calls.finish(ahead.compile_together([launch], cpu))
    assert compiled == [cpu]
    monkeypatch.setattr(ahead.threading, "main_thread", Over)
    first_calls.finish(ahead.compile_together([launch], cpu))
    assert compiled == [cpu]


def test_a_call_that_depends_on_contents_compiles_as_it_runs(monkeypatch, make_state, layout):
    monkeypatch.setattr(first_calls, "_begun", set())
    monkeypatch.setattr(target, "use_triton", lambda x: True)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        q = torch.empty(1, layout.total_tokens, 2, 64, device="cuda")

    def attend(q, *rest):
        return bool(q.sum() > 0)

    assert first_calls.begin(make_state(NearConfig(warmup_steps=0.1), layout, step=0), q, q, q, None, attend) == []
