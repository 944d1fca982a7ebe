"""Checks attention over lists of granules on this GPU against its specification, then times it.

    python scripts/checks/granules.py --out granules.json [--sweep] [--no-timing]

Fresh random inputs, outputs poisoned beforehand, two runs compared bit for bit, device waits forbidden, a CUDA graph, and
the size that is timed. Timing: 8 heads of 75,600 tokens, head dim 128, N(0, 1), lists of random granules at several total
densities with and without a tail, against lists of whole tiles, block-sparse attention over random tiles of 128 x 64, and
cuDNN. Useful work: pairs of queries and listed keys, and of queries and means. Exits 1 when a check fails.
"""

import dataclasses
import itertools
import statistics

import torch
import torch.nn.functional as F
from harness import DEVICE, begin, command_line, finish, judge_all, poison_memory, quietly, saving
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg.kernels import block_sparse_attention
from svg.kernels.granules import hopper, op, reference, values

HEADS, TOKENS, HEAD_DIM = 8, 75_600, 128
DENSITIES = (0.10, 0.25, 0.50)
STAGES = ((128, 2), (128, 3), (64, 4), (64, 6))  # keys of a stage, stages


def main() -> None:
    args, machine = begin(command_line(__doc__, sweep="also time other stages and sizes of granules"))
    results = {**machine, "checks": [], "timing": []}
    save = saving(args.out, results)
    judge_all([check_shapes, check_edges, check_graph, check_large], results["checks"], save)
    if not args.no_timing:
        for row in time_all(args.sweep):
            results["timing"].append(row)
            save()
    finish(results["checks"])


def problem(B, H, V, text, D, dtype, *, size=16, rows=128, density=0.3, chosen=None):
    """q as a view of [B, S, H, D], granules, lists and the order of the queries; half a prompt in the last sample."""
    S = V + text
    q, k, v = (torch.randn(B, S, H, D, device=DEVICE, dtype=dtype).transpose(1, 2) for _ in range(3))
    q_order, k_order = (torch.rand(B, H, V, device=DEVICE).argsort(-1).int() for _ in range(2))
    words = prompt = None
    if text:
        words = torch.arange(V, S, device=DEVICE).expand(B, text)
        prompt = torch.full((B,), text, device=DEVICE)
        prompt[-1] = text // 2
    granules = reference.cut_granules_reference(k, v, k_order, size, words, prompt)
    T = granules.k_mean.shape[2]
    if chosen is None:
        chosen = torch.rand(B, H, -(-V // rows), T, device=DEVICE) < density
    chosen = chosen | (granules.tokens[:, None, None, :T] < size)
    return q, granules, reference.lists_of(chosen, granules.tokens, size, rows), q_order


def in_fp64(granules):
    wide = {name: getattr(granules, name).double() for name in ("k", "v", "k_mean", "v_mean")}
    return dataclasses.replace(granules, **wide)


def errors(name, arguments, tail, limit):
    """Worst row group's relative error of the output (limit: of its dtype), worst lse, and a second run's bits."""
    q, granules, lists, q_order = arguments

    def call():
        return op.granule_attention(q, granules, lists, q_order=q_order, tail=tail, return_lse=True)

    call()  # compile
    poison_memory()
    out, lse = quietly(call)
    again = call()
    exact, exact_lse = reference.granule_attention_reference(
        q.double(), in_fp64(granules), lists, q_order=q_order, tail=tail, return_lse=True
    )
    yield f"{name}: output", relative(out, exact, q_order, lists.rows), limit
    wrong = torch.where(lse == exact_lse, 0, (lse - exact_lse).abs()).max()
    yield f"{name}: lse", wrong.nan_to_num(torch.inf), 2e-4
    yield f"{name}: entries that differ in a second run", (out != again[0]).sum() + (lse != again[1]).sum(), 0


def relative(out, exact, q_order, rows):
    """The largest |out - exact| / |exact| of a row group."""
    index = q_order.long()[..., None].expand(-1, -1, -1, out.shape[-1])
    parts = [x.double().gather(2, index).split(rows, 2) for x in (out, exact)]
    norms = [
        (a - b).flatten(2).norm(dim=2) / b.flatten(2).norm(dim=2).clamp_min(1e-9) for a, b in zip(*parts, strict=True)
    ]
    return torch.stack(norms).max().nan_to_num(torch.inf)


LIMITS = {torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float32: 2e-5}


def check_shapes():
    for dtype, D, tail in (
        (torch.bfloat16, 128, True), (torch.bfloat16, 128, False), (torch.float16, 128, True), (torch.bfloat16, 64, True),
        (torch.bfloat16, 96, True), (torch.float32, 128, True),
    ):  # fmt: skip
        V, text = (int(torch.randint(low, high, ())) for low, high in ((1500, 3000), (20, 300)))
        name = f"{str(dtype)[6:]} D={D} V={V} text={text} tail={tail}"
        yield from errors(name, problem(2, 3, V, text, D, dtype), tail, LIMITS[dtype])
    for size, rows in ((8, 128), (64, 128), (16, 64)):
        V = int(torch.randint(1500, 3000, ()))
        arguments = problem(1, 2, V, 100, 128, torch.bfloat16, size=size, rows=rows)
        yield from errors(f"bf16 V={V} granules of {size}, {rows} rows", arguments, True, LIMITS[torch.bfloat16])


def check_edges():
    """Lists of every length up to three stages, none at all, everything, and fewer keys than a granule."""
    limit = LIMITS[torch.bfloat16]
    T = 160
    chosen = torch.arange(T, device=DEVICE) < torch.arange(25, device=DEVICE)[:, None]
    chosen = chosen[:, torch.randperm(T, device=DEVICE)].expand(1, 2, 25, T)
    for tail in (True, False):
        arguments = problem(1, 2, 25 * 128, 0, 128, torch.bfloat16, chosen=grown(chosen, 200))
        yield from errors(f"lists of 0 to 24 granules, tail={tail}", arguments, tail, limit)
    yield from errors("everything listed", problem(2, 2, 1000, 77, 128, torch.bfloat16, density=2.0), True, limit)
    yield from errors("5 tokens", problem(2, 2, 5, 0, 128, torch.bfloat16), True, limit)
    yield from errors("5 tokens, 3 of text", problem(1, 2, 5, 3, 128, torch.bfloat16), True, limit)


def grown(chosen, T):
    """More granules, none of them chosen."""
    return F.pad(chosen, (0, T - chosen.shape[-1]))


def check_graph():
    q, granules, lists, q_order = problem(1, 4, 5000, 100, 128, torch.bfloat16)
    expected = op.granule_attention(q, granules, lists, q_order=q_order)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.granule_attention(q, granules, lists, q_order=q_order)
    out.fill_(float("nan"))
    graph.replay()
    yield "a CUDA graph: entries that differ", (out != expected).sum(), 0


def check_large():
    """The size that is timed: some row groups of every head, the last one among them."""
    q, granules, lists, q_order = timed_problem(0.25 - 1 / 16)
    out = op.granule_attention(q, granules, lists, q_order=q_order)
    worst = 0.0
    groups = lists.counts.shape[2]
    for h in range(HEADS):
        for g in (*torch.randint(groups, (3,)).tolist(), groups - 1):
            head, group = slice(h, h + 1), slice(g, g + 1)
            part = in_fp64(sliced(granules, ("k", "v", "k_mean", "v_mean"), (slice(None), head)))
            few = sliced(lists, ("starts", "whole", "counts", "chosen"), (slice(None), head, group))
            order = q_order[:, head, g * 128 : (g + 1) * 128]
            exact = reference.granule_attention_reference(q[:, head].double(), part, few, q_order=order)
            worst = max(worst, float(relative(out[:, head], exact, order, 128)))
    yield f"bf16 {HEADS} heads of {TOKENS} tokens, sampled row groups: output", worst, LIMITS[torch.bfloat16]


def sliced(value, names, index):
    return dataclasses.replace(value, **{name: getattr(value, name)[index] for name in names})


def timed_problem(exact, kind="random", size=16):
    """Lists whose exact density is `exact`: of random granules, of random whole tiles, or of uneven rows."""
    T, groups = -(-TOKENS // size), -(-TOKENS // 128)
    chosen = None
    if kind == "tiles":
        each = 128 // size
        tiles = torch.rand(1, HEADS, groups, -(-T // each), device=DEVICE) < exact
        chosen = tiles.repeat_interleave(each, -1)[..., :T]
    elif kind == "uneven":  # rows from almost nothing to three times as much
        share = torch.rand(1, HEADS, groups, 1, device=DEVICE).square() * 3 * exact
        chosen = torch.rand(1, HEADS, groups, T, device=DEVICE) < share
    return problem(1, HEADS, TOKENS, 0, HEAD_DIM, torch.bfloat16, size=size, density=exact, chosen=chosen)


def work(lists, granules, tail):
    """Useful floating-point operations."""
    queries = torch.full((lists.counts.shape[2],), 128, device=DEVICE, dtype=torch.float64)
    queries[-1] = TOKENS - 128 * (len(queries) - 1)
    means = granules.k_mean.shape[2] if tail else 0
    return 4 * HEAD_DIM * float((queries * (lists.counts.double() * granules.size + means)).sum())


def time_all(sweep):
    for density in DENSITIES:
        cases, flops = {}, {}
        for tail, kind in itertools.product((False, True), ("random", "tiles", "uneven")):
            exact = density - 1 / 16 if tail else density
            q, granules, lists, order = timed_problem(exact, kind)
            name = f"granules {kind} tail={tail}"
            flops[name] = work(lists, granules, tail)
            cases[name] = lambda a=(q, granules, lists), o=order, t=tail: op.granule_attention(*a, q_order=o, tail=t)
        cases["block_sparse, tiles of 128 x 64"], flops["block_sparse, tiles of 128 x 64"] = tiles_case(density)
        cases["cuDNN, dense"], flops["cuDNN, dense"] = dense_case()
        rows = timed(cases, flops, density)
        yield from rows
        rates = {row["name"]: row["tflops"] for row in rows}
        for tail in (False, True):
            share = rates[f"granules random tail={tail}"] / rates[f"granules tiles tail={tail}"]
            print(
                f"{'ok  ' if share >= 0.95 else 'MISS'} density {density} tail={tail}: {share:.1%} of whole tiles' rate"
            )
            yield {"name": f"share of whole tiles' rate, tail={tail}", "density": density, "share": share, "goal": 0.95}
    if sweep:
        yield from time_sweep()


def tiles_case(density):
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    sizes = []
    for size in (128, 64):
        blocks = torch.full((HEADS, -(-TOKENS // size)), size, device=DEVICE, dtype=torch.int32)
        blocks[:, -1] = TOKENS - size * (blocks.shape[1] - 1)
        sizes.append(blocks)
    block_map = torch.rand(HEADS, sizes[0].shape[1], sizes[1].shape[1], device=DEVICE) < density
    index = torch.arange(HEADS, device=DEVICE, dtype=torch.int32)[None]
    order = torch.rand(1, HEADS, TOKENS, device=DEVICE).argsort(-1).int()
    pairs = torch.einsum("mi,mij,mj->", sizes[0].double(), block_map.double(), sizes[1].double())
    return (
        lambda: block_sparse_attention(q, k, v, block_map, *sizes, map_index=index, q_permutation=order),
        4 * HEAD_DIM * float(pairs),
    )


def dense_case():
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))

    def call():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return call, 4 * HEAD_DIM * HEADS * TOKENS**2


def timed(cases, flops, density, repeats=7):
    """Medians of runs in turn, so that all cases see the same clocks."""
    for call in cases.values():
        call()
    spans = {name: [] for name in cases}
    for _, (name, call) in itertools.product(range(repeats), cases.items()):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        spans[name].append((begin, end))
    torch.cuda.synchronize()
    rows = []
    for name, events in spans.items():
        ms = statistics.median(begin.elapsed_time(end) for begin, end in events)
        rows.append({"name": name, "density": density, "ms": ms, "tflops": flops[name] / ms / 1e9})
        print(f"density {density:<5} {name:<52} {ms:9.3f} ms {rows[-1]['tflops']:8.1f} TFLOP/s", flush=True)
    return rows


def time_sweep():
    """Other stages, other sizes of granules, and the kernel of other GPUs, at density 0.25 with a tail."""
    problems = {size: timed_problem(0.25 - 1 / size, size=size) for size in values.SIZES}
    cases, flops = {}, {}

    def staged(arguments, row):
        q, granules, lists, order = arguments
        kept, op.HOPPER[128] = op.HOPPER[128], row
        try:
            return op.granule_attention(q, granules, lists, q_order=order)
        finally:
            op.HOPPER[128] = kept

    def plain(arguments):
        q, granules, lists, order = arguments
        takes, hopper.takes = hopper.takes, lambda *_: False
        try:
            return op.granule_attention(q, granules, lists, q_order=order)
        finally:
            hopper.takes = takes

    for keys, stages in STAGES:
        cases[f"{stages} stages of {keys} keys"] = lambda row=(keys, stages): staged(problems[16], row)
    for size, arguments in problems.items():
        if size != 16:
            cases[f"granules of {size}"] = lambda a=arguments: staged(a, op.HOPPER[128])
    cases["plain Triton"] = lambda: plain(problems[16])
    for name in cases:
        size = int(name.split()[-1]) if name.startswith("granules of") else 16
        flops[name] = work(problems[size][2], problems[size][1], True)
    yield from timed(cases, flops, 0.25, repeats=5)


if __name__ == "__main__":
    main()
