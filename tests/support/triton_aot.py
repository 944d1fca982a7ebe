"""Compiles every Triton kernel for an architecture without a GPU and tells what came out.

The public operations run on CPU tensors with a stand-in driver, and each launch stops after compilation: what is
compiled is exactly what the operation would launch. Run as a program, in a process of its own; prints JSON:

    python triton_aot.py ARCH
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
from aot_linears import linears
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from svg.kernels import (
    block_sparse_attention,
    block_sparse_attention_quantised,
    block_statistics,
    gather_tokens,
    granules,
    kmeans,
    kmeans_update,
    neighbour_order,
    probe_attention,
    quantised_attention,
    sparge_block_map,
    top_p_block_map,
    training_attention,
    training_attention_backward,
)
from svg.kernels.block_sparse.blocks import Tail
from svg.kernels.block_sparse.triton import LAUNCH, Launch
from svg.kernels.block_sparse_quantised.triton import LAUNCH as sparse_table
from svg.kernels.common import target
from svg.kernels.common.heads import move_heads
from svg.kernels.common.merge import merge_attention
from svg.kernels.common.smoothing import unsmoothed_lse
from svg.kernels.common.sums import sums_of
from svg.kernels.dense_quantised.nvfp4 import fp4_attention
from svg.kernels.dense_quantised.triton import LAUNCH as quantised_table
from svg.kernels.dense_quantised.varlen import varlen_attention
from svg.kernels.granules.reference import cut_granules_reference, lists_of
from svg.kernels.granules.values import GranuleLists
from svg.kernels.selection.computed_pairs import computed_pairs
from svg.kernels.training import forward_hopper as training_hopper

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"\b(?:[HQIO]G?MMA|UTC\w*MMA)\b")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class StandInDriver:
    """As much of a CUDA driver as the compiler asks for."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def run_operations(arch):
    """Yields (case, op call) for every kernel variant."""
    for name, D in (("bf16", 64), ("bf16", 96), ("bf16", 128), ("fp16", 128), ("fp32", 64), ("fp32", 128)):
        yield f"block_sparse {name} D={D}", lambda name=name, D=D: attention(DTYPES[name], D)
    if arch == 90:
        for D, tail in ((64, 0), (96, 0), (128, 0), (64, 5), (128, 5)):
            yield (
                f"block_sparse specialised D={D} tail={tail}",
                lambda D=D, tail=tail: attention(DTYPES["bf16"], D, tail, contiguous=True),
            )
        for D, multiple in ((64, 1), (64, 64), (128, 1), (128, 64)):
            yield (
                f"sparse quantised int8-fp8 D={D} in {multiple} tail",
                lambda D=D, multiple=multiple: sparse_quantised("int8-fp8", D, tail=5, key_multiple=multiple),
            )
        for plain in (quantised_plain, sparse_quantised_plain):
            yield f"{plain.__name__} int8-fp8", plain
        # the other ways to launch that `svg bench attention --sweep` times
        for row in (Launch(128, 64, 8, 3), Launch(128, 64, 8, 3, True), Launch(128, 128, 8, 2, True)):
            yield f"block_sparse bf16 {row.name()}", lambda row=row: attention_launched(row)
        for D, tail in ((64, True), (96, True), (128, True), (128, False)):
            yield f"granules specialised D={D} tail={tail}", lambda D=D, tail=tail: over_granules("bf16", D, 128, tail)
    for name, D in itertools.product(("bf16", "fp32"), (64, 128)):
        yield f"granules {name} D={D}", lambda name=name, D=D: over_granules(name, D, 64)
    yield "granules bf16 D=128 of 32 rows", lambda: over_granules("bf16", 128, 32)
    yield "granules bf16 D=128 of 16 rows", lambda: over_granules("bf16", 128, 16)
    for name, D, size, pool in (("bf16", 128, 16, 4), ("fp16", 64, 64, 1), ("fp32", 128, 8, 8)):
        yield (
            f"granules planned {name} D={D} size={size} pool={pool}",
            lambda name=name, D=D, size=size, pool=pool: planned_granules(name, D, size, pool),
        )
    yield "granules listed of a long video", lambda: listed(18_900)
    yield "block_sparse bf16 D=128 tail", lambda: attention(DTYPES["bf16"], 128, tail=5)
    for name in ("bf16", "fp32", *(["fp16"] if arch == 80 else [])):
        yield f"kmeans {name}", lambda name=name: clustering(DTYPES[name])
    yield "kmeans bf16 through pointers", lambda: clustering(torch.bfloat16, padding=1)
    fp8 = target.arch(None) >= target.FP8_ARCH
    for precision, D in (("int8-fp8" if fp8 else "int8-fp16", 64), ("int8-fp8", 128), ("int8-fp16", 128)):
        if fp8 or precision == "int8-fp16":
            yield f"quantised {precision} D={D}", lambda p=precision, D=D: quantised(p, D)
            yield f"sparse quantised {precision} D={D}", lambda p=precision, D=D: sparse_quantised(p, D)
    best = "int8-fp8" if fp8 else "int8-fp16"
    yield f"sparse quantised in tiles {best} D=128", lambda: sparse_quantised(best, 128, key_multiple=64)
    yield f"sparse quantised {best} D=128 pv", lambda: sparse_quantised(best, 128, pv_threshold=torch.zeros(2))
    if fp8:
        yield "quantised fp8 acc16 D=64", lambda: quantised("int8-fp8-acc16", 64)
        yield "quantised fp8 acc16 D=128", lambda: quantised("int8-fp8-acc16", 128)
        yield "sparse quantised fp8 acc16 D=128", lambda: sparse_quantised("int8-fp8-acc16", 128)
        yield "quantize fp8 D=96", lambda: quantised("int8-fp8", 96)
    packed = "int8-fp8" if fp8 else "int8-fp16"
    precision = "int4-fp8" if fp8 else "int4-fp16"
    yield f"quantised {precision} D=128 causal", lambda: quantised(precision, 128, is_causal=True, k_groups="thread")
    yield "fp4 D=64 causal", lambda: fp4(64, is_causal=True)
    yield "fp4 D=128 mask", lambda: fp4(128, mask=torch.ones(1, 1, 1, 256, dtype=torch.bool))
    for case in ((64, False, "int8"), (128, True, "int8"), (128, True, "bf16")):
        yield f"training {case}", lambda case=case: plain_training(*case)
    if arch == 90:
        for case in ((64, True, 2), (128, False, 1), (128, True, 2)):
            yield f"training specialised {case}", lambda case=case: training(case[0], case[1], "bf16", case[2])
    for D, size, precision, own in granules_in_8_bits(arch, fp8):
        yield (
            f"granules of {size} {precision} D={D}{' specialised' if own else ''}",
            lambda D=D, size=size, precision=precision, own=own: granules_quantized(precision, D, size, own),
        )
    yield "neighbours", lambda: neighbour_order(torch.zeros(1, 2, 1000, 128))
    for name, D in (("bf16", 64), ("bf16", 128), ("fp32", 128)):
        yield f"probe {name} D={D}", lambda name=name, D=D: probe(DTYPES[name], D)
    yield from linears(fp8)
    for name in ("bf16", "fp32"):
        yield f"merge {name}", lambda name=name: merging(DTYPES[name])
    yield "sparge", lambda: sparge(4096 * 64)  # the most blocks
    yield "heads", heads
    seen = torch.ones(1, 1, 1, 256, dtype=torch.bool)
    yield f"quantised mask {packed} D=128", lambda: quantised(packed, 128, mask=seen)
    yield f"quantised mask {packed} D=64", lambda: quantised(packed, 64, mask=seen, is_causal=True)
    yield f"quantised varlen {packed}", lambda: varlen(packed)
    yield "permute", lambda: gather_tokens(torch.zeros(1, 2, 64, 128).bfloat16(), torch.zeros(1, 2, 64).int())
    yield "top_p", lambda: top_p(1000, None)
    yield "top_p budget", lambda: top_p(1000, 0.3)
    yield "top_p 2500", lambda: top_p(2500, None)
    yield "top_p of each head", lambda: top_p(1000, None, torch.full((2,), 0.9))
    yield "probe of each head", lambda: probe(DTYPES["bf16"], 128, torch.zeros(1, 2, dtype=torch.int32))


def attention(dtype, D, tail=0, contiguous=False):
    q = torch.zeros(1, 256, 2, D, dtype=dtype).transpose(1, 2)
    k = q.contiguous() if contiguous else q
    sizes, index = torch.full((2, 4), 64, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    block_map, permutation = torch.ones(2, 4, 4, dtype=torch.bool), torch.zeros(1, 2, 256, dtype=torch.int32)
    means = torch.zeros(1, 2, tail, D, dtype=dtype)
    block_sparse_attention(
        q, k, k, block_map, sizes, sizes, map_index=index, q_permutation=permutation, return_lse=True,
        tail=Tail(means, means, torch.zeros(2, 4, tail)) if tail else None,
    )  # fmt: skip


def over_granules(name, D, rows, tail=True):
    q = torch.zeros(1, 256, 2, D, dtype=DTYPES[name]).transpose(1, 2)
    order = torch.zeros(1, 2, 256, dtype=torch.int32)
    cut = cut_granules_reference(q, q, order, 16)
    lists = lists_of(torch.ones(1, 2, 256 // rows, 16, dtype=torch.bool), cut.tokens, 16, rows)
    granules.granule_attention(q, cut, lists, q_order=order, tail=tail, return_lse=True)
    granules.granule_attention(q, cut, lists, q_order=order, tail=tail, only=torch.ones(1, 2, dtype=torch.int32))


def granules_in_8_bits(arch, fp8):
    """Yields (head dim, keys a granule, precision, whether Hopper's own kernel runs it)."""
    for D in (64, 128):
        yield D, 16, "int8-fp16", False
        if fp8:
            yield D, 16, "int8-fp8", False
    if fp8:
        yield 128, 64, "int8-fp8-acc16", False
    if arch == 90:
        yield from ((D, 16, "int8-fp8", True) for D in (64, 96, 128))
        yield 128, 32, "int8-fp8", True


def granules_quantized(precision, D, size, own):
    q = torch.zeros(1, 256, 2, D, dtype=torch.bfloat16).transpose(1, 2)
    order, text = torch.zeros(1, 2, 200, dtype=torch.int32), torch.zeros(1, 56, dtype=torch.int32)
    cut = granules.quantize_granules(q, q, order, size=size, text=text, precision=precision, interleave=own)
    number = torch.zeros(1, 2, 2, dtype=torch.int32)
    lists = GranuleLists(number.flatten(), number.long(), number, number, number[..., None], number.flatten(), 128)
    for return_lse in (False, True):
        granules.granule_attention_quantized(
            q, cut, lists, q_order=order, return_lse=return_lse, failed=number[..., 0].contiguous()
        )


def planned_granules(name, D, size, pool):
    q = torch.zeros(1, 256, 2, D, dtype=DTYPES[name]).transpose(1, 2)
    order, text = torch.zeros(1, 2, 200, dtype=torch.int32), torch.zeros(1, 56, dtype=torch.int32)
    cut = granules.cut_granules(q, q, order, size, text, torch.zeros(1, dtype=torch.int32))
    scores = granules.granule_scores(q, order, cut, rows=128, pool=pool)
    lists = granules.select_granules(scores, cut.tokens, budget=0.2, floor=0.5, size=size, rows=128)
    granules.listed_density(lists, torch.zeros(1, dtype=torch.int64), video=200, text=56, size=size)
    sums_of(q, q, q)


def listed(T):
    tokens = torch.zeros(1, T, dtype=torch.int32)
    granules.select_granules(torch.zeros(1, 2, 3, T), tokens, budget=0.2, floor=0.5, size=16, rows=128)


def quantised(precision, D, **options):
    q = torch.zeros(1, 256, 2, D, dtype=torch.bfloat16).transpose(1, 2)
    quantised_attention(q, q, q, precision=precision, return_lse=True, **options)


def fp4(D, **options):
    q = torch.zeros(1, 256, 2, D, dtype=torch.bfloat16).transpose(1, 2)
    fp4_attention(q, q, q, return_lse=True, **options)


def training(D, is_causal, products, group=1):
    q = torch.zeros(1, 256, 2, D, dtype=torch.bfloat16).transpose(1, 2)
    k = q[:, : 2 // group]
    out, kept = training_attention(q, k, k, is_causal=is_causal)
    training_attention_backward(out, out, kept, key_tokens=256, is_causal=is_causal, sm_scale=0.1, products=products)


def plain_training(D, is_causal, products):
    """What launches where Hopper's own kernels don't."""
    supports, training_hopper.supports = training_hopper.supports, lambda device: False
    training(D, is_causal, products)
    training_hopper.supports = supports


def quantised_plain():
    with not_specialised(quantised_table):
        quantised("int8-fp8", 128)


def sparse_quantised_plain():
    with not_specialised(sparse_table):
        sparse_quantised("int8-fp8", 128)


@contextlib.contextmanager
def not_specialised(table):
    kept = table[90][True, 128]
    table[90][True, 128] = dataclasses.replace(kept, specialised=False)
    yield
    table[90][True, 128] = kept


def attention_launched(row):
    kept, LAUNCH[90][2, 128] = LAUNCH[90][2, 128], row
    attention(torch.bfloat16, 128)
    LAUNCH[90][2, 128] = kept


def sparse_quantised(precision, D, tail=0, **options):
    q = torch.zeros(1, 256, 2, D, dtype=torch.bfloat16).transpose(1, 2)
    sizes, index = torch.full((2, 4), 64, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    order, means = torch.zeros(1, 2, 256, dtype=torch.int32), torch.zeros(1, 2, tail, D, dtype=torch.bfloat16)
    block_sparse_attention_quantised(
        q, q, q, torch.ones(2, 4, 4, dtype=torch.bool), sizes, sizes, map_index=index, q_permutation=order,
        k_permutation=order, precision=precision, return_lse=True,
        tail=Tail(means, means, torch.zeros(2, 4, tail)) if tail else None, **options,
    )  # fmt: skip


def varlen(precision):
    q, ends = torch.zeros(256, 2, 128).bfloat16().transpose(0, 1), torch.tensor([0, 100, 256], dtype=torch.int32)
    varlen_attention(q, q, q, ends, ends, precision=precision, is_causal=True, return_lse=True)


def heads():
    x, chosen = torch.zeros(1, 2, 64, 128).bfloat16(), torch.zeros(1, 2, dtype=torch.int32)
    move_heads(x, torch.zeros_like(x), chosen)
    move_heads(x, torch.zeros_like(x), chosen, torch.zeros(1, 2, 64).int())


def probe(dtype, D, mask_index=None):
    q, k = (torch.zeros(1, n, 2, D, dtype=dtype).transpose(1, 2) for n in (64, 256))
    masks, visible = torch.ones(1, 2, 64, 256, dtype=torch.bool), torch.ones(1, 256, dtype=torch.bool)
    probe_attention(q, k, k, masks, visible, mask_index=mask_index)


def sparge(tokens):
    x = torch.zeros(1, 1, 2, 128, dtype=torch.bfloat16).expand(1, tokens, 2, 128).transpose(1, 2)
    order, heads = torch.zeros(1, dtype=torch.int32).expand(tokens), torch.zeros(2)
    q_blocks, k_blocks = (block_statistics(x, size, order) for size in (128, 64))
    sparge_block_map(q_blocks, k_blocks, simthresh=heads, cdf=heads, sm_scale=1.0)
    for topk in (0.5, 1.0):
        sparge_block_map(q_blocks, k_blocks, simthresh=heads, topk=topk, sm_scale=1.0)


def merging(dtype):
    x, lse = torch.zeros(1, 64, 2, 128, dtype=dtype).transpose(1, 2), torch.zeros(1, 2, 64)
    merge_attention(x, lse, x, lse)
    unsmoothed_lse(lse, x, torch.zeros(1, 2, 128), 1.0)


def clustering(dtype, padding=0):
    tokens = 16_640  # the scan over chunks is as wide as it gets
    x = torch.zeros(1, 2, tokens, 128 + padding, dtype=dtype)[..., :128]
    for clusters in (32, 1000):
        kmeans(x, torch.zeros(1, 2, clusters, 128), 2)
    kmeans_update(x, torch.zeros(1, 2, tokens, dtype=torch.int32), torch.zeros(1, 2, 32, 128))


def top_p(clusters, budget, share=0.9):
    centroids = torch.zeros(1, 2, clusters, 64)
    sizes = torch.ones(1, 2, clusters).int()
    block_map = top_p_block_map(centroids[:, :, :300], centroids, sizes, share, 0.1, 1.0, budget)
    computed_pairs(block_map[0], torch.ones(2, min(300, clusters)).int(), sizes[0])


def compile_all(arch):
    """Every kernel an operation launches: list of dicts (case, kernel, shared, registers, spills, instructions)."""
    driver.set_active(StandInDriver(arch))
    target.use_triton = lambda x: True
    target.arch = lambda device: arch
    launched, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launched.append(
        (self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs))
    )
    report, cubins = [], []
    for case, operation in run_operations(arch):
        launched.clear()
        operation()
        for name, compiled in launched:
            report.append({"case": case, "kernel": name, "shared": compiled.metadata.shared})
            cubins.append(compiled.asm["cubin"])
    found = describe(cubins, arch)
    return [row | found[cubin] for row, cubin in zip(report, cubins, strict=True)]


def describe(cubins, arch):
    """Cubin -> registers, bytes spilled a thread, reloads of them in a loop, matrix instructions, a hash, and what ptxas 12.8 got wrong.

    It packs two equal constants into FP8 beside whatever a register holds, the stack pointer for one.
    """
    found = {}
    for cubin, lines in disassembled(list(dict.fromkeys(cubins)), arch):
        resources, assembly = resources_of(cubin), "\n".join(lines.values())
        found[cubin] = {
            "registers": int(resources["REG"]),
            "spills": int(resources["STACK"]) + int(resources["LOCAL"]),
            "reloads": max(map(loads_of_spilled, innermost_loops(lines)), default=0),
            "scaled": bool(re.search(r"OMMA\S*\.4X", assembly)),  # FP4 with a scale for each 16
            "stale": re.findall(r"F2FP\S*MERGE_C R\d+, (R[Z\d]+), \1, R\d+", assembly),
            "instructions": sorted(set(MATRIX.findall(assembly))),
            "matrix": len(MATRIX.findall(assembly)),
            "code": hashlib.sha256(code_of(cubin)).hexdigest()[:16],  # instructions alone: no names, no lines
        }
    return found


def resources_of(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", tool_output("cuobjdump", "-res-usage", file.name)))


def disassembled(cubins, arch):
    """Yields (cubin, {address: instruction}). All code is one file: the tool takes half a second to start."""
    codes = [code_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = tool_output("nvdisasm", "-b", f"SM{arch}a" if arch >= 90 else f"SM{arch}", file.name)
    instructions = {
        int(at, 16): line for at, line in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s*(.+)$", text, re.MULTILINE)
    }
    assert len(instructions) * 16 == sum(map(len, codes))
    end = 0
    for cubin, code in zip(cubins, codes, strict=True):
        start, end = end, end + len(code)
        yield cubin, {at: instructions[at] for at in range(start, end, 16)}


def code_of(cubin):
    """The machine code of the one kernel in an ELF file of 64 bits."""
    table, (size, count, names_at) = *struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = cubin[sections[names_at][4] :]
    (code,) = (
        cubin[start : start + length] for name, *_, start, length in sections if names[name:].startswith(b".text.")
    )
    return code


def innermost_loops(lines):
    """Instructions of every loop with matrix instructions in which there is no other such loop."""
    matrix = [at for at, line in lines.items() if MATRIX.search(line)]
    found = []
    for at, line in lines.items():
        back = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line)
        if back and (start := int(back[1], 16)) < at and any(start <= other < at for other in matrix):
            found.append((start, at))
    inner = [(a, b) for a, b in found if not any((a, b) != (c, d) and a <= c and d <= b for c, d in found)]
    return [[lines[at] for at in range(a, b, 16)] for a, b in inner]


def loads_of_spilled(lines):
    return sum(bool(re.search(r"\bLDL\b", line)) for line in lines)


def tool_output(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
