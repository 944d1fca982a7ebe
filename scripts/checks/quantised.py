"""Checks the quantised kernels on this GPU against fp64, then times them and other ways to launch them.

    python scripts/checks/quantised.py --out quantised.json [--sweep] [--no-timing] [--groups dense,sparse]

Inputs with the outliers of trained models, outputs poisoned beforehand, two runs compared bit for bit, tiles that start
at every offset from 16 bytes, offsets beyond 2^31 elements, more than 160,000 tokens, torch.compile. Timings have the
keys of docs/benchmarks; with --sweep also every row of `quantised_tile.candidates()`. Every group runs in a process of
its own, all at once, so that a crash of one hides nothing of the others. Exits 1 when a check fails.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import (
    DEVICE,
    Check,
    begin,
    command_line,
    differences,
    finish,
    judge_all,
    no_waiting,
    poison_memory,
    saving,
    show_result,
)

import svg
from svg.attend import attend
from svg.bench.run import Bench, bench_ceilings, bench_quantised
from svg.bench.sweep import replaced
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState
from svg.kernels import (
    block_sparse_attention_quantised,
    fp4_attention,
    fp4_attention_reference,
    quantised_attention,
    quantised_attention_reference,
    quantize_channels,
    quantize_channels_reference,
    quantize_nvfp4,
    quantize_nvfp4_reference,
    quantize_tokens,
    quantize_tokens_reference,
    statistics,
    statistics_reference,
    varlen_attention,
)
from svg.kernels.block_sparse_quantised import hopper as sparse_hopper
from svg.kernels.block_sparse_quantised.triton import LAUNCH as SPARSE_LAUNCH
from svg.kernels.common import target
from svg.kernels.dense_quantised import hopper as quantised_hopper


def main() -> None:
    parser = command_line(__doc__, sweep="also time other tile sizes and variants")
    parser.add_argument("--groups", default=",".join(GROUPS), help="which checks, with commas [default: %(default)s]")
    parser.add_argument("--here", action="store_true", help="run the groups in this process")
    args, machine = begin(parser)
    bench = Bench(f"python scripts/checks/quantised.py --seed {args.seed}", show_result, print, args.sweep)
    results = {**machine, "checks": [], "results": bench.results}
    save = saving(args.out, results)
    names = args.groups.split(",")
    with torch.inference_mode():
        if args.here:
            judge_all([GROUPS[name] for name in names], results["checks"], save)
        else:
            results["checks"].extend(run_apart(names, args.seed))
            save()
        if not args.no_timing:
            bench_ceilings(bench)
            bench_quantised(bench)
            save()
    finish(results["checks"])


def run_apart(names: list[str], seed: int) -> Iterator[dict]:
    """Every group in a process of its own; one that dies without results is a failed row."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name in names:
            out = Path(folder) / f"{name}.json"
            command = [sys.executable, __file__, "--here", "--no-timing", "--groups", name, "--seed", str(seed)]
            runs[name] = (
                out,
                subprocess.Popen(
                    [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                ),
            )
        for name, (out, process) in runs.items():
            print(process.communicate()[0], end="", flush=True)
            if out.is_file():
                yield from json.loads(out.read_text())["checks"]
            else:
                print(f"FAIL {name}: its process ended with exit code {process.returncode}", flush=True)
                yield {"name": f"{name} died", "measured": math.inf, "allowed": 0, "ok": False}


def precisions() -> list[str]:
    fp8 = ["int8-fp8", "int8-fp8-acc16", "int4-fp8"] if target.has_fp8(torch.device(DEVICE)) else []
    return ["int8-fp16", "int4-fp16", *fp8]


def outliers(S, Sk, D, dtype=torch.bfloat16, B=1, H=2, kv_heads=2):
    """The papers' inputs: biased channels in K, outlier tokens in Q, biased channels and a heavy tail in V."""
    q = torch.randn(B, S, H, D, device=DEVICE) + torch.randn(H, D, device=DEVICE)
    q = q * torch.where(torch.rand(B, S, H, 1, device=DEVICE) < 0.05, 4.0, 0.7)
    bias = 8 * torch.randn(D, device=DEVICE) * (torch.rand(D, device=DEVICE) < 0.2)
    k = 0.5 * torch.randn(B, Sk, kv_heads, D, device=DEVICE) + bias
    v = torch.randn(B, Sk, kv_heads, D, device=DEVICE) / torch.rand(B, Sk, kv_heads, D, device=DEVICE).add(0.05).sqrt()
    v += 2 * torch.randn(D, device=DEVICE)
    return tuple(x.to(dtype).transpose(1, 2) for x in (q, k, v))


def exact(q, k, v, is_causal=False, seen=None):
    """Attention from the definition in fp64, and its log-sum-exp."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    if is_causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).tril() == 0, -torch.inf)
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


def lost_cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return 1 - a @ b / (a.norm() * b.norm())


def check_quantisation() -> Iterator[Check]:
    for S, D, dtype in ((1, 64, torch.bfloat16), (3001, 96, torch.float16), (4100, 128, torch.bfloat16)):
        x, _, v = outliers(S, S, D, dtype)
        order = torch.rand(x.shape[:3], device=DEVICE).argsort(-1).int()
        poison_memory()
        stats, expected = statistics(x, v), statistics_reference(x, v)
        yield f"statistics S={S} D={D}: means", (stats.k_mean - expected.k_mean).abs().max(), 1e-4
        yield f"statistics S={S} D={D}: extremes", differences(stats.v_high, expected.v_high), 0
        for side, groups in (*itertools.product("qk", ("token", "thread", "warp", "block")), ("k", "sixteen")):
            poison_memory()
            options = {"side": side, "groups": groups, "permutation": order}
            got, right = quantize_tokens(x, **options), quantize_tokens_reference(x, **options)
            name = f"quantize_tokens S={S} D={D} {side} {groups}"
            yield f"{name}: largest step off", (got.values.int() - right.values.int()).abs().max(), 1
            yield f"{name}: scale", ((got.scale - right.scale) / right.scale).abs().max(), 1e-6
        if target.has_fp8(x.device):
            poison_memory()
            got = quantize_channels(v, expected, permutation=order)
            right = quantize_channels_reference(v, expected, permutation=order)
            yield (
                f"quantize_channels S={S} D={D}: padding that is not zero",
                got.values[:, :, D:].float().abs().sum(),
                0,
            )
            yield (
                f"quantize_channels S={S} D={D}: share that differs",
                differences(got.values, right.values) / right.values.numel(),
                1e-4,
            )


def check_dense() -> Iterator[Check]:
    shapes = [(1, 1, 64), (63, 65, 64), (127, 129, 128), (129, 193, 96), (2049, 3000, 128), (300, 8192 + 96, 64)]
    for (S, Sk, D), precision, causal in itertools.product(shapes, precisions(), (False, True)):
        arguments = outliers(S, Sk, D, B=2, H=4, kv_heads=2)
        options = {"precision": precision, "is_causal": causal}
        quantised_attention(*arguments, **options)  # compile
        poison_memory()
        out, lse = quantised_attention(*arguments, **options, return_lse=True)
        again = quantised_attention(*arguments, **options)
        right, right_lse = exact(*arguments, causal)
        spec = quantised_attention_reference(*arguments, **options)
        name = f"dense {precision} S={S} Sk={Sk} D={D}{' causal' if causal else ''}"
        yield f"{name}: 1 - cosine", lost_cosine(out, right), 1e-4 if "int8" in precision else 6e-3
        yield f"{name}: error over the specification's", (out - right).norm() / ((spec - right).norm() + 1e-6), 1.2
        yield f"{name}: lse", (lse - right_lse).abs().mean(), 0.01 if "int8" in precision else 0.1
        yield f"{name}: bits that differ in a second run", differences(out, again), 0


def check_sparse() -> Iterator[Check]:
    for S, D, precision in itertools.product((1333, 4097), (64, 128), [p for p in precisions() if "int8" in p]):
        q, k, v = outliers(S, S, D)
        ends = (torch.rand(2, 2, 40, device=DEVICE).cumsum(-1) * S / 25).clamp(max=S).int()
        ends[..., -1] = S
        q_sizes, k_sizes = torch.diff(ends, prepend=torch.zeros_like(ends[..., :1])).int()
        block_map = torch.rand(2, 40, 40, device=DEVICE) < 0.3
        block_map[0, 3] = False
        orders = torch.rand(2, 1, 2, S, device=DEVICE).argsort(-1).int()
        plan = {
            "map_index": torch.tensor([[1, 0]], device=DEVICE),
            "q_permutation": orders[0],
            "k_permutation": orders[1],
        }
        call = (q, k, v, block_map, q_sizes, k_sizes)
        block_sparse_attention_quantised(*call, **plan, precision=precision)
        poison_memory()
        with no_waiting():
            out = block_sparse_attention_quantised(*call, **plan, precision=precision)
        seen = torch.empty(1, 2, S, S, dtype=torch.bool, device=DEVICE)
        for h, m in enumerate((1, 0)):
            tokens = block_map[m].repeat_interleave(q_sizes[m], 0).repeat_interleave(k_sizes[m], 1)
            seen[0, h, orders[0, 0, h].long()[:, None], orders[1, 0, h].long()] = tokens
        right, _ = exact(q, k, v, seen=seen)
        name = f"block_sparse {precision} S={S} D={D}"
        yield f"{name}: 1 - cosine", lost_cosine(out, right), 1e-4
        again = block_sparse_attention_quantised(*call, **plan, precision=precision)
        yield f"{name}: bits that differ in a second run", differences(out, again), 0


def check_alignment() -> Iterator[Check]:
    """A run of keys may start at any token, with descriptors and with pointers."""
    if not target.has_fp8(torch.device(DEVICE)):
        return
    table = target.launch_row(SPARSE_LAUNCH, torch.device(DEVICE))
    yield from check_starts("as launched")
    for tma in (False, True):
        row = table[True, 128]
        with replaced(table, (True, 128), dataclasses.replace(row, tma=tma, specialised=False)):
            yield from check_starts("descriptors" if tma else "pointers")


def check_specialised() -> Iterator[Check]:
    """Every way to launch the kernels that only Hopper has, against the plain ones."""
    if target.arch(torch.device(DEVICE)) != 90:
        return
    for D in (64, 128):
        q, k, v = outliers(2049, 3000, D)
        right, _ = exact(q, k, v)
        for row in quantised_hopper.candidates():
            with replaced(quantised_hopper.LAUNCH, D, row):
                poison_memory()
                out, again = (quantised_attention(q, k, v) for _ in range(2))
                with_lse, _ = quantised_attention(q, k, v, return_lse=True)
            name = f"specialised {row.name()} D={D}"
            yield f"{name}: 1 - cosine", lost_cosine(out, right), 1e-4
            yield f"{name}: largest share of a row's norm", row_errors(out, right), 0.1
            yield f"{name}: bits that differ in a second run", differences(out, again), 0
            yield f"{name}: bits that differ where the lse is asked for", differences(out, with_lse), 0
        for ones, multiple in itertools.product((False, True), (1, 64)):
            with replaced(sparse_hopper.ONES, D, ones):
                yield from check_tiles(
                    D, multiple, f"specialised sparse{' ones' if ones else ''} D={D} multiple of {multiple}"
                )


def row_errors(out, right):
    return ((out - right).norm(dim=-1) / right.norm(dim=-1)).max()


def check_tiles(D: int, multiple: int, name: str) -> Iterator[Check]:
    """Tiles of 64 keys, the last one short."""
    S, Sk = 1000, 3000
    q, k, v = outliers(S, Sk, D)
    k_sizes = torch.full((2, 47), 64, device=DEVICE, dtype=torch.int32)
    k_sizes[:, -1] = Sk - 46 * 64
    q_sizes = torch.tensor([[100, 0, 500, 400]] * 2, device=DEVICE, dtype=torch.int32)
    block_map = torch.rand(2, 4, 47, device=DEVICE) < 0.4
    index = torch.arange(2, device=DEVICE).view(1, 2)
    call = (q, k, v, block_map, q_sizes, k_sizes)
    poison_memory()
    out, again = (block_sparse_attention_quantised(*call, map_index=index, key_multiple=multiple) for _ in range(2))
    seen = block_map.repeat_interleave(q_sizes[0].long(), 1).repeat_interleave(k_sizes[0].long(), 2)[None]
    right, _ = exact(q, k, v, seen=seen)
    yield f"{name}: 1 - cosine", lost_cosine(out, right), 1e-4
    yield f"{name}: largest share of a row's norm", row_errors(out, right), 0.1
    yield f"{name}: bits that differ in a second run", differences(out, again), 0


def check_starts(how: str) -> Iterator[Check]:
    q, k, v = outliers(256, 512, 128, H=1, kv_heads=1)
    for start in range(1, 18):
        sizes = torch.tensor([[start, 300, 212 - start]], device=DEVICE, dtype=torch.int32)
        picked = torch.tensor([[[False, True, False]]], device=DEVICE)
        out = block_sparse_attention_quantised(
            q, k, v, picked, torch.tensor([[256]], device=DEVICE, dtype=torch.int32), sizes,
            map_index=torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
        )  # fmt: skip
        part = slice(start, start + 300)
        yield (
            f"keys from token {start} on, {how}: 1 - cosine",
            lost_cosine(out, exact(q, k[:, :, part], v[:, :, part])[0]),
            1e-4,
        )


def check_compile() -> Iterator[Check]:
    q, k, v = outliers(300, 300, 64)
    expected = svg.attention(q, k, v, is_causal=True)
    compiled = torch.compile(lambda q, k, v: svg.attention(q, k, v, is_causal=True), fullgraph=True)
    seen = torch.rand(300, 300, device=DEVICE) < 0.7
    masked = torch.compile(svg.attention, fullgraph=True)
    yield (
        "svg.attention with a mask under torch.compile, whole graph: bits that differ",
        differences(masked(q, k, v, seen), svg.attention(q, k, v, seen)),
        0,
    )
    yield (
        "svg.attention under torch.compile, whole graph: bits that differ",
        differences(compiled(q, k, v), expected),
        0,
    )


def check_large() -> Iterator[Check]:
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        print("     long sequences and offsets beyond 2^31 elements: not checked, needs 40 GiB of free memory")
        return
    q, k, v = outliers(256, 170_001, 128)
    for precision in (p for p in precisions() if "int8" in p):
        yield (
            f"170 001 keys {precision}: 1 - cosine",
            lost_cosine(quantised_attention(q, k, v, precision=precision), exact(q, k, v)[0]),
            1e-4,
        )
    wide = torch.empty(1, 70_001, 240, 128, device=DEVICE, dtype=torch.bfloat16)
    view = wide[:, :, -2:].transpose(1, 2)
    view.copy_(torch.randn(1, 2, 70_001, 128, device=DEVICE))
    near = view.contiguous()
    for precision in (p for p in precisions() if "int8" in p):
        far, close = (quantised_attention(x, x, x, precision=precision) for x in (view, near))
        yield f"offsets beyond 2^31 elements {precision}: bits that differ", differences(far, close), 0


def check_masks() -> Iterator[Check]:
    for precision, (S, Sk) in itertools.product(precisions(), ((129, 193), (700, 1100))):
        arguments = outliers(S, Sk, 128, B=2, H=4, kv_heads=2)
        for name, shape in (("keys", (2, 1, 1, Sk)), ("pairs", (1, 4, S, Sk))):
            mask = torch.rand(shape, device=DEVICE) < 0.5
            if name == "pairs":
                mask[:, :, 3] = False
            poison_memory()
            out, lse = quantised_attention(*arguments, precision=precision, mask=mask, return_lse=True)
            right, _ = exact(*arguments, seen=mask)
            what = f"mask of {name} {precision} S={S} Sk={Sk}"
            yield f"{what}: 1 - cosine", lost_cosine(out, right), 1e-4 if "int8" in precision else 6e-3
            if name == "pairs":
                yield f"{what}: a row without keys", out[:, :, 3].abs().sum() + (lse[:, :, 3] != -math.inf).sum(), 0


def check_failures() -> Iterator[Check]:
    """A head whose sums are not finite is named, and no other."""
    q, k, v = outliers(300, 300, 128)
    q[0, 1, 5, 3] = math.inf
    for precision in precisions():
        failed = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
        quantised_attention(q, k, v, precision=precision, failed=failed)
        yield f"failed heads {precision}", abs(failed - torch.tensor([[0, 1]], device=DEVICE)).sum(), 0


def check_fp4() -> Iterator[Check]:
    """NVFP4, native or emulated, dense, causal and masked."""
    native = target.has_fp4(torch.device(DEVICE))
    for (S, Sk, D), causal in itertools.product([(1, 1, 64), (129, 193, 96), (700, 1100, 128)], (False, True)):
        arguments = outliers(S, Sk, D, B=2, H=4, kv_heads=2)
        mask = None if causal else torch.rand(2, 1, 1, Sk, device=DEVICE) < 0.7
        options = {"is_causal": causal, "mask": mask}
        poison_memory()
        out, lse = fp4_attention(*arguments, **options, return_lse=True)
        right, right_lse = exact(*arguments, causal, mask)
        spec = fp4_attention_reference(*arguments, **options)
        name = f"nvfp4 {'native' if native else 'emulated'} S={S} Sk={Sk} D={D}{' causal' if causal else ' masked'}"
        yield f"{name}: 1 - cosine", lost_cosine(out, right), 5e-3
        yield f"{name}: error over the specification's", (out - right).norm() / ((spec - right).norm() + 1e-6), 1.2
        seen = right_lse.isfinite()
        yield f"{name}: lse", (lse - right_lse)[seen].abs().sum() / seen.sum().clamp_min(1), 0.1
    x = outliers(300, 300, 96)[0]
    for packed, transposed in itertools.product((False, native), (False, True)):
        got, right = (op(x, packed=packed, transposed=transposed) for op in (quantize_nvfp4, quantize_nvfp4_reference))
        name = f"quantize_nvfp4 {'packed' if packed else 'fp16'}{' transposed' if transposed else ''}"
        yield f"{name}: share that differs", differences(got.values, right.values) / right.values.numel(), 1e-3


def check_varlen() -> Iterator[Check]:
    """Packed sequences, against each by itself, without a look at the device."""
    lengths = [700, 1, 129, 0, 2000, 64]
    parts = [outliers(n, n, 128, H=4, kv_heads=2) for n in lengths if n]
    q, k, v = (torch.cat([part[i][0].transpose(0, 1) for part in parts]).transpose(0, 1) for i in range(3))
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    for precision, causal in itertools.product((p for p in precisions() if "int8" in p), (False, True)):
        call = {"precision": precision, "is_causal": causal}
        varlen_attention(q, k, v, ends, ends, **call)
        poison_memory()
        with no_waiting():
            out, lse = varlen_attention(q, k, v, ends, ends, **call, return_lse=True)
        right, right_lse = (torch.cat(x, 2) for x in zip(*(exact(*part, causal) for part in parts)))
        name = f"varlen {precision}{' causal' if causal else ''}"
        yield f"{name}: 1 - cosine", lost_cosine(out, right[0]), 5e-4
        yield f"{name}: lse", (lse - right_lse[0]).abs().mean(), 0.01


def check_guard() -> Iterator[Check]:
    """A head that INT8 cannot stand for, in real calls of the methods: computed again, and nothing waits."""
    layout = TokenLayout(5, 16, 20, 40, "last")
    text_mask = torch.arange(40, device=DEVICE)[None] < torch.tensor([[17], [40]], device=DEVICE)
    configs = [svg.Sage2Config(precision=p, tolerance=0.2) for p in ("int8-fp16", "auto")]
    always = {"precision": "int8-fp16", "tolerance": 0.2, "warmup_steps": 0, "warmup_layers": 0}
    configs += [svg.SVG1Config(density=0.4, **always), svg.SVG2Config(num_q_clusters=9, num_k_clusters=20, **always)]
    for config, masked in itertools.product(configs, (False, True)):
        q, k, v = (x.transpose(1, 2).contiguous() for x in outliers(1640, 1640, 64, B=2, H=3, kv_heads=3))
        k[1, :, 2, 0] = 3000 * torch.randn(1640, device=DEVICE).sign()
        q[1, :, 2] = 3 * torch.randn(1640, 64, device=DEVICE)
        q[1, :, 2, 0] = 0
        v[1, :, 2] = torch.randn(1640, 64, device=DEVICE)  # no mean in which the error could hide
        plain = {} if config.method == "sage2" else {"precision": "native"}
        right_config = dataclasses.replace(config, **plain) if plain else svg.DenseConfig()
        outs = []
        for one in (config, right_config):
            for again in (False, True):  # the first call compiles
                state = RunState(one, 1)
                state.begin_forward(3, 9, "cond", layout)
                poison_memory()
                with no_waiting() if again else contextlib.nullcontext():
                    out = attend(q, k, v, state, 0, text_mask if masked else None)
            outs.append(out)
            if one is config:
                failed = state.records[0].guarded.failed.cpu()
        name = f"guard {config.method} {config.precision}{' masked' if masked else ''}"
        expected = torch.tensor([[0, 0, 0], [0, 0, 1]])
        yield f"{name}: heads flagged wrongly", int((failed != expected).sum()), 0
        yield f"{name}: 1 - cosine of the head computed again", lost_cosine(outs[0][1, :, 2], outs[1][1, :, 2]), 1e-4
        yield f"{name}: 1 - cosine of the others", lost_cosine(outs[0][0], outs[1][0]), 1e-3


GROUPS = {
    "fp4": check_fp4,
    "varlen": check_varlen,
    "guard": check_guard,
    "quantisation": check_quantisation,
    "dense": check_dense,
    "masks": check_masks,
    "failures": check_failures,
    "sparse": check_sparse,
    "alignment": check_alignment,
    "specialised": check_specialised,
    "compile": check_compile,
    "large": check_large,
}

if __name__ == "__main__":
    main()
