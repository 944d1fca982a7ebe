"""Checks SpargeAttn's kernels on this GPU against their references, and times a call and its tuning.

    python scripts/checks/sparge.py --out sparge.json [--no-timing]

Statistics and selection against plain PyTorch at Wan 720p's size, outputs poisoned beforehand, two runs compared bit for
bit, a plan and its attention in a CUDA graph, the filter of P V against a simulation in fp64, calls in 8 bits at every
position of the text against their plans, and thresholds found within their bound. Exits 1 when a check fails.
"""

import contextlib
import time
from collections.abc import Iterator

import torch
from harness import DEVICE, Check, begin, command_line, finish, judge_all, quietly, saving, show_result

from svg.attend import attend, dense_attention
from svg.bench.inputs import synthetic
from svg.bench.run import Bench, bench_ceilings, bench_sparge
from svg.bench.sweep import replaced
from svg.config import SpargeConfig
from svg.engine.execute import execute
from svg.engine.layout import TokenLayout
from svg.engine.state import LayerState, RunState
from svg.kernels import (
    block_sparse_attention_quantised,
    block_statistics,
    block_statistics_reference,
    sparge_block_map,
    sparge_block_map_reference,
)
from svg.kernels.block_sparse_quantised import hopper as sparse_hopper
from svg.kernels.block_sparse_quantised.triton import LAUNCH
from svg.kernels.common import target
from svg.kernels.quantize.precision import PRECISIONS
from svg.methods.sparge import plan as sparge
from svg.recordings import sparge_fit
from svg.recordings.sparge_fit import Sampling

WAN_720P = TokenLayout(21, 45, 80)
ALWAYS = {"warmup_steps": 0.0, "warmup_layers": 0.0}
LOG2_E = 1.4426950408889634


def main() -> None:
    args, machine = begin(command_line(__doc__))
    bench = Bench(f"python scripts/checks/sparge.py --seed {args.seed}", show_result, print)
    results = {**machine, "checks": [], "results": bench.results}
    save = saving(args.out, results)
    checks = [check_statistics, check_selection, check_graph, check_filter, check_calls, check_tuning]
    with torch.inference_mode():
        judge_all(checks, results["checks"], save)
        if not args.no_timing:
            bench_ceilings(bench)
            bench_sparge(bench)
            save()
    finish(results["checks"])


def tokens(S, dim, dtype, heads=3, batch=2):
    """[B, H, S, D] as views of [B, S, H, D], rows that vary slowly, some of them zero."""
    slow = torch.linspace(0, 9, S, device=DEVICE)[:, None, None] + torch.randn(heads, dim, device=DEVICE)
    x = slow.sin() + 0.7 * torch.randn(batch, S, heads, dim, device=DEVICE)
    x[:, S // 3 : S // 3 + 200] = 0
    return x.to(dtype).transpose(1, 2)


def check_statistics() -> Iterator[Check]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for S, dim in ((75_600, 128), (1_575, 64), (63, 96), (1, 128)):
            x = tokens(S, dim, dtype)
            order = torch.randperm(S, device=DEVICE).int() if S > 63 else None
            for size in (128, 64):
                found = block_statistics(x, size, order)
                exact = block_statistics_reference(x.double(), size, order)
                for name, ours, right in zip(found._fields, found, exact):
                    worst = (ours - right).abs().max()
                    yield f"{name}, blocks of {size}, S={S} D={dim} {dtype}".replace("torch.", ""), worst, 1e-5
    same = all(torch.equal(a, b) for a, b in zip(block_statistics(x, 64), block_statistics(x, 64)))
    yield "statistics repeat: differs", float(not same), 0


def check_selection() -> Iterator[Check]:
    q, k = (tokens(75_600, 128, torch.bfloat16) for _ in range(2))
    q_blocks, k_blocks = block_statistics(q, 128), block_statistics(k, 64)
    middle = k_blocks.similarity.median().item()
    for cdf, topk, simthresh in ((0.9, 1.0, -0.1), (1.0, 0.25, -0.1), (0.5, 0.5, middle), (1.0, 1.0, 0.99)):
        limits = {"simthresh": torch.full((3,), simthresh, device=DEVICE)}
        limits["cdf"] = torch.full((3,), cdf, device=DEVICE) if cdf < 1 else None
        options = {"topk": topk, "attention_sink": True, "sm_scale": 128**-0.5}
        found = sparge_block_map(q_blocks, k_blocks, **limits, **options)
        exact = sparge_block_map_reference(q_blocks, k_blocks, **limits, **options)
        # Sums in another order may keep one block more or less of a row; a count never does.
        rows = (found != exact).sum(-1)
        name = f"selection cdf {cdf} topk {topk} simthresh {simthresh:.2f}, density {found.float().mean():.3f}"
        yield f"{name}: blocks of a row that differ", rows.max(), 0 if cdf == 1 else 1
        yield f"{name}: share of rows that differ", (rows > 0).float().mean(), 0 if cdf == 1 else 0.01
        again = sparge_block_map(q_blocks, k_blocks, **limits, **options)
        yield f"{name}: repeat differs", (again != found).sum(), 0


def check_graph() -> Iterator[Check]:
    """Prediction and attention as one CUDA graph, replayed on other inputs."""
    layout = TokenLayout(5, 15, 21, 77, "last")
    mask = torch.arange(77, device=DEVICE) < torch.tensor([[13], [60]], device=DEVICE)
    eight = "int8-fp8" if target.has_fp8(torch.device(DEVICE)) else "int8-fp16"
    for precision in ("native", eight):
        config = SpargeConfig(**ALWAYS, cdf=0.7, simthresh=0.05, precision=precision)
        held = [tokens(layout.total_tokens, 64, torch.bfloat16).clone() for _ in range(3)]
        memory = LayerState(0, "cond", 0)

        def call(held=held, config=config, memory=memory):
            return execute(sparge.plan(*held, config, memory, layout, mask), *held, config.precision)

        call()
        torch.cuda.synchronize()
        quietly(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        for x in held:
            x.copy_(tokens(layout.total_tokens, 64, torch.bfloat16))
        expected = call().clone()
        graph.replay()
        torch.cuda.synchronize()
        yield f"plan and attention in a CUDA graph, {precision}: values that differ", (out != expected).sum(), 0


def check_filter() -> Iterator[Check]:
    """pv_threshold against attention in fp64 that leaves out the same tiles, for the launch's tile sizes."""
    height = torch.tensor([3.0, 5, 2, 0, 4.5, 1, 4, 6], device=DEVICE).repeat_interleave(64)
    for dim in (64, 128):
        q, k, v = (0.1 * torch.randn(1, S, 2, dim, device=DEVICE) for S in (189, 512, 512))
        q[..., 0], k[..., 0] = 1.5 * dim**0.5, height[:, None]
        v = (10 * v.abs() + 0.1) * torch.exp2(6 - height)[:, None, None]
        q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
        sizes = [torch.tensor([row] * 2, dtype=torch.int32, device=DEVICE) for row in ([128, 61], [64] * 8)]
        block_map = torch.rand(2, 2, 8, device=DEVICE) < 0.8
        index = torch.tensor([[0, 1]], device=DEVICE)
        limits = torch.tensor([0.5, 2.7], device=DEVICE)  # scores of two blocks are multiples of 1.08 apart
        for precision in ("int8-fp8", "int8-fp16") if target.has_fp8(q.device) else ("int8-fp16",):
            rows, tiles, same_sums = launched(precision, dim, q)
            arguments, options = (q, k, v, block_map, *sizes), {"map_index": index, "precision": precision}
            out = block_sparse_attention_quantised(*arguments, **options, pv_threshold=limits)
            with same_sums:  # as filtered calls take them, so that they can be compared bit for bit
                full = block_sparse_attention_quantised(*arguments, **options)
            expected, skips = skipping(q, k, v, block_map, limits.tolist(), rows, tiles)
            name = f"filter of P V, {precision} D={dim}, {skips} tiles skipped"
            yield f"{name}: error", relative(out, expected), 0.03
            yield f"{name}: error without the filter, inverted", 1 / relative(full, expected), 1 / 0.05
            never = block_sparse_attention_quantised(
                *arguments, **options, pv_threshold=torch.full_like(limits, torch.inf)
            )
            yield f"{name}: numbers that a filter that never applies changes", (never != full).sum(), 0


def launched(precision: str, dim: int, q: torch.Tensor):
    """Query rows of a tile, tiles of 64 keys that are kept or skipped together, and a context without `ONES`."""
    padded = 64 if dim <= 64 else 128
    row = target.launch_row(LAUNCH, q.device)[precision == "int8-fp8", padded]
    if sparse_hopper.supports(q, PRECISIONS[precision], row):
        return sparse_hopper.QUERY_ROWS, 2, replaced(sparse_hopper.ONES, padded, False)
    return row.block_m, row.block_n // 64, contextlib.nullcontext()


def skipping(q, k, v, block_map, limits, block_m, together):
    out, skips = torch.empty(q.shape, dtype=torch.float64, device=DEVICE), 0
    for h in range(2):
        for i, (start, stop) in enumerate(((0, 128), (128, 189))):
            selected = block_map[h, i].repeat_interleave(64)
            tiles = block_map[h, i].nonzero().squeeze(1).split(together)
            for first in range(start, stop, block_m):
                rows = slice(first, min(first + block_m, stop))
                scores = q[0, h, rows].double() @ k[0, h].double().T * q.shape[-1] ** -0.5
                top = torch.full((rows.stop - rows.start,), -torch.inf, dtype=torch.float64, device=DEVICE)
                kept = torch.zeros(512, dtype=torch.float64, device=DEVICE)
                for tile in tiles:
                    keys = (tile[:, None] * 64 + torch.arange(64, device=DEVICE)).flatten()
                    peak = scores[:, keys].amax(1)
                    stays = bool(((peak - top) * LOG2_E >= -limits[h]).any())
                    kept[keys] = stays
                    skips += not stays
                    top = torch.maximum(top, peak)
                p = scores.masked_fill(~selected, -torch.inf).softmax(-1)
                out[0, h, rows] = p * kept @ v[0, h].double()
    return out, skips


def relative(a, b):
    return (a.double() - b.double()).norm() / b.double().norm()


def check_calls() -> Iterator[Check]:
    """Whole calls at topk 1 against dense attention, and in 8 bits against 16."""
    for position in ("none", "first", "last"):
        layout = TokenLayout(5, 15, 21, 0 if position == "none" else 77, position)
        q, k, v = (tokens(layout.total_tokens, 128, torch.bfloat16).transpose(1, 2) for _ in range(3))
        dense = dense_attention(*(x.transpose(1, 2).double() for x in (q, k, v)), backend="math").transpose(1, 2)
        for order in ("hilbert", "rowmajor"):
            outs = {}
            for precision in ("native", "int8-fp8" if target.has_fp8(q.device) else "int8-fp16"):
                for topk in (0.3, 1.0):
                    config = SpargeConfig(**ALWAYS, topk=topk, order=order, precision=precision)
                    state = RunState(config, 1)
                    state.begin_forward(0, 1, "cond", layout)
                    outs[precision, topk] = attend(q, k, v, state, 0)
            (native, eight) = dict.fromkeys(precision for precision, _ in outs)
            name = f"text {position}, {order}"
            yield f"{name}: topk 1 against dense", relative(outs[native, 1.0], dense), 0.01
            yield f"{name}: topk 1, {eight}, against dense", relative(outs[eight, 1.0], dense), 0.06
            yield f"{name}: topk .3, {eight}, against native", relative(outs[eight, 0.3], outs[native, 0.3]), 0.06


def check_tuning() -> Iterator[Check]:
    """Thresholds of one layer of 8 heads at Wan 720p: the bound holds on the whole output, and it takes seconds."""
    inputs = synthetic(WAN_720P, 8, 128, DEVICE)
    q, k, v = inputs.heads_first()
    sampling, config = Sampling(), SpargeConfig()
    start = time.perf_counter()
    (call,) = sparge_fit.prepare(q, k, v, WAN_720P, None, config, sampling)
    chosen = [sparge_fit.fit_selection([sparge_fit.selection_curves(call, h, sampling)], 0.07) for h in range(8)]
    limits = [
        sparge_fit.fit_filter([sparge_fit.filter_curves(call, h, sampling, *chosen[h][:2])], 0.08) for h in range(8)
    ]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    density = sum(found[2] for found in chosen) / 8
    yield (
        f"tuning 8 heads at S=75600, seconds (density {density:.3f}, P V {sum(x[1] for x in limits) / 8:.3f})",
        seconds,
        20,
    )
    exact = dense_attention(q, k, v)
    for h, (simthresh, cdf, expected) in enumerate(chosen):
        part = [x[:, h : h + 1] for x in (q, k, v)]
        plan = sparge.plan(*part, SpargeConfig(cdf=cdf, simthresh=simthresh), LayerState(0, "cond", 0), WAN_720P)
        out = execute(plan, *part)
        error = (out.float() - exact[:, h : h + 1].float()).abs().sum() / exact[:, h : h + 1].float().abs().sum()
        yield f"tuned head {h}, simthresh {simthresh} cdf {cdf:.3f}: relative L1 (bound .07, sampled)", error, 0.1
        yield f"tuned head {h}: density against its estimate", (plan.density() - expected).abs().max(), 0.08


if __name__ == "__main__":
    main()
