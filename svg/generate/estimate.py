"""How long a run will take and what it holds, said once: after its third step, or after its first sparse one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import psutil
import torch

from svg.pipelines import StepProgress

from ..config import MethodConfig
from .job import Job

AFTER = 3  # steps; the first waits for what earlier work left behind


class Estimate:
    """Call it after every step.

    Args:
        pipe: the running pipeline.
        job: what is done.
        config: what this run computes with: its first steps may be dense ones.
        later: videos still to generate after this one, all of them dense.
        sparse_step: seconds of a sparse step, as the warm-up took it; None where none has run.
        say: told the estimate, as text.
    """

    def __init__(
        self,
        pipe: Any,
        job: Job,
        config: MethodConfig,
        later: int,
        sparse_step: float | None,
        say: Callable[[str], None],
    ):
        self._device, self._steps, self._later, self._say = pipe._execution_device, job.request.steps, later, say
        self._is_dense = [_is_dense(config, step, self._steps) for step in range(self._steps)]
        self._sparse_step = sparse_step
        self._ends = [0.0]
        self._said = False

    def __call__(self, progress: StepProgress) -> None:
        self._ends.append(progress.seconds)
        if self._said or progress.step < AFTER or progress.step == self._steps:
            return
        took = [later - before for before, later in itertools.pairwise(self._ends)]
        dense = _mean([seconds for seconds, is_dense in zip(took, self._is_dense) if is_dense])
        sparse = (
            _mean([seconds for seconds, is_dense in zip(took, self._is_dense) if not is_dense]) or self._sparse_step
        )
        paces = [dense if is_dense else sparse for is_dense in self._is_dense]
        known = [pace for pace in paces if pace is not None]
        if len(known) < len(paces):
            return
        self._said = True
        one, rest = sum(known), ""
        if self._later and dense is not None:
            rest = f", {clock(one + self._later * self._steps * dense)} for all {self._later + 1} runs"
        self._say(f"at this pace {clock(one)} for this video{rest}, decoding apart; {self._memory()}")

    def _memory(self) -> str:
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            return (
                f"{torch.cuda.max_memory_allocated(self._device) / 2**30:.1f} of {total / 2**30:.0f} GiB of GPU memory"
            )
        return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB of memory"


def _is_dense(config: MethodConfig, step: int, steps: int) -> bool:
    """Whether all layers of a step are dense: the last layer is the last to be sparse."""
    return config.method == "dense" or config.is_warmup(step, steps, 99, 100)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def clock(seconds: float) -> str:
    """Seconds as people say them.

    Args:
        seconds: >= 0.

    Returns:
        Such as "45 s", "12 min" or "2 h 05 min".
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
