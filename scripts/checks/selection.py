"""Checks the planning of attention over granules on this GPU against its specification, then times it.

    python scripts/checks/selection.py --out selection.json [--seed N] [--no-timing] [--sweep]

Cut, scores and lists with fresh random inputs, outputs poisoned beforehand, two runs compared bit for bit, device waits
forbidden, all three in a CUDA graph, and the size that is timed. Timing: 8 heads of 21 x 45 x 80 tokens, head dim 128,
bf16, with pools of 1, 2, 4 and 8 queries and groups of 64 and 128 rows, each kernel of the three operations by itself, and
the rest of a plan: k-means and the sort of its labels. Exits 1 when a check fails.
"""

import math
import traceback
from collections.abc import Callable, Iterator

import torch
from harness import DEVICE, Check, begin, command_line, finish, judge_all, quietly, saving

from svg.bench.inputs import synthetic
from svg.bench.timing import median_ms
from svg.engine.layout import TokenLayout
from svg.kernels.clustering.kmeans import kmeans
from svg.kernels.clustering.permute import sort_labels
from svg.kernels.granules import cut, scores, select
from svg.kernels.granules.reference import (
    cut_granules_reference,
    granule_scores_reference,
    select_granules_reference,
)
from svg.kernels.granules.scores import Launch

WAN_720P = TokenLayout(21, 45, 80)
BUDGET, FLOOR = 0.19, 0.5


def main() -> None:
    args, machine = begin(command_line(__doc__, sweep="also time other launches of the scores"))
    results = {**machine, "checks": [], "timing": {}}
    save = saving(args.out, results)
    timings = [] if args.no_timing else [time_operations, time_kernels, time_clustering]
    timings += [time_launches] if args.sweep else []
    with torch.inference_mode():
        judge_all([check_cut, check_scores, check_lists, check_graph, check_large], results["checks"], save)
        judge_all([in_turn(timing, results["timing"]) for timing in timings], results["checks"], save)
    finish(results["checks"])


def in_turn(timing: Callable[[], Iterator[tuple[str, float]]], milliseconds: dict[str, float]) -> Callable:
    """A timing as a check: it notes what it takes, and is a failed row where it raises."""

    def take() -> Iterator[Check]:
        for name, ms in timing():
            milliseconds[name] = ms
            print(f"     {name:<84} {ms:8.4f} ms", flush=True)
        yield f"{timing.__name__} ran", 0, 0

    take.__name__ = timing.__name__
    return take


def problem(B, H, V, L, D, dtype):
    """Views of [B, S, H, D] whose rows vary slowly, orders, and a text around the video."""
    S, first = V + L, L // 3
    slow = torch.linspace(0, 9, S, device=DEVICE)[:, None, None] + torch.randn(H, D, device=DEVICE)
    q, k, v = ((slow.sin() + torch.randn(B, S, H, D, device=DEVICE)).to(dtype).transpose(1, 2) for _ in range(3))
    near = torch.arange(V, device=DEVICE) + 40 * torch.rand(2, B, H, V, device=DEVICE)
    q_order, k_order = (near.argsort(-1) + first).int()
    text = prompt = None
    if L:
        places = torch.arange(S, device=DEVICE)
        text = torch.cat([places[:first], places[first + V :]]).int().expand(B, -1)
        prompt = torch.randint(0, L + 1, (B,), device=DEVICE)
    return q, k, v, q_order, k_order, text, prompt


SHAPES = (
    (2, 3, 1_575, 100, 128, torch.bfloat16, 16),
    (1, 2, 4_096, 0, 64, torch.float16, 16),
    (2, 2, 777, 7, 96, torch.bfloat16, 8),
    (1, 2, 1_000, 77, 128, torch.float32, 32),
    (1, 1, 5, 0, 64, torch.bfloat16, 16),
    (1, 2, 999, 64, 64, torch.float32, 64),
)


def far(found, exact):
    """Largest difference, against the largest value."""
    return (found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-30)


def check_cut() -> Iterator[Check]:
    for B, H, V, L, D, dtype, size in SHAPES:
        _, k, v, _, order, text, prompt = problem(B, H, V, L, D, dtype)
        found, again = (cut.cut_granules(k, v, order, size, text, prompt) for _ in range(2))
        exact = cut_granules_reference(k, v, order, size, text, prompt)
        name = f"cut V={V} L={L} D={D} {dtype} size={size}"
        for part in ("k", "v", "tokens"):
            yield f"{name}: {part} differs", not torch.equal(getattr(found, part), getattr(exact, part)), 0
        for part in ("k_mean", "v_mean"):
            yield (
                f"{name}: {part}",
                far(getattr(found, part), getattr(exact, part)),
                1e-6 if dtype == torch.float32 else 0.004,
            )
        for part in ("spread", "weight"):
            yield f"{name}: {part}", far(getattr(found, part), getattr(exact, part)), 2e-5
        yield f"{name}: two runs differ", unlike(found, again), 0
        few = cut.cut_granules(k, v, order, size, text, prompt, gather=False)
        parts = ("tokens", "k_mean", "v_mean", "spread", "weight")
        yield f"{name}: statistics differ", any(not torch.equal(getattr(found, p), getattr(few, p)) for p in parts), 0


def unlike(a, b) -> bool:
    pairs = [(x, y) for x, y in zip(vars(a).values(), vars(b).values()) if isinstance(x, torch.Tensor)]
    return any(not torch.equal(x, y) for x, y in pairs)


def check_scores() -> Iterator[Check]:
    for (B, H, V, L, D, dtype, size), (rows, pool) in zip(
        SHAPES * 2, ((128, 4), (64, 1), (64, 8), (128, 2), (128, 8), (64, 4), (128, 1), (64, 2), (128, 4), (64, 4), (64, 1), (128, 1))
    ):  # fmt: skip
        q, k, v, q_order, k_order, text, prompt = problem(B, H, V, L, D, dtype)
        granules = cut_granules_reference(k, v, k_order, size, text, prompt)
        found, again = (scores.granule_scores(q, q_order, granules, rows=rows, pool=pool) for _ in range(2))
        exact = granule_scores_reference(q, q_order, granules, rows=rows, pool=pool)
        name = f"scores V={V} D={D} {dtype} size={size} rows={rows} pool={pool}"
        yield f"{name}: relative", ((found - exact).abs() / (exact + 1e-5 * exact.max())).max(), 0.02
        yield f"{name}: relative, mean", ((found - exact).abs() / (exact + 1e-5 * exact.max())).mean(), 0.002
        yield f"{name}: two runs differ", not torch.equal(found, again), 0


def coarse(x):
    """Scores whose low bits, which are not compared, are 0."""
    return (x.view(torch.int32) & -128).view(torch.float32)


def in_lists(lists, H_NG_T):
    """bool: granules of each list, from its entries."""
    entries, starts, counts = lists.entries, lists.starts.flatten(), lists.counts.flatten()
    row = torch.repeat_interleave(torch.arange(len(counts), device=DEVICE), counts)
    place = torch.arange(len(row), device=DEVICE) - (counts.cumsum(0) - counts)[row]
    return row, entries[starts[row] + place].long(), place


def check_lists() -> Iterator[Check]:
    for B, H, NG, T, text, kind, per_head in (
        (2, 3, 13, 99, 5, "random", False), (1, 8, 37, 289, 0, "random", True), (2, 2, 9, 7, 3, "few", False),
        (1, 2, 5, 400, 0, "equal", True), (1, 2, 1, 1, 1, "zero", False), (1, 4, 21, 4_725, 14, "random", False),
        (1, 2, 5, 18_900, 0, "random", False),
    ):  # fmt: skip
        shape = (B, H, NG, T)
        random = torch.randn(shape, device=DEVICE).mul(4).exp() * torch.rand(B, H, NG, 1, device=DEVICE)
        values = {
            "random": random, "few": random.clamp_max(3).round(), "equal": torch.full_like(random, 0.3),
            "zero": torch.zeros_like(random),
        }[kind]  # fmt: skip
        tokens = torch.full((B, T + text), 16, dtype=torch.int32, device=DEVICE)
        tokens[:, T - 1] = 16 if T % 2 else 9
        if text > 1:
            tokens[0, T + 1 :] = 0
            tokens[0, T + 1] = 3
        for budget in (1e-4, BUDGET, 1.0, torch.rand(H, device=DEVICE) * 0.8 + 0.1):
            options = {"budget": budget, "floor": FLOOR, "size": 16, "rows": 128, "per_head": per_head}
            found, again = (select.select_granules(coarse(values), tokens, **options) for _ in range(2))
            exact = select_granules_reference(coarse(values), tokens, **options)
            share = "a head's own" if isinstance(budget, torch.Tensor) else budget
            name = f"lists {kind} NG={NG} T={T} text={text} budget={share} per_head={per_head}"
            same = all(torch.equal(getattr(found, p), getattr(exact, p)) for p in ("whole", "counts", "chosen"))
            same = same and all(torch.equal(a, b) for a, b in zip(in_lists(found, shape), in_lists(exact, shape)))
            yield f"{name}: differ", not same, 0
            same = all(
                torch.equal(getattr(found, p), getattr(again, p)) for p in ("starts", "whole", "counts", "chosen")
            )
            same = same and all(torch.equal(a, b) for a, b in zip(in_lists(found, shape), in_lists(again, shape)))
            yield f"{name}: two runs differ", not same, 0


def planned(q, k, v, q_order, k_order, text, prompt, rows=128, pool=4, budget=BUDGET):
    granules = cut.cut_granules(k, v, k_order, 16, text, prompt)
    found = scores.granule_scores(q, q_order, granules, rows=rows, pool=pool)
    return granules, select.select_granules(found, granules.tokens, budget=budget, floor=FLOOR, size=16, rows=rows)


def check_graph() -> Iterator[Check]:
    inputs = [x.contiguous() for x in problem(2, 3, 3_111, 100, 128, torch.bfloat16)]
    planned(*inputs)
    torch.cuda.synchronize()
    quietly(planned, *inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = planned(*inputs)
    for _ in range(2):
        fresh = problem(2, 3, 3_111, 100, 128, torch.bfloat16)
        for there, new in zip(inputs, fresh):
            there.copy_(new)
        graph.replay()
        exact = planned(*inputs)
        yield "graph: granules differ", unlike(found[0], exact[0]), 0
        listed = [in_lists(x[1], None) for x in (found, exact)]
        yield "graph: lists differ", any(not torch.equal(a, b) for a, b in zip(*listed)), 0


def large():
    inputs = synthetic(WAN_720P, 8, 128, DEVICE)
    q, k, v = inputs.heads_first()
    start = {"q": q, "k": k}
    centroids = {name: x[:, :, torch.randperm(x.shape[2], device=DEVICE)[:1000]].float() for name, x in start.items()}
    orders = {name: kmeans(x, centroids[name], 2).permutation for name, x in start.items()}
    return (q, k, v, orders["q"], orders["k"], None, None), centroids


def check_large() -> Iterator[Check]:
    inputs, _ = large()
    q, k, v, q_order, k_order, _, _ = inputs
    granules, lists = planned(*inputs)
    T = granules.k_mean.shape[2]
    exact = cut_granules_reference(k[:, :1], v[:, :1], k_order[:, :1], 16)
    yield "large: keys of a head differ", not torch.equal(granules.k[:, :1], exact.k), 0
    yield "large: spread", far(granules.spread[:, :1], exact.spread), 2e-5
    found = scores.granule_scores(q, q_order, granules, rows=128, pool=4)
    some = granule_scores_reference(q[:, :1], q_order[:, :1, -500:], exact, rows=128, pool=4)
    tail = scores.granule_scores(q[:, :1], q_order[:, :1, -500:], exact, rows=128, pool=4)
    yield "large: scores, relative", ((tail - some).abs() / (some + 1e-5 * some.max())).max(), 0.02
    chosen = torch.zeros(found.numel() // T, T, dtype=torch.bool, device=DEVICE)
    row, entry, _ = in_lists(lists, None)
    chosen[row, entry] = True
    allowed = math.floor(BUDGET * found.numel() + 1e-6)
    yield "large: granules above the budget", max(0, int(chosen.sum()) - allowed), 0
    yield "large: share of the budget left", 1 - int(chosen.sum()) / allowed, 0.001
    least = max(1, round(FLOOR * BUDGET * T))
    yield "large: granules below a row's floor", max(0, least - int(chosen.sum(1).min())), 0
    flat = found.view(-1, T).view(torch.int32) >> 7  # what is compared: the upper bits, equal ones by their place
    best = torch.zeros_like(chosen).scatter_(1, flat.argsort(dim=-1, descending=True, stable=True)[:, :least], True)
    lowest = flat.masked_fill(~chosen | best, 1 << 24).min()
    highest = flat.masked_fill(chosen, -1).max()
    yield "large: best score left out above the worst chosen beyond floors", max(0, int(highest - lowest)), 0
    yield "large: floors left out", int((best & ~chosen).sum()), 0


def time_operations():
    inputs, _ = large()
    q, k, v, q_order, k_order, _, _ = inputs
    granules = cut.cut_granules(k, v, k_order, 16)
    yield "cut_granules", median_ms(lambda: cut.cut_granules(k, v, k_order, 16))
    yield "cut_granules, statistics only", median_ms(lambda: cut.cut_granules(k, v, k_order, 16, gather=False))
    for rows in (128, 64):
        for pool in (8, 4, 2, 1):
            op = lambda: scores.granule_scores(q, q_order, granules, rows=rows, pool=pool)
            yield f"granule_scores rows={rows} pool={pool}", median_ms(op, 5, 1)
        found = scores.granule_scores(q, q_order, granules, rows=rows, pool=8)
        for per_head in (False, True):
            options = {"floor": FLOOR, "size": 16, "rows": rows, "per_head": per_head}
            op = lambda: select.select_granules(found, granules.tokens, budget=BUDGET, **options)
            yield f"select_granules rows={rows} per_head={per_head}", median_ms(op)
    yield "all three, rows=128 pool=4", median_ms(lambda: planned(*inputs))


def time_kernels():
    """Each kernel of one plan by itself."""
    inputs, _ = large()
    planned(*inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            planned(*inputs)
        torch.cuda.synchronize()
    for row in sorted(profile.key_averages(), key=lambda row: -row.device_time_total):
        yield f"kernel {row.key[:60]} x{row.count // 3}", row.device_time_total / 3000


def time_clustering():
    (q, k, *_), centroids = large()
    for iterations in (1, 2):
        yield (
            f"kmeans 1000 clusters, {iterations} iterations",
            median_ms(lambda n=iterations: kmeans(q, centroids["q"], n)),
        )
    labels = kmeans(k, centroids["k"], 1).labels
    yield "sort_labels 1000 clusters", median_ms(lambda: sort_labels(labels, 1000))
    yield "sort_labels 16000 labels", median_ms(lambda: sort_labels(labels * 16, 16_000))


def time_launches():
    """The scores' two products in other tiles; pool 4, rows 128."""
    (q, k, v, q_order, k_order, _, _), _ = large()
    granules = cut.cut_granules(k, v, k_order, 16, gather=False)
    for first in ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (256, 64, 8, 3), (64, 128, 4, 2)):
        yield f"launch normalizers {first}", _launched(q, q_order, granules, Launch(*first, 128, 64, 8, 3))
    for tile in ((128, 64, 8, 2), (128, 64, 8, 4), (64, 128, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2), (256, 64, 8, 3)):
        yield f"launch scores {tile}", _launched(q, q_order, granules, Launch(128, 128, 8, 2, *tile))


def _launched(q, q_order, granules, launch) -> float:
    def op():
        return scores._scores(q, q_order, granules, rows=128, pool=4, sm_scale=128**-0.5, launch=launch)

    try:
        return median_ms(op, 5, 1)
    except Exception:
        traceback.print_exc()
        return math.inf


if __name__ == "__main__":
    main()
