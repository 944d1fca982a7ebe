"""The whole SpargeAttn call, prediction counted, in 16 and 8 bits, its parts, and its filter of P V."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor

from svg.kernels.common import target

from ..config import ORDERS, SpargeConfig
from ..engine.execute import execute
from ..engine.plan import Plan
from ..engine.state import LayerState
from ..methods.sparge import plan as sparge
from .inputs import Inputs
from .timing import median_ms

PV_THRESHOLDS = (50.0, 20.0, 10.0, 5.0)


def bench_calls(
    bench,
    inputs: Inputs,
    whole_call: Callable[..., tuple[float, float]],
    recall: Callable[[Plan, Tensor, Tensor], float],
) -> None:
    """Time calls at topk 0.25.

    Args:
        bench: collects the results.
        inputs: what to attend with.
        whole_call: times `attend` with a config against dense cuDNN, and gives milliseconds and density.
        recall: share of dense attention's mass that a plan keeps.
    """
    q, k, v = inputs.heads_first()
    shape = f"B=1 H={q.shape[1]} S={q.shape[2]} D={q.shape[3]}"
    eight_bits = "int8-fp8" if target.has_fp8(q.device) else "int8-fp16"
    for order, precision in itertools.product(ORDERS, ("native", eight_bits)):
        config, memory = sparge_config(order=order, precision=precision), LayerState(0, "cond", 0)
        ms, density = whole_call(bench, config, inputs)

        def plan(config=config, memory=memory):
            return sparge.plan(q, k, v, config, memory, inputs.layout)

        made = plan()
        prefix = call_key(config, q.shape[2])
        about = {"density": density, "inputs": inputs.description, "baseline": f"whole call {ms:.2f} ms"}
        bench.note(f"{prefix}/plan_ms", median_ms(plan), "ms", shape, **about)
        attention_ms = median_ms(lambda made=made, precision=precision: execute(made, q, k, v, precision))
        bench.note(f"{prefix}/attention_ms", attention_ms, "ms", shape, **about)
        bench.note(f"{prefix}/recall", recall(made, q, k), "of the attention mass", shape, **about)
    for limit in PV_THRESHOLDS:
        whole_call(bench, sparge_config(precision=eight_bits, pv_threshold=limit), inputs)


def sparge_config(**settings) -> SpargeConfig:
    """SpargeAttn at topk 0.25, no step or layer dense."""
    return SpargeConfig(topk=0.25, warmup_steps=0.0, warmup_layers=0.0, **settings)


def call_key(config: SpargeConfig, tokens: int) -> str:
    """Such as sparge/int8_fp8/S75600/topk0.25; another order and the filter follow."""
    precision = "bf16" if config.precision == "native" else config.precision.replace("-", "_")
    order = "" if config.order == "hilbert" else f"/{config.order}"
    pv = "" if config.pv_threshold is None else f"/pv{config.pv_threshold:g}"
    return f"sparge/{precision}/S{tokens}/topk{config.topk:.2f}{order}{pv}"
