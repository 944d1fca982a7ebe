"""Fused elementwise kernels: bytes read and written a second, against the separate operations they replace."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from svg.kernels import gate_residual, modulate, norm_rope

from .timing import median_ms

WIDTH, DIM = 5120, 128  # Wan 14B


def bench_elementwise(bench, tokens: int, device: str) -> None:
    """QK-norm + RoPE (across heads and per head), modulation, gate + residual at Wan 14B's width.

    Args:
        bench: collects the results.
        tokens: S.
        device: where to run.
    """
    x, update = torch.randn(2, 1, tokens, WIDTH, device=device, dtype=torch.bfloat16).unbind(0)
    weight = torch.randn(WIDTH, device=device, dtype=torch.bfloat16)
    angle = torch.randn(tokens, DIM, device=device)
    row = torch.randn(1, 1, WIDTH, device=device)
    heads = x.unflatten(2, (-1, DIM))

    def separate():
        y = F.rms_norm(x, (WIDTH,), weight, 1e-6).unflatten(2, (-1, DIM))
        even, odd = y[..., 0::2], y[..., 1::2]
        cos, sin = angle[:, None, 0::2], angle[:, None, 1::2]
        out = torch.empty_like(y)
        out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
        return out

    turned = 2 * x.nbytes + 2 * angle.nbytes
    cases = {
        "norm_rope": (
            lambda: norm_rope(x.unsqueeze(2), weight, None, 1e-6, angle, angle, rms=True), separate, turned,
        ),
        "norm_rope_per_head": (
            lambda: norm_rope(heads, weight[:DIM], None, 1e-6, angle, angle, rms=True), None, turned,
        ),
        "modulate": (
            lambda: modulate(x, row, row, 1e-6),
            lambda: (F.layer_norm(x.float(), (WIDTH,), eps=1e-6) * (1 + row) + row).type_as(x),
            2 * x.nbytes,
        ),
        "gate_residual": (
            lambda: gate_residual(x, update, row), lambda: (x.float() + update * row).type_as(x), 3 * x.nbytes,
        ),
    }  # fmt: skip
    for name, (fused, stock, moved) in cases.items():
        ms = median_ms(fused)
        baseline = None if stock is None else f"separate operations {median_ms(stock):.2f} ms, this {ms:.2f} ms"
        shape = f"S={tokens} width={WIDTH} bf16"
        bench.note(f"{name}/tb_per_s", moved / ms / 1e9, "TB/s", shape, inputs="normal", baseline=baseline)
