"""Checks every Triton kernel on this GPU against its fp64 reference, then times the expensive ones.

    python scripts/checks/kernels.py --out kernels.json [--sweep]

Fresh random inputs, outputs poisoned beforehand, two runs compared bit for bit, device waits forbidden, one CUDA graph,
offsets beyond 2^31 elements. Exits 1 when a check fails. Needs torch, triton and the installed package, nothing else.
"""

import argparse
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg.kernels import (
    block_sparse_attention,
    block_sparse_attention_reference,
    gate_residual,
    gate_residual_reference,
    gather_tokens,
    inverse_permutation,
    kmeans,
    kmeans_assign,
    kmeans_update,
    kmeans_update_reference,
    modulate,
    modulate_reference,
    neighbour_order,
    neighbour_order_reference,
    norm_rope,
    norm_rope_reference,
    probe_attention,
    probe_attention_reference,
    scatter_tokens,
    sort_labels,
    sort_labels_reference,
    top_p_block_map,
    top_p_block_map_reference,
)
from svg.kernels.block_sparse import triton as block_sparse
from svg.kernels.common import target

DEVICE = "cuda"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where to write the results (JSON)")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 2**31, help="default: a new one each time, printed"
    )
    parser.add_argument("--sweep", action="store_true", help="also time other tile sizes of attention and assignment")
    parser.add_argument("--no-timing", action="store_true", help="checks only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("checks/kernels.py needs a CUDA device: the CPU tests cover the references and the interpreter")
    torch.manual_seed(args.seed)
    results = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": target.triton.__version__,
        "seed": args.seed, "checks": [], "timing": [],
    }  # fmt: skip
    print(f"{results['gpu']}, torch {results['torch']}, triton {results['triton']}, seed {args.seed}")
    checks = (
        check_permute, check_attention, check_launches, check_kmeans, check_top_p, check_probe, check_elementwise,
        check_graph, check_large_offsets,
    )  # fmt: skip
    for check in checks:
        run_check(check, results["checks"])
        args.out.write_text(json.dumps(results, indent=1))
    if not args.no_timing:
        time_all(results["timing"], args.sweep)
        args.out.write_text(json.dumps(results, indent=1))
    failed = [c for c in results["checks"] if not c["ok"]]
    print(f"{len(results['checks']) - len(failed)} checks passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


def survived(check: Callable):
    """A check's rows; one that raises is a failed row, so that the rest still runs."""
    try:
        yield from check()
    except Exception:
        traceback.print_exc()
        yield f"{check.__name__} raised", math.inf, 0


def run_check(check: Callable, rows: list[dict]) -> None:
    for name, measured, allowed in survived(check):
        row = {"name": name, "measured": float(measured), "allowed": float(allowed), "ok": bool(measured <= allowed)}
        rows.append(row)
        print(f"{'ok  ' if row['ok'] else 'FAIL'} {name:<66} {row['measured']:.3g} <= {row['allowed']:.3g}", flush=True)


def poison_memory() -> None:
    """Leaves NaN in the caching allocator's free blocks, so that unwritten outputs show."""
    torch.full((256 << 20,), float("nan"), device=DEVICE)


def quietly(op: Callable, *args, **kwargs):
    """Runs an operation with every wait for the device forbidden."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return op(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def differences(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many entries differ, bit for bit."""
    return int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())


def random_sizes(rows: int, clusters: int, tokens: int) -> torch.Tensor:
    """Uneven cluster sizes int32 [rows, clusters], a tenth of them empty, each row summing to tokens."""
    weight = torch.rand(rows, clusters, device=DEVICE).pow(2) * (torch.rand(rows, clusters, device=DEVICE) > 0.1)
    weight[:, 0] += 0.01
    ends = (weight.cumsum(1) / weight.sum(1, keepdim=True) * tokens).round().int()
    ends[:, -1] = tokens
    return torch.diff(ends, prepend=torch.zeros_like(ends[:, :1]))


def random_problem(B, H, S, D, dtype, Cq, Ck, density):
    """q, k, v as [B, H, S, D] views of [B, S, H, D], and the plan: one map a head."""
    q, k, v = (torch.randn(B, S, H, D, device=DEVICE, dtype=dtype).transpose(1, 2) for _ in range(3))
    block_map = torch.rand(B * H, Cq, Ck, device=DEVICE) < density
    plan = {
        "map_index": torch.randperm(B * H, device=DEVICE).view(B, H).int(),
        "q_permutation": torch.rand(B, H, S, device=DEVICE).argsort(-1).int(),
    }
    return (q, k, v, block_map, random_sizes(B * H, Cq, S), random_sizes(B * H, Ck, S)), plan


def check_permute():
    x = torch.randn(2, 3001, 3, 96, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    labels = torch.randint(0, 77, (2, 3, 3001), device=DEVICE, dtype=torch.int32)
    permutation, sizes = quietly(sort_labels, labels, 77)
    expected = labels.long().argsort(dim=-1, stable=True)
    yield "sort_labels: permutation against argsort", (permutation != expected).sum(), 0
    counts = F.one_hot(labels.long(), 77).sum(2)
    yield "sort_labels: sizes", (sizes != counts).sum(), 0
    poison_memory()
    moved = quietly(gather_tokens, x, permutation)
    yield "gather_tokens", differences(moved, x.gather(2, expected[..., None].expand_as(x))), 0
    poison_memory()
    yield "scatter_tokens undoes gather_tokens", differences(quietly(scatter_tokens, moved, permutation), x), 0
    labels = torch.randint(0, 1000, (1, 8, 75600), device=DEVICE, dtype=torch.int32)
    for name, got, expected in zip(
        ("permutation", "sizes"), quietly(sort_labels, labels, 1000), sort_labels_reference(labels, 1000), strict=True
    ):
        yield f"sort_labels S=75600 C=1000: {name}", differences(got, expected), 0
    centroids = torch.randn(2, 3, 1000, 128, device=DEVICE)
    chain, expected = quietly(neighbour_order, centroids), neighbour_order_reference(centroids)
    yield "neighbour_order", differences(chain, expected), 0
    inverse = quietly(inverse_permutation, permutation)
    yield "inverse_permutation", differences(gather_tokens(moved, inverse), x), 0


def check_attention():
    for name, D in itertools.product(DTYPES, (64, 96, 128)):
        yield from attention_errors(f"{name} D={D} B=2 S=1333 Cq=23 Ck=41", 2, 3, 1333, D, DTYPES[name], 23, 41, 0.3)
    yield from attention_errors("bf16 D=128 one cluster", 1, 2, 777, 128, torch.bfloat16, 1, 1, 2.0)
    yield from attention_errors("bf16 D=128 density 1", 1, 2, 2049, 128, torch.bfloat16, 9, 33, 2.0)
    yield from attention_errors("bf16 D=128 S=32760 Cq=300 Ck=1000", 1, 2, 32760, 128, torch.bfloat16, 300, 1000, 0.25)
    yield from attention_errors("fp16 D=64 S=17776 Cq=100 Ck=500", 1, 2, 17776, 64, torch.float16, 100, 500, 0.25)
    for name, D in itertools.product(DTYPES, (64, 96, 128)):
        shape = (2, 3, 1333, D, DTYPES[name], 23, 41, 0.3)
        yield from attention_errors(f"{name} D={D} contiguous keys", *shape, contiguous=True)
        yield from attention_errors(f"{name} D={D} contiguous keys, tail", *shape, contiguous=True, tail=41)
    shape = (1, 2, 32760, 128, torch.bfloat16, 300, 1000, 0.25)
    yield from attention_errors("bf16 D=128 S=32760 contiguous keys", *shape, contiguous=True)
    yield from attention_errors("bf16 D=128 S=32760 contiguous keys, tail", *shape, contiguous=True, tail=1000)


def attention_errors(name, *shape, contiguous=False, tail=0):
    arguments, plan = random_problem(*shape)
    arguments[3][0, 0] = False  # a query cluster that sees nothing
    if contiguous:  # what the methods pass, and what some kernels need
        arguments = (arguments[0], *(x.contiguous() for x in arguments[1:3]), *arguments[3:])
    if tail:
        plan["tail"] = random_tail(arguments, tail)
    block_sparse_attention(*arguments, **plan, return_lse=True)  # compile
    poison_memory()
    out, lse = quietly(block_sparse_attention, *arguments, **plan, return_lse=True)
    again = block_sparse_attention(*arguments, **plan, return_lse=True)
    exact, exact_lse = in_fp64(arguments, plan, return_lse=True)
    plain = block_sparse_attention_reference(*arguments, **plan)
    # Three TF32 products keep about 21 bits where plain fp32 keeps 24.
    allowed = 2 * (plain - exact).abs().max() + (1e-5 if arguments[0].dtype == torch.float32 else 0)
    yield f"attention {name}: largest error", (out - exact).abs().max().nan_to_num(torch.inf), allowed
    wrong = torch.where(exact_lse == lse, 0, (lse - exact_lse).abs()).max()
    yield f"attention {name}: lse", wrong.nan_to_num(torch.inf), 1e-4
    yield (
        f"attention {name}: bits that differ in a second run",
        differences(out, again[0]) + differences(lse, again[1]),
        0,
    )


def random_tail(arguments, clusters):
    """Means and sizes for the first clusters, -inf where a cluster is selected."""
    q, _, _, block_map, _, k_sizes = arguments
    means = (torch.randn(*q.shape[:2], clusters, q.shape[3], device=DEVICE, dtype=q.dtype) for _ in range(2))
    bias = torch.where(block_map, -torch.inf, k_sizes.float().log()[:, None])[..., :clusters]
    return block_sparse.Tail(*means, bias.contiguous())


def in_fp64(arguments, plan, **options):
    """The reference on fp64 inputs."""
    if "tail" in plan:
        plan = plan | {"tail": block_sparse.Tail(*(x.double() for x in plan["tail"]))}
    return block_sparse_attention_reference(
        *(x.double() for x in arguments[:3]), *arguments[3:], **plan, **options
    )  # fmt: skip


def check_launches():
    """Every row that `svg bench attention --sweep` may choose gives what the table's row gives, within rounding."""
    (q, k, v, *rest), plan = random_problem(1, 2, 4097, 128, torch.bfloat16, 17, 61, 0.3)
    arguments = (q, k.contiguous(), v.contiguous(), *rest)
    exact = in_fp64(arguments, plan)
    plain = block_sparse_attention_reference(*arguments, **plan)
    table = target.launch_row(block_sparse.LAUNCH, torch.device(DEVICE))
    kept = table[2, 128]
    for row in block_sparse.candidates():
        if row.tma and target.arch(torch.device(DEVICE)) < 90:
            continue
        table[2, 128] = row
        try:
            out = block_sparse_attention(*arguments, **plan)
        except target.triton.runtime.errors.OutOfResources:
            print(f"     attention {row.name()}: does not fit this GPU")
            continue
        finally:
            table[2, 128] = kept
        error = (out - exact).abs().max().nan_to_num(torch.inf)
        yield f"attention {row.name()}: largest error", error, 2 * (plain - exact).abs().max()


def check_probe():
    for name, D in (("bf16", 128), ("fp16", 64), ("fp32", 128)):
        q, k, v = (torch.randn(2, n, 3, D, device=DEVICE, dtype=DTYPES[name]).transpose(1, 2) for n in (64, 5003, 5003))
        masks, visible = (torch.rand(*shape, device=DEVICE) < 0.3 for shape in ((2, 2, 64, 5003), (2, 5003)))
        probe_attention(q, k, v, masks, visible)
        poison_memory()
        out = quietly(probe_attention, q, k, v, masks, visible)
        exact = probe_attention_reference(*(x.double() for x in (q, k, v)), masks, visible)
        yield f"probe_attention {name} D={D}", (out - exact).abs().max().nan_to_num(torch.inf), 1e-4
        again = probe_attention(q, k, v, masks, visible)
        yield f"probe_attention {name} D={D}: bits that differ in a second run", differences(out, again), 0
        index = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.int32, device=DEVICE)
        probe_attention(q, k, v, masks, visible, mask_index=index)
        out = quietly(probe_attention, q, k, v, masks, visible, mask_index=index)
        exact = probe_attention_reference(*(x.double() for x in (q, k, v)), masks, visible, mask_index=index)
        yield f"probe_attention {name} D={D} by head", (out - exact).abs().max().nan_to_num(torch.inf), 1e-4


def check_elementwise():
    angle = torch.randn(3000, 128, device=DEVICE)
    for name in DTYPES:
        x = torch.randn(2, 3001, 3, 5120, device=DEVICE).to(DTYPES[name])[:, :, 1]
        row = torch.randn(2, 1, 5120, device=DEVICE)
        weight = torch.randn(5120, device=DEVICE).to(x.dtype)
        cases = {
            "norm_rope": (norm_rope, norm_rope_reference, (x.unsqueeze(2), weight, None, 1e-6, angle, angle), {"rms": True}),
            "norm_rope per head": (
                norm_rope, norm_rope_reference,
                (x.unflatten(2, (40, 128)), weight[:128], weight[:128], 1e-6, angle, angle), {"rms": False, "first": 1},
            ),
            "modulate": (modulate, modulate_reference, (x, row, row, 1e-6), {}),
            "gate_residual": (gate_residual, gate_residual_reference, (x, x, row), {}),
        }  # fmt: skip
        for case, (op, reference, arguments, options) in cases.items():
            op(*arguments, **options)
            poison_memory()
            out = quietly(op, *arguments, **options)
            exact = reference(*(a.double() if torch.is_tensor(a) else a for a in arguments), **options)
            plain = reference(*arguments, **options)
            allowed = 1.5 * (plain - exact).abs().max() + 1e-4
            yield f"{case} {name}: largest error", (out - exact).abs().max().nan_to_num(torch.inf), allowed


def check_kmeans():
    for name, D in (("bf16", 128), ("fp16", 64), ("fp32", 96)):
        points = torch.randn(2, 3, 50, D, device=DEVICE) * 3
        pick = torch.randint(0, 50, (2, 5003, 3), device=DEVICE)
        x = points[torch.arange(2, device=DEVICE)[:, None, None], torch.arange(3, device=DEVICE), pick]
        x = (x + torch.randn_like(x)).to(DTYPES[name]).transpose(1, 2)
        start = x[:, :, :67].float().clone()
        start[:, :, 5] = 1000.0  # stays empty
        kmeans(x, start, 1)
        poison_memory()
        labels, centroids, sizes, _ = quietly(kmeans, x, start, 5)
        exact = start.double()
        for _ in range(5):
            exact_labels = assign_exactly(x, exact)
            exact, _ = kmeans_update_reference(x.double(), exact_labels, exact)
        yield (
            f"kmeans {name} D={D}: inertia over fp64's - 1",
            inertia(x, labels, centroids) / inertia(x, exact_labels, exact) - 1,
            0.01,
        )
        mean = start.mean(2, keepdim=True)
        rounded = mean + (start - mean).to(x.dtype)
        yield (
            f"kmeans {name} D={D}: worst distance lost by a label",
            label_loss(x, kmeans_assign(x, start), rounded),
            1e-3,
        )
        means, counts = kmeans_update_reference(x.double(), labels, start.double())
        got, got_counts = kmeans_update(x, labels, start)
        yield f"kmeans {name} D={D}: update", (got - means).abs().max().nan_to_num(torch.inf), 1e-4
        yield f"kmeans {name} D={D}: sizes", (got_counts != counts).sum() + (sizes != counts).sum(), 0
        again = kmeans(x, start, 5)
        yield f"kmeans {name} D={D}: bits that differ in a second run", differences(centroids, again[1]), 0
    x = torch.ones(1, 1, 100, 64, device=DEVICE)
    yield (
        "kmeans: ties go to the lowest index",
        kmeans_assign(x, torch.zeros(1, 1, 300, 64, device=DEVICE)).abs().sum(),
        0,
    )


def distances(x, centroids):
    return torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def assign_exactly(x, centroids):
    return distances(x, centroids).argmin(-1).int()


def inertia(x, labels, centroids):
    return distances(x, centroids).gather(-1, labels.long()[..., None]).sum()


def label_loss(x, labels, centroids):
    d = distances(x, centroids)
    lost = d.gather(-1, labels.long()[..., None]).squeeze(-1) - d.min(-1).values
    return (lost / d.min(-1).values.mean()).max()


def check_top_p():
    q, k = torch.randn(2, 3, 300, 128, device=DEVICE), torch.randn(2, 3, 1000, 128, device=DEVICE)
    sizes = random_sizes(6, 1000, 75600).view(2, 3, 1000)
    for top_p, least, scale, budget in (
        (0.9, 0.1, 0.088, None),
        (0.5, 0, 0.3, None),
        (1.0, 0, 0.3, None),
        (0.9, 0.1, 0.088, 0.2),
        (torch.tensor([0.9, 0.3, 0.6], device=DEVICE), 0.1, 0.088, None),
    ):
        name = f"top_p={top_p if isinstance(top_p, float) else 'by head'} min_k_ratio={least} budget={budget}"
        top_p_block_map(q, k, sizes, top_p, least, scale, budget)
        poison_memory()
        got = quietly(top_p_block_map, q, k, sizes, top_p, least, scale, budget)
        expected = top_p_block_map_reference(q, k, sizes, top_p, least, scale, budget)
        wrong = (got != expected).sum(-1)
        # The mass before the crossing cluster may round to the other side of top_p, one cluster a row at most.
        yield f"{name}: most clusters that differ in a row", wrong.max(), 1
        yield f"{name}: share of rows that differ", (wrong > 0).float().mean(), 0.01
        if isinstance(top_p, float) and top_p == 1.0:
            yield f"{name}: non-empty clusters missing", (got != (sizes > 0).unsqueeze(2)).sum(), 0
        again = top_p_block_map(q, k, sizes, top_p, least, scale, budget)
        yield f"{name}: bits that differ in a second run", differences(got, again), 0


def whole_method(x, v, start):
    """Clustering, selection, permutation and attention as SVG2 chains them."""
    _, centroids, sizes, permutation = kmeans(x, start, 2)
    B, H, C = sizes.shape
    block_map = top_p_block_map(centroids, centroids, sizes, 0.9, 0.1, 0.1)
    flat, index = sizes.view(B * H, C), torch.arange(B * H, device=x.device, dtype=torch.int32).view(B, H)
    k, v = gather_tokens(x, permutation), gather_tokens(v, permutation)
    maps = block_map.view(B * H, C, C)
    return block_sparse_attention(x, k, v, maps, flat, flat, map_index=index, q_permutation=permutation)


def check_graph():
    x, v = (torch.randn(1, 2, 4100, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    start = x[:, :, :64].float()
    expected = whole_method(x, v, start)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = whole_method(x, v, start)
    out.fill_(float("nan"))
    graph.replay()
    yield "whole method in a CUDA graph: bits that differ", differences(out, expected), 0


def check_large_offsets():
    heads, S, D = 240, 70_001, 128
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        print("     offsets beyond 2^31 elements: not checked, needs 24 GiB of free memory")
        return
    wide = torch.empty(1, S, heads, D, device=DEVICE, dtype=torch.bfloat16)
    view = wide[:, :, -2:].transpose(1, 2)
    view.copy_(torch.randn(1, 2, S, D, device=DEVICE))
    order = torch.rand(1, 2, S, device=DEVICE).argsort(-1).int()
    near = view.contiguous()
    yield "gather_tokens beyond 2^31 elements", differences(gather_tokens(view, order), gather_tokens(near, order)), 0
    sizes, index = random_sizes(2, 100, S), torch.arange(2, device=DEVICE).view(1, 2).int()
    block_map = torch.rand(2, 100, 100, device=DEVICE) < 0.1
    far_out = block_sparse_attention(view, view, view, block_map, sizes, sizes, map_index=index, q_permutation=order)
    near_out = block_sparse_attention(near, near, near, block_map, sizes, sizes, map_index=index, q_permutation=order)
    yield "attention beyond 2^31 elements", differences(far_out, near_out), 0
    start = near[:, :, :100].float()
    yield "kmeans beyond 2^31 elements", differences(kmeans(view, start, 2)[1], kmeans(near, start, 2)[1]), 0
    del wide, view
    many = torch.zeros(1, heads, S, D, device=DEVICE, dtype=torch.bfloat16)
    many[:, -1] = near[:, -1]
    orders = order[:, -1:].expand(1, heads, S)
    yield (
        "gather_tokens, output beyond 2^31 elements",
        differences(gather_tokens(many, orders)[:, -1], gather_tokens(near, order)[:, -1]),
        0,
    )


def seconds(op: Callable, repeats: int = 5) -> float:
    """Median time of one call, after two warm-up calls."""
    events = []
    for i in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        op()
        end.record()
        if i >= 2:
            events.append((begin, end))
    torch.cuda.synchronize()
    return sorted(b.elapsed_time(e) for b, e in events)[repeats // 2] / 1e3


def time_all(rows: list[dict], sweep: bool) -> None:
    def note(name, time_s, **extra):
        rows.append({"name": name, "ms": time_s * 1e3, **extra})
        shown = "  ".join(f"{key} {value:.3g}" for key, value in extra.items())
        print(f"{name:<72} {time_s * 1e3:9.3f} ms  {shown}")

    for S, H, D, Cq, Ck in ((32760, 8, 128, 300, 1000), (75600, 8, 128, 300, 1000), (45106, 8, 64, 200, 1000)):
        time_attention(note, S, H, D, Cq, Ck, sweep)
    time_clustering(note, 75600, 8, 128, sweep)


def time_attention(note, S, H, D, Cq, Ck, sweep):
    label = f"S={S} H={H} D={D} bf16"
    arguments, plan = random_problem(1, H, S, D, torch.bfloat16, Cq, Ck, 0.25)
    q, k, v, block_map, q_sizes, k_sizes = arguments
    dense = 4 * H * S * S * D
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            t = seconds(lambda: F.scaled_dot_product_attention(q, k, v))
        note(f"dense {name} {label}", t, tflops=dense / t / 1e12)
    k, v = k.contiguous(), v.contiguous()
    area = torch.einsum("mi,mij,mj->", q_sizes.double(), block_map.double(), k_sizes.double()).item() / (H * S * S)

    def sparse(k=k, v=v):
        return block_sparse_attention(q, k, v, block_map, q_sizes, k_sizes, **plan)

    t = seconds(sparse)
    note(f"block_sparse {label} Cq={Cq} Ck={Ck}", t, tflops=area * dense / t / 1e12, density=area)
    if sweep:
        sweep_attention(note, sparse, label, area * dense, D)
    blocks = torch.full((1, S // 64 + 1), 64, device=DEVICE, dtype=torch.int32)
    blocks[0, -1] = S - 64 * (S // 64)
    place = torch.arange(S // 64 + 1, device=DEVICE)
    band = ((place[:, None] - place).abs() < 0.134 * (S / 64))[None]  # 1 - (1 - w)^2 = .25
    area = torch.einsum("mi,mij,mj->", blocks.double(), band.double(), blocks.double()).item() / S**2
    index = torch.zeros(1, H, device=DEVICE, dtype=torch.int32)
    t = seconds(lambda: block_sparse_attention(q, k, v, band, blocks, blocks, map_index=index))
    note(f"block_sparse {label} band of 64-token blocks", t, tflops=area * dense / t / 1e12, density=area)


def sweep_attention(note, op, label, flops, D):
    table = target.launch_row(block_sparse.LAUNCH, torch.device(DEVICE))
    key = (2, 64 if D <= 64 else 128)
    kept = table[key]
    for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if (m == 64 and warps == 8) or (m == 128 and n == 128 and warps == 4):
            continue  # a warpgroup wants 64 rows; the last one spills
        table[key] = block_sparse.Launch(m, n, warps, stages)
        try:
            t = seconds(op, 3)
        except target.triton.runtime.errors.OutOfResources:
            continue
        note(f"  sweep {label} {m}x{n} warps={warps} stages={stages}", t, tflops=flops / t / 1e12)
    table[key] = kept


def time_clustering(note, S, H, D, sweep):
    label = f"S={S} H={H} D={D} bf16"
    x = torch.randn(1, S, H, D, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    for C in (300, 1000):
        start = x[:, :, :C].float().contiguous()
        t = seconds(lambda start=start: kmeans_assign(x, start))
        note(f"kmeans_assign {label} C={C}", t, tflops=2 * H * S * C * D / t / 1e12)
        if sweep:
            sweep_assign(note, lambda start=start: kmeans_assign(x, start), f"{label} C={C}")
        labels = kmeans_assign(x, start)
        t = seconds(lambda start=start, labels=labels: kmeans_update(x, labels, start))
        note(f"kmeans_update (with its sort) {label} C={C}", t, gb_s=2 * H * S * D / t / 1e9)
        t = seconds(lambda start=start: kmeans(x, start, 2))
        note(f"kmeans, 2 iterations {label} C={C}", t)
        t = seconds(lambda labels=labels, C=C: sort_labels(labels, C))
        note(f"sort_labels {label} C={C}", t)
    order, sizes = sort_labels(labels, 1000)
    t = seconds(lambda: gather_tokens(x, order))
    note(f"gather_tokens {label}", t, gb_s=4 * H * S * D / t / 1e9)
    queries = x[:, :, :300].float().contiguous()
    t = seconds(lambda: top_p_block_map(queries, start, sizes, 0.9, 0.1, D**-0.5))
    note(f"top_p_block_map H={H} Cq=300 Ck=1000", t)


def sweep_assign(note, op, label):
    from svg.kernels.clustering import assign as module

    table = target.launch_row(module.LAUNCH, torch.device(DEVICE))
    kept = table[2]
    for s, c, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        table[2] = module.Launch(s, c, warps, stages)
        try:
            t = seconds(op, 3)
        except target.triton.runtime.errors.OutOfResources:
            continue
        note(f"  sweep kmeans_assign {label} {s}x{c} warps={warps} stages={stages}", t)
    table[2] = kept


if __name__ == "__main__":
    main()
