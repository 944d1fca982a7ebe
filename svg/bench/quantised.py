"""8-bit attention, dense and block-sparse, beside SDPA's cuDNN and FlashAttention in bf16; and other launch rows."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from svg.kernels.block_sparse_quantised import hopper as sparse_hopper
from svg.kernels.block_sparse_quantised import triton as sparse_module
from svg.kernels.common import quantised_tile, target
from svg.kernels.dense_quantised import hopper as quantised_hopper
from svg.kernels.dense_quantised.triton import LAUNCH, attend_quantized, quantize_inputs, runs_specialised
from svg.kernels.quantize.precision import PRECISIONS, SPARSE_PRECISIONS, Quantisation

from ..config import Sage2Config
from ..engine.execute import execute
from ..engine.guard import guarded
from ..engine.plan import Plan
from ..methods.dense import dense_attention
from ..methods.sage.precision import dense_plan, quantised
from .sweep import replaced, time_or_none
from .timing import median_ms

DEVICE = "cuda"
INPUTS = "normal, channel means in K and V"


def bench_dense(bench, S: int, heads: int, dim: int, prefix: str) -> None:
    """Quantised dense attention: alone, with smoothing and quantisation, in the safe mode, and under the guard.

    NVFP4 is timed where the GPU has it; an emulation is not worth a number.

    Args:
        bench: collects the results.
        S: tokens.
        heads: H.
        dim: D.
        prefix: what follows the precision in a key, such as "S75600" or "d64/S45106".
    """
    q, k, v = inputs(S, heads, dim)
    shape, flops = f"B=1 H={heads} S={S} D={dim}", 4 * heads * S * S * dim
    times = {
        name: median_ms(lambda name=name: dense_attention(q, k, v, backend=name), 5) for name in ("cudnn", "flash")
    }
    for name, ms in times.items():
        bench.note(f"dense/{name}/bf16/{prefix}/tops", flops / ms / 1e9, "TOPS", shape, density=1, inputs=INPUTS)
    about = {"density": 1, "inputs": INPUTS, "baseline": f"cuDNN dense bf16 {times['cudnn']:.2f} ms"}
    for precision in (*SPARSE_PRECISIONS, "nvfp4"):
        if not target.has_fp4(q.device) if precision == "nvfp4" else not runs(precision, q.device):
            bench.say(f"{precision} is left out: this GPU has no such units")
            continue
        key = f"dense/{precision.replace('-', '_')}/{prefix}"
        run = quantised(precision, Sage2Config(), q, k, v, None)
        ms = median_ms(lambda run=run: run(None), 5)
        bench.note(f"{key}/tops_with_quantisation", flops / ms / 1e9, "TOPS", shape, **about)
        bench.note(f"{key}/speedup_vs_cudnn", times["cudnn"] / ms, "x", shape, **about)
        _guarded(bench, run, q, k, v, ms, key, shape, about)
        if precision != "nvfp4":
            _alone(bench, q, k, v, precision, key, flops, shape, about)


def runs(precision: str, device: torch.device) -> bool:
    """Whether a device has the units of a precision."""
    return target.has_fp8(device) or not PRECISIONS[precision].fp8


def _guarded(
    bench, run: Callable, q: Tensor, k: Tensor, v: Tensor, plain: float, key: str, shape: str, about: dict
) -> None:
    plan = dense_plan(q, None)
    for name, probes in (("guard_share", False), ("guard_share_probed", True)):

        def whole(probes=probes) -> Tensor:
            probe = Random(0) if probes else None
            return guarded(run, plan, q, k, v, tolerance=0.25, probe=probe)[0]

        bench.note(f"{key}/{name}", median_ms(whole, 5) / plain - 1, "", shape, **about)


def _alone(
    bench, q: Tensor, k: Tensor, v: Tensor, precision: str, key: str, flops: float, shape: str, about: dict
) -> None:
    how = Quantisation(precision, smooth_q=False)
    scale, out = q.shape[-1] ** -0.5, torch.empty_like(q)

    interleave = runs_specialised(q, how, plain=True)

    def prepare():
        return quantize_inputs(q, k, v, how, sm_scale=scale, interleave=interleave)

    ready = prepare()
    bench.note(f"{key}/quantisation_ms", median_ms(prepare), "ms", shape, **about)
    ms = median_ms(lambda: attend_quantized(ready, out, False, scale, False), 5)
    bench.note(f"{key}/tops", flops / ms / 1e9, "TOPS", shape, **about)
    if not bench.sweep or PRECISIONS[precision].acc16:
        return
    if interleave:
        for row in quantised_hopper.candidates():
            with replaced(quantised_hopper.LAUNCH, 64 if q.shape[-1] <= 64 else 128, row):
                ms = time_or_none(lambda: attend_quantized(ready, out, False, scale, False))
            if ms is not None:
                bench.note(f"{key}/sweep/{row.name()}/tops", flops / ms / 1e9, "TOPS", shape, **about)
    table = target.launch_row(LAUNCH, q.device)
    ready = quantize_inputs(q, k, v, how, sm_scale=scale)
    for row in quantised_tile.candidates():
        with replaced(table, (precision == "int8-fp8", 64 if q.shape[-1] <= 64 else 128), row):
            ms = time_or_none(lambda: attend_quantized(ready, out, False, scale, False))
        if ms is not None:
            bench.note(f"{key}/sweep/{row.name()}/tops", flops / ms / 1e9, "TOPS", shape, **about)


def bench_sparse(bench, plan: Plan, q: Tensor, k: Tensor, v: Tensor, density: float, description: str) -> None:
    """Quantised block-sparse attention on a plan, smoothing and quantisation counted.

    Args:
        bench: collects the results.
        plan: which blocks.
        q, k, v: bf16 [B, H, S, D].
        density: what was asked for, for the key.
        description: of the inputs.
    """
    B, H, S, D = q.shape
    got = plan.density().mean().item()
    shape, flops = f"B={B} H={H} S={S} D={D}", 4 * B * H * S * S * D * got
    native = median_ms(lambda: execute(plan, q, k, v))
    about = {
        "density": got,
        "inputs": description,
        "baseline": f"the same plan in bf16 {native:.2f} ms, gathers counted",
    }
    for precision in SPARSE_PRECISIONS:
        if not runs(precision, q.device):
            continue
        key = f"block_sparse/{precision.replace('-', '_')}/S{S}/density{density:.2f}"
        ms = median_ms(lambda p=precision: execute(plan, q, k, v, p))
        bench.note(f"{key}/tops_with_quantisation", flops / ms / 1e9, "TOPS", shape, **about)
        if bench.sweep and density == 0.25 and not PRECISIONS[precision].acc16:
            _sweep_sparse(bench, plan, (q, k, v), precision, key, flops, shape, about)


def _sweep_sparse(
    bench,
    plan: Plan,
    qkv: tuple[Tensor, Tensor, Tensor],
    precision: str,
    key: str,
    flops: float,
    shape: str,
    about: dict,
) -> None:
    table = target.launch_row(sparse_module.LAUNCH, qkv[0].device)
    if precision == "int8-fp8" and target.launch_row(sparse_module.LAUNCH, qkv[0].device)[True, 128].specialised:
        with replaced(sparse_hopper.ONES, 64 if qkv[0].shape[-1] <= 64 else 128, True):
            ms = time_or_none(lambda: execute(plan, *qkv, precision))
        if ms is not None:
            bench.note(f"{key}/sweep/ones/tops_with_quantisation", flops / ms / 1e9, "TOPS", shape, **about)
    for row in quantised_tile.candidates():
        with replaced(table, (precision == "int8-fp8", 64 if qkv[0].shape[-1] <= 64 else 128), row):
            ms = time_or_none(lambda: execute(plan, *qkv, precision))
        if ms is not None:
            bench.note(f"{key}/sweep/{row.name()}/tops_with_quantisation", flops / ms / 1e9, "TOPS", shape, **about)


def inputs(S: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, H, S, D] as views of [1, S, H, D], with channel means in K and V.

    Args:
        S: tokens.
        heads: H.
        dim: D.
        dtype: of the result.
    """
    means = (0, 4, 2)
    made = (torch.randn(1, S, heads, dim, device=DEVICE) + mean * torch.randn(dim, device=DEVICE) for mean in means)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in made)
    return q, k, v
