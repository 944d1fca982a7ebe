"""How long a run will take and what it holds, said once, after its third step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch

from svg.pipelines import StepProgress

from .job import Job

AFTER = 3  # steps; the first waits for what earlier work left behind


class Estimate:
    """Call it after every step.

    Args:
        pipe: the running pipeline.
        job: what is done.
        runs: videos still to generate, the running one among them.
        say: told the estimate, as text.
    """

    def __init__(self, pipe: Any, job: Job, runs: int, say: Callable[[str], None]):
        self._device, self._steps, self._runs, self._say = pipe._execution_device, job.request.steps, runs, say

    def __call__(self, progress: StepProgress) -> None:
        if progress.step != AFTER or self._steps <= AFTER:
            return
        one = progress.seconds / AFTER * self._steps
        rest = f", {clock(one * self._runs)} for all {self._runs} runs" if self._runs > 1 else ""
        self._say(f"at this pace {clock(one)} for this video{rest}, decoding apart; {self._memory()}")

    def _memory(self) -> str:
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            return (
                f"{torch.cuda.max_memory_allocated(self._device) / 2**30:.1f} of {total / 2**30:.0f} GiB of GPU memory"
            )
        return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB of memory"


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
