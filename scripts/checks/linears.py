"""Checks linears in 8 bits and the elementwise passes on this GPU against their specifications.

    python scripts/checks/linears.py --out linears.json [--no-timing]

Fresh seeds and shapes, odd tokens, strided rows, zero rows and rows with NaN, poisoned memory, two runs compared bit for bit, no
host synchronisation. With timings: the product against bf16 at 75,600 tokens, sums left to the tensor cores and not. Exits 1 when
a check fails.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import DEVICE, Check, begin, command_line, finish, judge_all, quietly, saving

from svg.bench.timing import median_ms
from svg.kernels import (
    QuantizedRows,
    activate,
    activate_reference,
    fp8_linear,
    fp8_linear_reference,
    gate_residual_reference,
    quantize_rows,
    quantize_rows_reference,
    residual_modulate,
    residual_modulate_reference,
)
from svg.kernels.linears import (
    int8_rows_matmul,
    int8_rows_matmul_reference,
    quantize_int8_rows,
    quantize_int8_rows_reference,
)
from svg.kernels.linears.int8_rows import hopper

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (48, 1000, 3072, 5120, 13824, 24576)
SIDES = ((5120, 5120), (1536, 8960), (336, 1536), (13824, 5120), (5120, 1008))
TOKENS = 75_600


def main() -> None:
    parser = command_line(__doc__)
    args, machine = begin(parser)
    results = {**machine, "checks": [], "results": {}}
    save = saving(args.out, results)
    with torch.inference_mode():
        checks = [
            check_rows,
            check_bad_rows,
            check_product,
            check_int8_rows,
            check_modulation,
            check_activations,
            check_waiting,
        ]
        judge_all(checks, results["checks"], save)
        if not args.no_timing:
            for key, value in timings():
                results["results"][key] = value
                print(f"{key:<64} {value:10.4g}", flush=True)
            save()
    finish(results["checks"])


def odd(least: int = 1, most: int = 500) -> int:
    """An odd number of tokens."""
    return int(torch.randint(least, most, ())) | 1


def unequal(got: QuantizedRows, wanted: QuantizedRows) -> float:
    """Share of values that are not the specification's; sums in another order may round to the neighbour."""
    return (got.values.float() != wanted.values.float()).float().mean().item()


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def check_rows() -> Iterator[Check]:
    for dtype in DTYPES:
        for width in WIDTHS:
            x = torch.randn(2, odd(), 2, width, device=DEVICE).to(dtype)[:, :, 1]  # strided
            x = x * torch.logspace(-3, 3, x.shape[1], device=DEVICE).to(dtype)[:, None]
            got, wanted = quantize_rows(x), quantize_rows_reference(x)
            yield f"rows {dtype} {width}: values differ", unequal(got, wanted), 0
            yield f"rows {dtype} {width}: scales differ", (got.scale != wanted.scale).float().mean(), 0
            again = quantize_rows(x)
            yield f"rows {dtype} {width}: two runs", unequal(got, again), 0


def check_bad_rows() -> Iterator[Check]:
    x = torch.zeros(1, 5, 512, device=DEVICE, dtype=torch.bfloat16)
    x[0, 1, 3], x[0, 2, 3], x[0, 3] = float("nan"), float("inf"), 1
    out = fp8_linear(quantize_rows(x), quantize_rows(torch.ones(64, 512, device=DEVICE)))
    yield "zero rows: largest output", out[0, (0, 4)].abs().max(), 0
    yield "rows with NaN or infinity: finite outputs", out[0, 1:3].isfinite().sum(), 0
    yield "the row beside them", (out[0, 3].float() - 512).abs().max(), 2
    empty = fp8_linear(quantize_rows(x[:, :0]), quantize_rows(torch.ones(64, 512, device=DEVICE)))
    yield "no rows: outputs", empty.numel(), 0


def check_product() -> Iterator[Check]:
    for dtype in DTYPES[:2]:
        for K, N in ((64, 48), (1536, 8960), (3072, 3072), (5120, 5120), (15360, 3072)):
            x, weight = torch.randn(1, odd(), K, device=DEVICE).to(dtype), torch.randn(N, K, device=DEVICE).to(dtype)
            bias = torch.randn(N, device=DEVICE).to(dtype)
            rows, columns = quantize_rows(x), quantize_rows(weight)
            wanted = fp8_linear_reference(rows, columns, bias)
            for fast in (False, True):
                error = apart(fp8_linear(rows, columns, bias, fast=fast), wanted)
                # bf16 rounds to 2^-9; sums of 14 bits err by less than the quantisation itself, 0.037
                yield f"product {dtype} {K} x {N} {'fast' if fast else 'exact'} sums", error, 0.015 if fast else 0.003
            exact = x.double() @ weight.double().T + bias.double()
            yield f"product {dtype} {K} x {N}: quantisation", apart(fp8_linear(rows, columns, bias), exact), 0.045


def check_int8_rows() -> Iterator[Check]:
    """Both kernels of the product: of few rows, and of many, odd in number, with sides that fill no tile."""
    for dtype in DTYPES[:2]:
        for M, K, N in (
            (odd(), 256, 256),
            (odd(), 320, 96),
            (1, 1536, 8960),
            *((odd(6000, 9000), K, N) for K, N in SIDES),
        ):
            x, weight = torch.randn(M, K, device=DEVICE).to(dtype), torch.randn(N, K, device=DEVICE) * K**-0.5
            x, weight = x * torch.logspace(-3, 3, M, device=DEVICE).to(dtype)[:, None], weight.to(dtype)
            rows, wanted = quantize_int8_rows(x), quantize_int8_rows_reference(x)
            name = f"rotated {dtype} {M} x {K} x {N}"
            yield f"{name}: values differ", unequal(rows, wanted), 0.01
            yield f"{name}: scales apart", apart(rows.scale, wanted.scale), 1e-5
            columns = quantize_int8_rows(weight)
            for bias in (torch.randn(N, device=DEVICE).to(dtype), None):
                out, same = int8_rows_matmul(rows, columns, bias), int8_rows_matmul_reference(rows, columns, bias)
                kernel = "Hopper" if hopper.supports(rows, columns) else "Triton"
                yield f"{name}: {kernel}'s product", apart(out / rows.scale[:, None], same / rows.scale[:, None]), 0.003
                again = int8_rows_matmul(rows, columns, bias)
                yield f"{name}: {kernel}'s two runs", (out != again).sum(), 0


def check_modulation() -> Iterator[Check]:
    for dtype in DTYPES:
        for width in (48, 1536, 3072, 5120):
            x, update = torch.randn(2, 2, odd(), width, device=DEVICE).to(dtype).unbind(0)
            gate, scale, shift = torch.randn(3, 2, 1, width, device=DEVICE).unbind(0)
            for affine in (False, True):
                options = {"affine": affine}
                total, out = residual_modulate(x, update, gate, scale, shift, 1e-6, **options)
                yield f"residual {dtype} {width}", apart(total, gate_residual_reference(x, update, gate)), 1e-4
                wanted = residual_modulate_reference(x.double(), update.double(), gate, scale, shift, 1e-6, **options)[
                    1
                ]
                yield f"norm of it {dtype} {width}", apart(out, wanted), torch.finfo(dtype).eps + 1e-6
                rows = residual_modulate(x, update, gate, scale, shift, 1e-6, fp8=True, **options)[1]
                wanted = residual_modulate_reference(x, update, gate, scale, shift, 1e-6, fp8=True, **options)[1]
                yield f"as rows {dtype} {width}: values differ", unequal(rows, wanted), 0.01
                yield f"as rows {dtype} {width}: apart", apart(rows.dequantize(), wanted.dequantize()), 0.004
                added, rows = residual_modulate(x, update, gate, scale, shift, 1e-6, int8=True, **options)
                wanted = residual_modulate_reference(x, update, gate, scale, shift, 1e-6, int8=True, **options)[1]
                name = f"as rotated rows {dtype} {width}"
                yield f"{name}: the sum", (added != total).sum(), 0
                yield f"{name}: scales apart", apart(rows.scale, wanted.scale), 0.008
                yield f"{name}: levels apart", (rows.values.int() - wanted.values.int()).abs().max(), 1
                yield f"{name}: values differ", unequal(rows, wanted), 0.08
                again = residual_modulate(x, update, gate, scale, shift, 1e-6, int8=True, **options)[1]
                yield f"{name}: two runs", (rows.values != again.values).sum() + (rows.scale != again.scale).sum(), 0


def check_activations() -> Iterator[Check]:
    for dtype in DTYPES:
        for kind in ("gelu_tanh", "gelu", "geglu", "swiglu"):
            for width, first in ((96, 32), (8192, 0), (12288, 3072)):
                x = 2 * torch.randn(1, odd(), width, device=DEVICE).to(dtype)
                before = torch.randn(1, x.shape[1], first, device=DEVICE).to(dtype) if first else None
                wanted = activate_reference(x.double(), kind, before=None if before is None else before.double())
                got = activate(x, kind, before=before)
                yield f"{kind} {dtype} {first} + {width}", apart(got, wanted), torch.finfo(dtype).eps + 2e-6
                rows = activate(x, kind, before=before, fp8=True)
                same = activate_reference(x, kind, before=before, fp8=True)
                yield f"{kind} {dtype} {first} + {width} as rows: values differ", unequal(rows, same), 0.01
                rows = activate(x, kind, before=before, int8=True)
                same = activate_reference(x, kind, before=before, int8=True)
                name = f"{kind} {dtype} {first} + {width} as rotated rows"
                yield f"{name}: scales apart", apart(rows.scale, same.scale), 0.004
                yield f"{name}: levels apart", (rows.values.int() - same.values.int()).abs().max(), 1
                yield f"{name}: values differ", unequal(rows, same), 0.08
                again = activate(x, kind, before=before, int8=True)
                yield f"{name}: two runs", (rows.values != again.values).sum() + (rows.scale != again.scale).sum(), 0


def check_waiting() -> Iterator[Check]:
    x = torch.randn(1, 300, 512, device=DEVICE, dtype=torch.bfloat16)
    row, weight = torch.randn(1, 1, 512, device=DEVICE), quantize_rows(torch.randn(512, 512, device=DEVICE))

    def layer():
        total, rows = residual_modulate(x, x, row, row, row, 1e-6, fp8=True)
        return fp8_linear(activate(fp8_linear(rows, weight), "gelu_tanh", before=total, fp8=True), wide)

    wide = quantize_rows(torch.randn(512, 1024, device=DEVICE))
    first = layer()
    yield "without a wait: two runs", (quietly(layer) != first).sum(), 0


def timings() -> Iterator[tuple[str, float]]:
    for K, N in ((5120, 5120), (5120, 13824), (13824, 5120)):
        x = torch.randn(1, TOKENS, K, device=DEVICE, dtype=torch.bfloat16)
        weight = torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16)
        rows, columns = quantize_rows(x), quantize_rows(weight)
        key = f"{TOKENS}x{K}x{N}"
        yield f"{key} bf16 ms", median_ms(lambda x=x, weight=weight: F.linear(x, weight))
        yield f"{key} quantise ms", median_ms(lambda x=x: quantize_rows(x))
        for fast, name in ((True, "fast"), (False, "exact")):
            ms = median_ms(lambda rows=rows, columns=columns, fast=fast: fp8_linear(rows, columns, fast=fast))
            yield f"{key} fp8 {name} sums ms", ms


if __name__ == "__main__":
    main()
