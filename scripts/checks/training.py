"""Checks 8-bit training attention on this GPU against fp64, then times it beside SDPA's FlashAttention.

    python scripts/checks/training.py --out training.json [--sweep] [--no-timing] [--no-checks]

Outputs poisoned beforehand, two runs compared bit for bit, GQA, causal, packed sequences, odd lengths, strided inputs,
values far from 1, NaN, torch.compile, a call without a wait for the device, offsets beyond 2^31 elements. Timings have
the keys of docs/benchmarks; with --sweep also every row of the kernels' candidates. Exits 1 when a check fails.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import (
    DEVICE,
    Check,
    begin,
    command_line,
    finish,
    judge,
    judge_all,
    poison_memory,
    quietly,
    saving,
    show_result,
)

import svg
from svg.bench.run import Bench, bench_ceilings, bench_training
from svg.kernels.training import forward_hopper as training_hopper

# Of the relative l2 error at N(0, 1), for gradients summed in INT8 and in bf16: a fifth above the references' own.
BARS = {
    "int8": {"out": 0.0195, "dq": 0.020, "dk": 0.024, "dv": 0.018},
    "bf16": {"out": 0.0195, "dq": 0.0145, "dk": 0.0145, "dv": 0.0125},
}
HOPPER_BARS = dict.fromkeys(BARS, BARS["bf16"] | {"out": 0.0115})  # P V, too, in bf16; the same kernels for both


def main() -> None:
    parser = command_line(__doc__, sweep="also time other tile sizes")
    parser.add_argument("--no-checks", action="store_true", help="timing only")
    args, machine = begin(parser)
    if training_hopper.supports(torch.device(DEVICE)):
        BARS.update(HOPPER_BARS)
    bench = Bench(f"python scripts/checks/training.py --seed {args.seed}", show_result, print, args.sweep)
    results = {**machine, "checks": [], "results": bench.results}
    save = saving(args.out, results)
    checks = [check_errors, check_shapes, check_packed, check_values, check_compile, check_large]
    judge_all([] if args.no_checks else checks, results["checks"], save)
    for section in () if args.no_timing else (bench_ceilings, bench_training):
        results["checks"].extend(judge(timed(section, bench), section.__name__))
        save()
    finish(results["checks"])


def timed(section: Callable[[Bench], None], bench: Bench) -> Iterator[Check]:
    section(bench)
    yield f"{section.__name__} ran", 0, 0


def normal(S, Sk=None, D=128, dtype=torch.bfloat16, B=1, H=2, kv_heads=2):
    """q, k, v that want gradients, and the gradient of the output, N(0, 1), views of [B, S, H, D]."""
    shapes = ((S, H), (Sk or S, kv_heads), (Sk or S, kv_heads), (S, H))
    *qkv, grad = (torch.randn(B, tokens, heads, D, device=DEVICE).to(dtype).transpose(1, 2) for tokens, heads in shapes)
    return tuple(x.requires_grad_() for x in qkv), grad


def exact(qkv, grad, is_causal=False, starts=None):
    """out, dq, dk, dv from the definition in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    group = q.shape[1] // k.shape[1]
    starts_q, starts_k = ([0, q.shape[2]], [0, k.shape[2]]) if starts is None else starts
    parts = []
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        keys, values = (x[:, :, c:d].repeat_interleave(group, 1) for x in (k, v))
        scores = q[:, :, a:b] @ keys.mT * q.shape[-1] ** -0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        parts.append(scores.softmax(-1) @ values)
    out = torch.cat(parts, 2)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())


def computed(qkv, grad, **options):
    """out, dq, dk, dv in INT8."""
    out = svg.training_attention(*qkv, enable_gqa=True, **options)
    return out.detach(), *torch.autograd.grad(out, qkv, grad)


def packed(starts):
    return {
        f"cu_seqlens_{side}": torch.tensor(x, dtype=torch.int32, device=DEVICE)
        for side, x in zip("qk", starts, strict=True)
    }


def compare(name, qkv, grad, starts=None, **options) -> Iterator[Check]:
    right, given = exact(qkv, grad, starts=starts, **options), options if starts is None else options | packed(starts)
    for products, bars in BARS.items():
        poison_memory()
        found, again = (computed(qkv, grad, gradients=products, **given) for _ in range(2))
        for part, a, b in zip(bars, found, right, strict=True):
            yield f"{name} {products}: {part}", (a - b).norm() / b.norm().clamp(min=1e-3), bars[part]
        yield f"{name} {products}: elements that differ in a second run", differences(found, again), 0


def differences(a, b):
    return sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))


def check_errors() -> Iterator[Check]:
    for S, D, dtype in ((4096, 128, torch.bfloat16), (4096, 64, torch.float16), (8192, 128, torch.float16)):
        yield from compare(f"N(0, 1) S={S} D={D} {dtype}", *normal(S, D=D, dtype=dtype))


def check_shapes() -> Iterator[Check]:
    for S, Sk, D in ((1, 7, 64), (63, 65, 128), (127, 129, 64), (129, 193, 96), (1025, 2047, 80), (700, 300, 128)):
        yield from compare(f"S={S} Sk={Sk} D={D} GQA", *normal(S, Sk, D, B=2, H=4))
        if S > 1:  # one query that sees one key has zero gradients, which have no relative error
            yield from compare(f"S={S} Sk={Sk} D={D} GQA causal", *normal(S, Sk, D, B=2, H=4), is_causal=True)
    qkv, grad = normal(500, D=128)
    apart = tuple(x.detach().contiguous().requires_grad_() for x in qkv)
    yield "heads before tokens: elements that differ", differences(computed(qkv, grad), computed(apart, grad)), 0


def check_packed() -> Iterator[Check]:
    starts = ([0, 70, 71, 400, 900, 1500], [0, 300, 301, 600, 1000, 1500])
    for causal in (False, True):
        yield from compare(f"packed causal={causal}", *normal(1500, D=128, H=4), starts, is_causal=causal)
    empty = ([0, 0, 64, 300], [0, 100, 100, 300])  # no queries, no keys, both
    out, *gradients = computed(*normal(300), **packed(empty))
    yield "a sequence without keys: largest output", out[:, :, :64].abs().max(), 0
    yield "a sequence without queries: largest gradient", gradients[1][:, :, :100].abs().max(), 0


def check_values() -> Iterator[Check]:
    qkv, grad = normal(600)
    right = computed(qkv, grad)
    for size in (2.0**-60, 2.0**60):
        found = computed(qkv, grad * size)
        worst = max(
            ((a.float() / size - b.float()).norm() / b.float().norm()).item()
            for a, b in zip(found[1:], right[1:], strict=True)
        )
        yield f"gradient of the output times {size:g}: change", worst, 1e-3
    (q, k, v), grad32 = normal(600, dtype=torch.float32)
    q, k, v = (x.detach() for x in (q, k, v))
    shifted = tuple(
        x.requires_grad_() for x in (q, k + 8 * torch.randn_like(k[:, :, :1]), v + 20 * torch.randn_like(v[:, :, :1]))
    )
    bars = BARS["int8"]
    for part, a, b in zip(bars, computed(shifted, grad32), exact(shifted, grad32), strict=True):
        yield f"K and V with large means: {part}", (a - b).norm() / b.norm(), bars[part]
    broken = grad.clone()
    broken[0, 0, 3, 5] = float("nan")
    _, dq, dk, dv = computed(qkv, broken)
    shown = all(x[0, 0].isnan().any() for x in (dq, dk, dv)) and all(x[0, 1].isfinite().all() for x in (dq, dk, dv))
    yield "one NaN in the gradient shows in its head only: not so", float(not shown), 0
    quietly(computed, qkv, grad)
    yield "a call without a wait for the device", 0, 0


def check_compile() -> Iterator[Check]:
    qkv, grad = normal(300, D=64)

    def attend(q, k, v):
        return svg.training_attention(q, k, v, is_causal=True) * 2

    found, right = (torch.autograd.grad(op(*qkv), qkv, grad) for op in (torch.compile(attend, fullgraph=True), attend))
    yield "torch.compile, whole graph: elements that differ", differences(found, right), 0


def check_large() -> Iterator[Check]:
    """Offsets beyond 2^31 elements: a few heads of a wide tensor, the same as from a small one."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        print("     offsets beyond 2^31 elements: not checked, needs 40 GiB of free memory")
        return
    wide = torch.empty(1, 70_001, 240, 128, device=DEVICE, dtype=torch.bfloat16)
    view = wide[:, :, -2:].transpose(1, 2)
    view.copy_(torch.randn(1, 2, 70_001, 128, device=DEVICE))
    near = view.contiguous()
    far, close = (computed(tuple(x.detach().requires_grad_() for _ in range(3)), near) for x in (view, near))
    yield "strides beyond 2^31 elements: elements that differ", differences(far, close), 0
    q = near[:, :, -512:].detach().requires_grad_()
    k, v = (near.detach().flip(2).requires_grad_() for _ in range(2))
    right = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), near[:, :, :512])
    for part, a, b in zip(("dq", "dk", "dv"), computed((q, k, v), near[:, :, :512])[1:], right, strict=True):
        yield f"70 001 keys: {part}", (a.float() - b.float()).norm() / b.float().norm(), 1.3 * BARS["int8"][part]


if __name__ == "__main__":
    main()
