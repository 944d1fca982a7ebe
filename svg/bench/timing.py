"""How long a call takes on the GPU.

The GPU is kept busy while the host queues a call, as the layers before keep it in a model: short kernels are timed one after the
other and not as fast as Python launches them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BUSY_CYCLES = 4_000_000  # about 2 ms


def median_ms(op: Callable[[], Any], repeats: int = 7, warmup: int = 2) -> float:
    """Median GPU time of a call, in milliseconds.

    Args:
        op: what to time.
        repeats: timed calls.
        warmup: calls before them.

    Returns:
        The middle of the CUDA-event times.
    """
    events = []
    for i in range(repeats + warmup):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        op()
        end.record()
        if i >= warmup:
            events.append((begin, end))
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2]
