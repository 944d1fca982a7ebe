"""Whether attention computes what it should on every device of this machine, in seconds.

Limits are derived, not chosen: the reference runs on the very granules and lists that the device was given, in fp64, and
once more on the values' magnitudes, which bounds what rounding can do to each element of the output.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

TOKENS, HEADS, HEAD_DIM = (4, 8, 16), 2, 64
PEAK = 4.0  # factor of random queries: a few keys have most of the weight, as in a model, and the bounds are narrow


def self_test() -> dict[str, Any]:
    """Attention of a small random video on every device there is.

    Returns:
        Device -> {"sparse": {"error", "limit"}, "whole": {"error", "limit"}, "seconds"}, or {"failed": the reason}.
        "sparse" is near at four tenths of the map against its reference, "whole" near at the whole map against dense
        attention; errors and limits are relative L2.
    """
    import torch

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {name: _try(name) for name in names}


def _try(device: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        dtype = "float32" if device == "cpu" else "bfloat16"
        sparse, whole = _call(device, dtype, 0.4), _call(device, dtype, 1.0)
        found = {"sparse": _against(sparse, *_reference(sparse)), "whole": _against(whole, *_dense(whole))}
    except Exception as failure:
        return {"failed": f"{type(failure).__name__}: {' '.join(str(failure).split())}"}
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def passed(result: dict[str, Any]) -> bool:
    """Whether a device's result is within its limits; NaN is not."""
    return "failed" not in result and all(
        result[name]["error"] <= result[name]["limit"] for name in ("sparse", "whole")
    )


def _call(device: str, dtype: str, budget: float) -> Any:
    """One call of `near` as a pipeline makes it, observed: q, k, v, the plan and the output."""
    import torch

    from ..attend import attend
    from ..config import NearConfig
    from ..engine.layout import TokenLayout
    from ..engine.state import RunState

    draw = torch.Generator().manual_seed(0)
    frames, height, width = TOKENS
    shape = (1, frames * height * width, HEADS, HEAD_DIM)
    q, k, v = (factor * torch.randn(shape, generator=draw) for factor in (PEAK, 1, 1))
    q, k, v = (x.to(device, getattr(torch, dtype)) for x in (q, k, v))
    state, seen = RunState(NearConfig(budget=budget, warmup_steps=0.0, warmup_layers=0.0), num_layers=1), []
    state.observer = seen.append
    state.begin_forward(0, 1, "cond", TokenLayout(*TOKENS))
    out = attend(q, k, v, state, 0)
    return dataclasses.replace(seen[0], out=out.transpose(1, 2))


def _reference(call: Any) -> tuple[Any, Any]:
    """Output and bound of the reference on the granules and lists of a call: fp64, on the CPU."""
    from svg.kernels.granules.reference import granule_attention_reference

    (heads,), (lists,) = call.plan.stretches, call.plan.chosen.lists
    granules = call.plan.granules(call.k, call.v, heads)
    exact = {name: getattr(granules, name).cpu().double() for name in ("k", "v", "k_mean", "v_mean")}
    magnitudes = {name: value.abs() if name.startswith("v") else value for name, value in exact.items()}
    fields = {field.name: getattr(lists, field.name) for field in dataclasses.fields(lists)}
    lists = type(lists)(**{name: _on_cpu(value) for name, value in fields.items()})
    out = [
        granule_attention_reference(
            call.q.cpu().double(),
            dataclasses.replace(granules, tokens=granules.tokens.cpu(), **values),
            lists,
            q_order=call.plan.chosen.q_order.cpu(),
        )
        for values in (exact, magnitudes)
    ]
    return out[0], out[1]


def _dense(call: Any) -> tuple[Any, Any]:
    """As `_reference`, of dense attention."""
    q, k, v = (x.cpu().double() for x in (call.q, call.k, call.v))
    weights = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1)
    return weights @ v, weights @ v.abs()


def _against(call: Any, exact: Any, magnitudes: Any) -> dict[str, float]:
    """Relative error of a call, and the largest one that rounding explains.

    Weights and output are rounded to the inputs' dtype, scores and sums to fp32: each weight's relative error is at most
    twice that of its score, D products summed, and a sum over S tokens adds S roundings.
    """
    import torch

    single = torch.finfo(torch.float32).eps / 2
    q, k = call.q.cpu().double().abs(), call.k.cpu().double().abs()
    largest = (q @ k.transpose(-1, -2)).max().item() * HEAD_DIM**-0.5
    share = torch.finfo(call.q.dtype).eps + single * (2 * HEAD_DIM * largest + q.shape[2])
    out = call.out.cpu().double()
    return {
        "error": ((out - exact).norm() / exact.norm()).item(),
        "limit": (share * magnitudes.norm() / exact.norm()).item(),
    }


def _on_cpu(value: Any) -> Any:
    return value.cpu() if hasattr(value, "cpu") else value
