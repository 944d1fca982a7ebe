"""The guard of quantised attention: a head that fails is computed again without quantisation, in the same call.

A head fails when its sums are not finite or left the range of the quantised values (the kernels say so), or when probed
rows differ too much from unquantised attention over the same keys. Which heads failed is known on the device only: the
second computation is always launched, and its programs return at once for all other heads. Nothing waits for the
device; reports read the flags later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from .plan import CallPlan


@dataclass(frozen=True)
class GuardOutcome:
    """What the guard saw in one call; tensors stay on their device until a report reads them.

    Args:
        failed: int32 [B, H], not 0 for a head that was computed again.
        cosine: fp32 [], of the probed rows of all heads, before any head was computed again; None: nothing was probed.
    """

    failed: Tensor
    cosine: Tensor | None

    def cpu(self) -> GuardOutcome:
        """The same on the CPU."""
        return GuardOutcome(self.failed.cpu(), None if self.cosine is None else self.cosine.cpu())


def guarded(
    run: Callable[[Tensor], Tensor],
    plan: CallPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tolerance: float,
    probe: Random | None,
) -> tuple[Tensor, GuardOutcome]:
    """Quantised attention whose failed heads are computed again.

    Args:
        run: quantised attention; given int32 [B, H] of zeros, sets those of heads whose sums it cannot stand for.
        plan: which pairs of tokens `run` computes.
        q, k, v: float [B, H, S, D] in original order.
        tolerance: relative L2 error of a head's probed rows above which it failed.
        probe: private generator that chooses the rows to be probed; None: probe nothing in this call.

    Returns:
        out [B, H, S, D], and what the guard saw.
    """
    failed = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    out = run(failed)
    cosine = None
    if probe is not None:
        error, cosine = plan.probe_rows(q, k, v, out, probe)
        # Not "error > tolerance": NaN must fail.
        failed = failed | (~(error <= tolerance)).to(torch.int32)
    plan.repair(q, k, v, out, failed)
    return out, GuardOutcome(failed, cosine)
