"""Linears in FP8 and INT8 against bf16 ones at 720p's tokens, with the quantisation of their input counted."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from svg.kernels import activate, fp8_linear, quantize_rows
from svg.kernels.linears import int8_rows_matmul, quantize_int8_rows

from .timing import median_ms

# name -> inputs, outputs, and how many of a layer take the same input, which is quantised once
LAYERS = {
    "wan14b": {"qkv": (5120, 5120, 3), "out": (5120, 5120, 1), "up": (5120, 13824, 1), "down": (13824, 5120, 1)},
    "hunyuan": {"qkv": (3072, 3072, 3), "mlp": (3072, 12288, 1), "proj_out": (15360, 3072, 1)},
}


FEED_FORWARD = 12288  # width of HunyuanVideo's


def bench_linears(bench, tokens: int, device: str) -> None:
    """Each linear of a Wan-14B and a single-stream HunyuanVideo layer, and the passes that quantise.

    Args:
        bench: collects the results.
        tokens: M.
        device: where to run.
    """
    for model, layers in LAYERS.items():
        for name, (K, N, users) in layers.items():
            _linear(bench, f"M{tokens}/{model}/{name}", tokens, K, N, users, device)
    _passes(bench, tokens, device)


def _linear(bench, name: str, tokens: int, K: int, N: int, users: int, device: str) -> None:
    x = torch.randn(1, tokens, K, device=device, dtype=torch.bfloat16)
    weight = torch.randn(N, K, device=device, dtype=torch.bfloat16) * K**-0.5
    bias = torch.randn(N, device=device, dtype=torch.bfloat16)
    stock = median_ms(lambda: F.linear(x, weight, bias))
    exact = x[0, :256].double() @ weight.double().T + bias.double()
    shape, flops = f"M={tokens} K={K} N={N}", 2 * tokens * K * N
    for key, quantize, product in (
        ("fp8/{}", quantize_rows, fp8_linear),
        ("fp8/{}/exact_sums", quantize_rows, partial(fp8_linear, fast=False)),
        ("int8-rows/{}", quantize_int8_rows, int8_rows_matmul),
    ):
        key, rows, quantized = f"linear/{key.format(name)}", quantize(x), quantize(weight)
        multiplied, rounded = (
            median_ms(run) for run in (partial(product, rows, quantized, bias), partial(quantize, x))
        )
        whole = multiplied + rounded / users
        about = {
            "inputs": "normal",
            "baseline": f"bf16 {stock:.2f} ms, this {whole:.2f} ms, {rounded:.2f} to quantise",
        }
        bench.note(f"{key}/speedup", stock / whole, "x", shape, **about)
        bench.note(f"{key}/tflops", flops / multiplied / 1e9, "TFLOP/s", shape, **about)
        out = product(quantize(x[0, :256]), quantized, bias)
        bench.note(f"{key}/error", (out - exact).norm() / exact.norm(), "relative l2", shape, inputs="normal")


def _passes(bench, tokens: int, device: str) -> None:
    up = torch.randn(1, tokens, FEED_FORWARD, device=device, dtype=torch.bfloat16)
    before = up[..., : FEED_FORWARD // 4].contiguous()
    cases = {
        "quantize_rows": (lambda: quantize_rows(up), 3 * up.numel()),
        "gelu": (lambda: activate(up, "gelu_tanh", fp8=True), 3 * up.numel()),
        "gelu_int8": (lambda: activate(up, "gelu_tanh", int8=True), 3 * up.numel()),
        "gelu_joined_int8": (
            lambda: activate(up, "gelu_tanh", before=before, int8=True),
            3 * (up.numel() + before.numel()),
        ),
        "gelu_joined": (lambda: activate(up, "gelu_tanh", before=before, fp8=True), 3 * (up.numel() + before.numel())),
    }
    for name, (op, moved) in cases.items():
        tb = moved / median_ms(op) / 1e9
        bench.note(f"linear/passes/{name}/tb_per_s", tb, "TB/s", f"S={tokens} bf16 to 8 bits", inputs="normal")
