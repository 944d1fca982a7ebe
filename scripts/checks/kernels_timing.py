"""Times the kernels that checks/kernels.py checks."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg.kernels import (
    block_sparse_attention,
    gather_tokens,
    kmeans,
    kmeans_assign,
    kmeans_update,
    sort_labels,
    top_p_block_map,
)
from svg.kernels.block_sparse import triton as block_sparse
from svg.kernels.common import target


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
    band = ((place[:, None] - place).abs() < 0.134 * (S / 64))[None]  # 1 - (1 - w)^2 = 0.25
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
