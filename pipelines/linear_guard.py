"""The guard of linears in 8 bits: probed outputs against the 16-bit product; a linear that fails goes back to its own precision.

The 16-bit weights wait in CPU memory, so each linear keeps a few of its output channels on its device: some tokens times those
channels, every `probe_every` steps, are enough to see that a layer has outliers. The error stays on the device until the next
forward begins, so that no call waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svg.config import MethodConfig
from svg.config.base import GuardedConfig
from svg.engine.deferred import DeferredReads

from .linears import QuantizedLinear

ROWS = 64  # tokens of a probe


class LinearGuard:
    """Watches the linears of one transformer that are in 8 bits.

    Args:
        transformer: the transformer.
        names: what `quantize_linears` returned.
        config: the method's settings: `guard`, `probe_every` and `tolerance` where it has them, else those of methods that do.
    """

    def __init__(self, transformer: nn.Module, names: Iterable[str], config: MethodConfig):
        found = {name: transformer.get_submodule(name) for name in names}
        self.linears = {name: linear for name, linear in found.items() if isinstance(linear, QuantizedLinear)}
        guard, every = (getattr(config, name, getattr(GuardedConfig, name)) for name in ("guard", "probe_every"))
        self.every: int = every if guard and self.linears else 0
        self.tolerance: float = getattr(config, "tolerance", GuardedConfig.tolerance)
        self.waits = config.linear_warmup
        for linear in self.linears.values() if self.every else ():
            linear.keep_sample()
        self._reads = DeferredReads()
        self.begin_run()

    def begin_run(self) -> None:
        """Forget the last run: every linear is in 8 bits again, so that the same seed gives the same video."""
        self._reads = DeferredReads()
        self._probed: dict[str, int] = {}
        self._largest: dict[str, float] = {}
        self.probes = 0
        for linear in self.linears.values():
            linear.begin_run()

    def begin_forward(self, step: int, branch: str, warm_up: bool = False) -> None:
        """Act on what the forward before found, and say whether this one probes.

        Args:
            step: index of the step, from 0.
            branch: guidance branch; each is probed every `probe_every` steps.
            warm_up: whether the step is one that the warm-up keeps dense.
        """
        try:
            for linear in self.linears.values() if self.waits else ():
                linear.wait(warm_up)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                "linear_warmup must be false where the GPU cannot hold the linears' 16-bit weights beside those in 8 bits, "
                f"as the dense steps need them: set it, or warmup_steps to 0 ({error})"
            ) from error
        if not self.every or (self.waits and warm_up):
            return
        self._reads.read()
        last = self._probed.get(branch)
        due = last is None or step - last >= self.every
        if due:
            self._probed[branch] = step
        for name, linear in self.linears.items():
            linear.probe = partial(self._compare, name, linear, step) if due and linear.own is None else None

    def _compare(self, name: str, linear: QuantizedLinear, step: int, x: Tensor, out: Tensor) -> None:
        """Queue the relative L2 error of some outputs; which tokens depends on the step alone."""
        x, out = x.flatten(0, -2), out.flatten(0, -2)
        if not len(x):
            return
        assert linear.sample is not None  # kept by each linear that is probed
        apart = max(1, len(x) // ROWS)
        rows = slice(step % apart, None, apart)
        exact = (x[rows][:ROWS].to(linear.sample.dtype) @ linear.sample.t()).float()
        got = out[rows][:ROWS, linear.sampled].float()
        if linear.bias is not None:
            got = got - linear.bias[linear.sampled].float()
        error = (got - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
        self._reads.add(error, partial(self._judge, name, linear))

    def _judge(self, name: str, linear: QuantizedLinear, numbers: list[float]) -> None:
        self.probes += 1
        error = numbers[0] if math.isfinite(numbers[0]) else math.inf
        self._largest[name] = max(self._largest.get(name, 0.0), error)
        if error > self.tolerance:
            linear.take_own()

    def summary(self) -> dict[str, Any] | None:
        """What the guard saw in this run; None where no linear is in 8 bits.

        Returns:
            linears: how many; precision: theirs; guard, or None where it is off: probes, largest_error {linear, error (None:
            not finite)}, own_precision (names of those that went back).
        """
        if not self.linears:
            return None
        self._reads.read()
        name, error = max(self._largest.items(), key=lambda one: one[1], default=(None, 0.0))
        worst = {"linear": name, "error": error if math.isfinite(error) else None}
        precisions = {linear.precision for linear in self.linears.values()}
        guard = {
            "probes": self.probes,
            "largest_error": None if name is None else worst,
            "own_precision": [
                name for name, linear in self.linears.items() if linear.own is not None and not linear.waiting
            ],
        }
        return {
            "linears": len(self.linears),
            "precision": ", ".join(sorted(precisions)),
            "guard": guard if self.every else None,
        }
