"""Checks every Triton kernel on this GPU against its fp64 reference, then times the expensive ones.

    python scripts/checks/kernels.py --out kernels.json [--sweep]

Fresh random inputs, outputs poisoned beforehand, two runs compared bit for bit, device waits forbidden, one CUDA graph,
offsets beyond 2^31 elements. Exits 1 when a check fails. Needs torch, triton and the installed package, nothing else.
"""

import itertools

import torch
import torch.nn.functional as F
from harness import DEVICE, begin, command_line, differences, finish, judge_all, poison_memory, quietly, saving
from kernels_timing import random_problem, random_sizes, time_all

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

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    args, machine = begin(command_line(__doc__, sweep="also time other tile sizes of attention and assignment"))
    results = {**machine, "checks": [], "timing": []}
    save = saving(args.out, results)
    checks = [
        check_permute, check_attention, check_launches, check_kmeans, check_top_p, check_probe, check_elementwise,
        check_graph, check_large_offsets,
    ]  # fmt: skip
    judge_all(checks, results["checks"], save)
    if not args.no_timing:
        time_all(results["timing"], args.sweep)
        save()
    finish(results["checks"])


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


if __name__ == "__main__":
    main()
