"""Numbers that a forward leaves on the device and the host reads before the next one, so that no call waits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor


class DeferredReads:
    """A queue of small tensors, each with what is to be done once its numbers are known."""

    def __init__(self):
        self._pending: list[tuple[Tensor, Callable[[list[float]], None]]] = []

    def add(self, numbers: Tensor, then: Callable[[list[float]], None]) -> None:
        """Queue a tensor.

        Args:
            numbers: float or integer, any shape; read in float32.
            then: told its numbers, in order of memory.
        """
        self._pending.append((numbers, then))

    def read(self) -> None:
        """Read what is queued, one transfer a device, and act on it in the order of the queue."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        by_device = defaultdict(list)
        for index, (numbers, _) in enumerate(pending):
            by_device[numbers.device].append(index)
        values: dict[int, list[float]] = {}
        for indices in by_device.values():
            parts = [pending[index][0].flatten().float() for index in indices]
            whole = (parts[0] if len(parts) == 1 else torch.cat(parts)).tolist()
            for index, part in zip(indices, parts):
                values[index], whole = whole[: len(part)], whole[len(part) :]
        for index, (_, then) in enumerate(pending):
            then(values[index])
