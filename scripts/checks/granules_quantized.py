"""Checks attention over granules in 8 bits on this GPU against its specification, then times it.

    python scripts/checks/granules_quantized.py --out granules8.json [--no-timing] [--tokens 75600]

Fresh seeds and shapes, text around the video, partial granules, poisoned memory, rows that no order names, two runs compared
bit for bit, a CUDA graph, no host synchronisation. Timings: random lists at a total density of 0.10, 0.25 and 0.50 (the means
counted) with and without the tail, the same in whole tiles of 64 keys, everything listed, the quantising pass; beside them
`block_sparse_attention_quantised` on random tiles and cuDNN's dense attention in bf16. Exits 1 when a check fails.
"""

import time
from collections.abc import Iterator

import torch
from harness import DEVICE, Check, begin, command_line, differences, finish, judge, no_waiting, poison_memory, saving

from svg.bench.timing import median_ms
from svg.kernels import block_sparse_attention_quantised
from svg.kernels.granules.quantize import quantize_granules, quantize_granules_reference
from svg.kernels.granules.quantized import granule_attention_quantized, granule_attention_quantized_reference
from svg.kernels.granules.reference import cut_granules_reference, granule_attention_reference, lists_of
from svg.methods.dense import dense_attention

# batch, heads, video, text, head dim, granule, rows of a list, dtype, precision
SHAPES = (
    (2, 2, 1000, 77, 128, 16, 128, torch.bfloat16, "int8-fp8"),
    (1, 3, 517, 0, 128, 16, 64, torch.bfloat16, "int8-fp8"),
    (1, 2, 4099, 226, 64, 16, 128, torch.float16, "int8-fp8"),
    (1, 2, 1203, 40, 96, 32, 128, torch.bfloat16, "int8-fp8"),
    (1, 2, 2000, 13, 128, 64, 64, torch.float16, "int8-fp8"),
    (1, 2, 700, 20, 64, 8, 64, torch.bfloat16, "int8-fp8"),
    (1, 2, 900, 33, 128, 16, 128, torch.float32, "int8-fp8"),
    (2, 2, 650, 20, 128, 16, 64, torch.bfloat16, "int8-fp16"),
)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tokens", type=int, default=75_600, help="tokens to time at [default: %(default)s]")
    args, machine = begin(parser)
    started, results = time.time(), {**machine, "checks": [], "results": {}}
    save = saving(args.out, results)
    with torch.inference_mode():
        for shape in SHAPES:
            results["checks"].extend(judge(check_shape(*shape), f"{shape}"))
        results["checks"].extend(judge(check_capture(), "capture"))
        save()
        if not args.no_timing:
            for key, value in timings(args.tokens):
                results["results"][key] = value
                print(f"{key:<64} {value:10.4g}   {time.time() - started:.0f} s", flush=True)
                save()
    finish(results["checks"])


def call(B, H, V, L, D, size, rows, dtype, kept=0.3):
    """Inputs with biased channels, text around the video, and random lists."""
    S, before = V + L, L // 2
    q, k, v = (torch.randn(B, S, H, D, device=DEVICE) for _ in range(3))
    k = 0.5 * k + 4 * torch.randn(D, device=DEVICE) * (torch.rand(D, device=DEVICE) < 0.2)
    v = v + 2 * torch.randn(D, device=DEVICE)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    q_order, k_order = (torch.rand(2, B, H, V, device=DEVICE).argsort(-1) + before).int()
    layout = {"size": size, "text": None, "prompt_tokens": None}
    if L:
        places = torch.arange(S, device=DEVICE)
        layout["text"] = torch.cat([places[:before], places[before + V :]]).expand(B, -1)
        layout["prompt_tokens"] = torch.randint(0, L + 1, (B,), device=DEVICE)
    granules = cut_granules_reference(k, v, k_order, *layout.values())
    T = granules.k_mean.shape[2]
    chosen = torch.rand(B, H, -(-V // rows), T, device=DEVICE) < kept
    chosen[:, :, 0] = False  # nothing but what every list has
    chosen |= granules.tokens[:, None, None, :T] < size
    return q, k, v, q_order, k_order, layout, granules, lists_of(chosen, granules.tokens, size, rows)


def check_shape(B, H, V, L, D, size, rows, dtype, precision) -> Iterator[Check]:
    name = f"B={B} H={H} V={V} L={L} D={D} size={size} rows={rows} {dtype} {precision}".replace("torch.", "")
    q, k, v, q_order, k_order, layout, granules, lists = call(B, H, V, L, D, size, rows, dtype)
    poison_memory()
    found = quantize_granules(k, v, k_order, **layout, precision=precision)
    right = quantize_granules_reference(k, v, k_order, **layout, precision=precision, interleave=found.interleaved)
    for part in ("k", "tail_k"):
        got, wanted = getattr(found, part), getattr(right, part)
        yield f"{name}: {part}, largest step off", (got.int() - wanted.int()).abs().max(), 1
    for part in ("v", "tail_v"):
        got, wanted = getattr(found, part).float(), getattr(right, part).float()
        yield f"{name}: {part}, share that differs", (got != wanted).double().mean(), 2e-3
    for tail in (True, False):
        plan = {"q_order": q_order, "tail": tail}
        failed = torch.zeros(B, H, dtype=torch.int32, device=DEVICE)
        granule_attention_quantized(q, found, lists, **plan)  # compile
        poison_memory()
        with no_waiting():
            out = granule_attention_quantized(q, found, lists, **plan, failed=failed, out=torch.full_like(q, 7.0))
            again = granule_attention_quantized(q, found, lists, **plan, failed=failed, out=torch.full_like(q, 7.0))
        seven = torch.full_like(q, 7.0)
        spec, spec_lse = granule_attention_quantized_reference(q, found, lists, **plan, return_lse=True, out=seven)
        exact, lse = granule_attention_reference(q.float(), granules, lists, **plan, return_lse=True, out=seven.float())
        label = f"{name}{' tail' if tail else ''}"
        yield f"{label}: against the specification", off(out, spec), 0.02
        yield f"{label}: worst row against it", row_error(out, spec), 0.15
        yield f"{label}: against unquantised", off(out, exact), 0.06
        yield f"{label}: bits that differ in a second run", differences(out, again), 0
        yield f"{label}: failed heads", failed.sum(), 0
        if tail:
            with_lse, found_lse = granule_attention_quantized(q, found, lists, **plan, return_lse=True)
            there = lse > -torch.inf
            yield f"{label}: output with lse", off(with_lse[there], out[there]), 1e-2
            yield f"{label}: lse against the specification", (found_lse - spec_lse)[there].abs().max(), 0.01
            yield f"{label}: rows with an lse", ((found_lse > -torch.inf) != there).sum(), 0


def check_capture() -> Iterator[Check]:
    q, k, v, q_order, k_order, layout, _, lists = call(1, 2, 3001, 0, 128, 16, 128, torch.bfloat16)

    def whole():
        quantized = quantize_granules(k, v, k_order, **layout)
        return granule_attention_quantized(q, quantized, lists, q_order=q_order)

    right = whole()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = whole()
    out.fill_(torch.nan)
    graph.replay()
    yield "bits that differ in a CUDA graph", differences(out, right), 0


def off(a, b):
    a, b = a.double(), b.double()
    return (a - b).norm() / b.norm().clamp_min(1e-30)


def row_error(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-6)).max()


def timings(tokens: int, heads: int = 8, dim: int = 128, size: int = 16, rows: int = 128):
    """Yields (key, value): milliseconds, and teraoperations a second of the pairs that are computed."""
    q, k, v = (torch.randn(1, tokens, heads, dim, device=DEVICE).bfloat16().transpose(1, 2) for _ in range(3))
    q_order, k_order = torch.rand(2, 1, heads, tokens, device=DEVICE).argsort(-1).int()
    dense = median_ms(lambda: dense_attention(q, k, v, backend="cudnn"), 3, 1)
    yield "dense/cudnn/ms", dense
    yield "dense/cudnn/tflops", 4 * heads * tokens**2 * dim / dense / 1e9
    quantized = quantize_granules(k, v, k_order, size=size)
    quantising = median_ms(lambda: quantize_granules(k, v, k_order, size=size))
    yield "quantize/ms", quantising
    T, NG = -(-tokens // size), -(-tokens // rows)

    def timed(key, chosen, tail):
        lists = lists_of(chosen | (quantized.tokens[:, None, None] < size), quantized.tokens, size, rows)
        listed = int(lists.counts.sum())
        pairs = rows * (listed * size + tail * (heads * NG * T - listed))
        ms = median_ms(lambda: granule_attention_quantized(q, quantized, lists, q_order=q_order, tail=tail), 5)
        yield f"{key}/density", pairs / (heads * NG * rows * tokens)
        yield f"{key}/ms", ms
        yield f"{key}/tops", 4 * dim * pairs / ms / 1e9
        yield f"{key}/tops_with_quantisation", 4 * dim * pairs / (ms + quantising) / 1e9
        yield f"{key}/speedup_vs_cudnn", dense / (ms + quantising)

    def chance(*shape):
        return torch.rand(*shape, device=DEVICE)

    for density in (0.10, 0.25, 0.50):
        yield from timed(f"granules/density{density:.2f}", chance(1, heads, NG, T) < density, False)
        exact = (density * size - 1) / (size - 1)  # what is left when every unlisted granule costs one key
        yield from timed(f"granules/density{density:.2f}/tail", chance(1, heads, NG, T) < exact, True)
    tiles = (chance(1, heads, NG, -(-T // 8)) < 0.25).repeat_interleave(8, -1)[..., :T]
    yield from timed("granules/density0.25/whole_tiles", tiles, False)
    uneven = (0.5 + chance(1, heads, NG, 1)) ** 3 * torch.linspace(0.5, 1.5, heads, device=DEVICE)[:, None, None]
    uneven = 0.25 * uneven / uneven.mean()
    yield from timed("granules/density0.25/uneven_lists", chance(1, heads, NG, T) < uneven, False)
    everything = torch.ones(1, heads, NG, T, dtype=torch.bool, device=DEVICE)
    yield from timed("granules/density1.00", everything, False)
    yield from today(q, k, v, q_order, k_order, dense)


def today(q, k, v, q_order, k_order, dense):
    """`block_sparse_attention_quantised` on random tiles of 128 x 64."""
    _, heads, tokens, dim = q.shape
    q_tiles, k_tiles = -(-tokens // 128), -(-tokens // 64)
    q_sizes = torch.full((heads, q_tiles), 128, dtype=torch.int32, device=DEVICE)
    k_sizes = torch.full((heads, k_tiles), 64, dtype=torch.int32, device=DEVICE)
    q_sizes[:, -1], k_sizes[:, -1] = tokens - 128 * (q_tiles - 1), tokens - 64 * (k_tiles - 1)
    index = torch.arange(heads, device=DEVICE, dtype=torch.int32)[None]
    for density in (0.10, 0.25, 0.50):
        block_map = torch.rand(heads, q_tiles, k_tiles, device=DEVICE) < density
        pairs = float((q_sizes[:, :, None].double() * k_sizes[:, None] * block_map).sum())
        plan = {"map_index": index, "q_permutation": q_order, "k_permutation": k_order, "key_multiple": 64}
        ms = median_ms(lambda: block_sparse_attention_quantised(q, k, v, block_map, q_sizes, k_sizes, **plan), 5)
        yield f"today/density{density:.2f}/ms_with_quantisation", ms
        yield f"today/density{density:.2f}/tops_with_quantisation", 4 * dim * pairs / ms / 1e9
        yield f"today/density{density:.2f}/speedup_vs_cudnn", dense / ms


if __name__ == "__main__":
    main()
