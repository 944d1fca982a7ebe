"""Block-sparse kernels on whole blocks of 128 x 128 of random maps: ours beside NVIDIA's, on the same map in the same run."""

from __future__ import annotations

import torch
from torch import Tensor

from svg.kernels import block_sparse_attention, block_sparse_attention_quantised

from .peers import PEERS
from .timing import median_ms

BLOCK = 128
DENSITIES = (0.10, 0.25, 0.50)
ROUNDS = 3


def bench_whole_blocks(bench, tokens: int, heads: int, dim: int, device: str) -> None:
    """Useful TFLOP/s of each kernel, and how much faster ours are: the median of three rounds, in each of which all take turns.

    Args:
        bench: collects the results.
        tokens: S; what is beyond a whole number of blocks is left off.
        heads, dim: H and D.
        device: where to run.
    """
    blocks = tokens // BLOCK
    S = blocks * BLOCK
    q, k, v = (torch.randn(1, heads, S, dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    for density in DENSITIES:
        index = random_blocks(heads, blocks, max(1, round(density * blocks)), device)
        calls = {"bf16": {"ours": ours(q, k, v, index)}, "fp8": {"ours": ours(q, k, v, index, "int8-fp8")}}
        for name, peer in PEERS.items():
            for precision, make in peer.whole_blocks.items():
                if not peer.version():
                    bench.say(f"{name} is not installed: left out")
                    continue
                try:
                    calls[precision][name] = make(q, k, v, index)
                    calls[precision][name]()
                except peer.errors as error:
                    calls[precision].pop(name, None)
                    bench.say(f"{name} could not run here ({type(error).__name__}: {str(error)[:120]}): left out")
        share = index.shape[-1] / blocks
        for precision, own in calls.items():
            _compare(bench, f"block_sparse/whole_blocks/{precision}/density{density:.2f}", own, share, (heads, S, dim))


def _compare(bench, key: str, calls: dict, share: float, size: tuple[int, int, int]) -> None:
    heads, S, dim = size
    flops = 4 * heads * S * S * dim * share
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(median_ms(call))
    shape, middle = f"B=1 H={heads} S={S} D={dim}", {name: sorted(found)[ROUNDS // 2] for name, found in times.items()}
    about = {"density": share, "inputs": "normal, random map"}
    for name, ms in middle.items():
        suffix = "" if name == "ours" else f"/{name}"
        bench.note(f"{key}{suffix}/tflops", flops / ms / 1e9, "TFLOP/s", shape, **about)
        if name != "ours":
            bench.note(f"{key}/vs_{name}", ms / middle["ours"], "x", shape, baseline=f"{name} {ms:.2f} ms", **about)


def random_blocks(heads: int, blocks: int, kept: int, device: str) -> Tensor:
    """Which key blocks each query block sees: int32 [1, H, blocks, kept], ascending, as many for each."""
    order = torch.rand(1, heads, blocks, blocks, device=device).argsort(-1)[..., :kept]
    return order.sort(-1).values.to(torch.int32).contiguous()


def ours(q: Tensor, k: Tensor, v: Tensor, index: Tensor, precision: str | None = None):
    """A call of our kernel on the same blocks; in 8 bits with quantisation."""
    _, heads, blocks, _ = index.shape
    block_map = torch.zeros(heads, blocks, blocks, dtype=torch.bool, device=q.device).scatter_(2, index[0].long(), True)
    sizes = torch.full((heads, blocks), BLOCK, dtype=torch.int32, device=q.device)
    which = torch.arange(heads, dtype=torch.int32, device=q.device)[None]
    if precision is None:
        return lambda: block_sparse_attention(q, k, v, block_map, sizes, sizes, map_index=which)
    return lambda: block_sparse_attention_quantised(
        q, k, v, block_map, sizes, sizes, map_index=which, precision=precision, key_multiple=BLOCK
    )
