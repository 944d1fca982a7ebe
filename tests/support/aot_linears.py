"""Calls that launch every kernel of linears in 8 bits and of elementwise work, for triton_aot.py."""

import torch

from svg.kernels import activate, gate_residual, modulate, norm_rope, quantize_rows, residual_modulate
from svg.kernels.common import target
from svg.kernels.linears import add_rows, int8_matmul, int8_rows_matmul, quantize_blocks, quantize_int8_rows


def linears(fp8):
    """Yields (case, op call).

    Args:
        fp8: whether the architecture has FP8.
    """
    yield "elementwise", lambda: elementwise(fp8)
    yield "linears int8", int8
    yield "linears int8-rows", lambda: int8_rows(256)
    yield "linears int8-rows of activations", int8_activations
    yield "linears int8-rows of modulation", int8_modulation
    if target.arch(None) == 90:
        yield "linears int8-rows unaligned", lambda: int8_rows(248)


def elementwise(fp8):
    x, row, angle = torch.zeros(1, 64, 5120).bfloat16(), torch.zeros(1, 1, 5120), torch.zeros(64, 128)
    norm_rope(x.unsqueeze(2), row[0, 0], None, 1e-6, angle, angle, rms=True)
    norm_rope(x.unflatten(2, (40, 128)), row[0, 0, :128], row[0, 0, :128], 1e-6, angle, angle, rms=False)
    modulate(x, row, row, 1e-6)
    gate_residual(x, x, row)
    residual_modulate(x, x, row, row, row, 1e-6)
    residual_modulate(x, x, None, row[..., :1].bfloat16().expand_as(row).contiguous(), row, 1e-6, affine=True)
    up, other = torch.zeros(1, 64, 12288).bfloat16(), x[..., :3072]
    activate(up, "gelu_tanh", before=other)
    if fp8:  # Wan 14B's widths, and those of HunyuanVideo's single-stream blocks
        add_rows(torch.zeros(1, 64, 2, 128).bfloat16().transpose(1, 2), quantize_rows(torch.zeros(1, 2, 64, 128)), 0.5)
        quantize_rows(x)
        quantize_rows(up.expand(1, 64, 12288).reshape(1, 32, 24576))
        modulate(x, row, row, 1e-6, fp8=True)
        residual_modulate(x, x, row, row, row, 1e-6, fp8=True)
        activate(up, "gelu_tanh", before=other, fp8=True)
        for kind in ("gelu_tanh", "gelu", "geglu", "swiglu"):
            activate(torch.zeros(1, 64, 13824 * (1 + (kind in ("geglu", "swiglu")))).bfloat16(), kind, fp8=True)


def int8():
    x, weight, threshold = torch.zeros(200, 5120).bfloat16(), torch.zeros(256, 5120), torch.ones(1)
    rows, columns = quantize_blocks(x, threshold), quantize_blocks(weight)
    int8_matmul(rows, columns, torch.zeros(256))  # forward
    int8_matmul(
        rows.t(whole=True), quantize_blocks(torch.zeros(200, 256).bfloat16(), seed=1).t(whole=True)
    )  # gradient of the weight
    int8_matmul(columns, columns)


def int8_modulation():
    """At the widths of Wan 1.3B, HunyuanVideo and Wan 14B."""
    for width in (1536, 3072, 5120):
        x, row = torch.zeros(1, 64, width).bfloat16(), torch.zeros(1, 1, width)
        modulate(x, row, row, 1e-6, int8=True)
        residual_modulate(x, x, row, row, row, 1e-6, int8=True)
        residual_modulate(x, x, None, row, row, 1e-6, int8=True)


def int8_activations():
    """At the widths of Wan 14B and 1.3B, and of HunyuanVideo's single-stream blocks."""
    for width in (13824, 8960):
        activate(torch.zeros(1, 64, width).bfloat16(), "gelu_tanh", int8=True)
    before = torch.zeros(1, 64, 3072).bfloat16()
    activate(torch.zeros(1, 64, 12288).bfloat16(), "gelu_tanh", before=before, int8=True)
    for kind in ("gelu", "geglu", "swiglu"):
        activate(torch.zeros(1, 64, 13824 * (1 + (kind != "gelu"))).bfloat16(), kind, int8=True)


def int8_rows(outputs):
    """Hopper's kernel takes outputs that are a multiple of 16."""
    for width in (5120, 1536, 13824):  # of Wan 14B and 1.3B
        x, weight = torch.zeros(200, width).bfloat16(), torch.zeros(outputs, width).bfloat16()
        int8_rows_matmul(quantize_int8_rows(x), quantize_int8_rows(weight), torch.zeros(outputs).bfloat16())
