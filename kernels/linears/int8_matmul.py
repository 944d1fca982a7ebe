"""Products of matrices in INT8 blocks: each 128 of the sum in INT32, scaled and added in fp32, with the second values of blocks
that hold outliers multiplied too.

    out = sum over blocks k of s_a[m, k] s_b[n, k] (q_a[m, k] q_b[n, k]^T)  +  s2_a[m, k] s_b[n, k] (q2_a[m, k] q_b[n, k]^T)
"""

import torch

from ..common import target
from ..common.launch import Launch, LaunchTable
from ..common.target import tl, triton
from .blocks import BLOCK, QuantizedBlocks

GROUP = 8  # rows of tiles that run together, so that they share columns in the cache

# Compiled ahead of time: no spills. Not measured.
SMALL = Launch(BLOCK, BLOCK, 8, 2)  # within 99 KB of shared memory
LAUNCH = LaunchTable({80: SMALL, 89: SMALL, 90: Launch(BLOCK, BLOCK, 8, 4), 120: SMALL})


def int8_matmul(a: QuantizedBlocks, b: QuantizedBlocks, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a times the transpose of b.

    Args:
        a: blocks of [M, K], with second values or without.
        b: blocks of [N, K], without second values.
        bias: [N], or None.

    Returns:
        [M, N] of the dtype that `a` had before.

    Raises:
        ValueError: shapes disagree, or b has second values.

    Source: the mixed-precision product of arXiv 2503.08040, section 4.3.
    """
    (M, K), (N, _) = a.values.shape, b.values.shape
    if b.values.shape[1] != K or b.residual is not None or (bias is not None and bias.shape != (N,)):
        shown = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"b must be [N, {K}] without second values and bias [N], got {tuple(b.values.shape)} and {shown}: "
            "quantise b without a threshold"
        )
    if not target.use_triton(a.values):
        return int8_matmul_reference(a, b, bias)
    out = torch.empty(M, N, dtype=a.dtype, device=a.values.device)
    row = LAUNCH.row(out.device)
    tiles = triton.cdiv(M, BLOCK) * triton.cdiv(N, BLOCK)
    if tiles:
        with target.on_device(out):
            _int8_matmul_kernel[(tiles,)](
                a.values, a.scale, a.residual, a.residual_scale, a.flagged, b.values, b.scale, bias, out, M, N, K,
                BLOCK=BLOCK, GROUP=GROUP, num_warps=row.num_warps, num_stages=row.num_stages,
            )  # fmt: skip
    return out


def int8_matmul_reference(a: QuantizedBlocks, b: QuantizedBlocks, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Specification of `int8_matmul` in plain torch; same arguments and result. Products of 128 are exact in fp32."""
    M, N = a.values.shape[0], b.values.shape[0]
    out = torch.zeros(M, N, device=a.values.device)

    def column(scale: torch.Tensor, k: int, length: int) -> torch.Tensor:
        return scale[:, k].repeat_interleave(BLOCK)[:length]

    for k in range(a.scale.shape[1]):
        part = slice(k * BLOCK, (k + 1) * BLOCK)
        columns, size = b.values[:, part].float().t(), column(b.scale, k, N)
        out += (a.values[:, part].float() @ columns) * (column(a.scale, k, M)[:, None] * size)
        if a.residual is not None:
            second = (a.residual[:, part].float() @ columns) * (column(a.residual_scale, k, M)[:, None] * size)
            out += torch.where(column(a.flagged, k, M)[:, None] != 0, second, 0.0)
    return (out if bias is None else out + bias.float()).to(a.dtype)


@triton.jit(do_not_specialize=["M"])
def _int8_matmul_kernel(
    a, a_scale, residual, residual_scale, flagged, b, b_scale, bias, out, M, N, K,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    rows, columns, blocks = tl.cdiv(M, BLOCK), tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK)
    group = tl.program_id(0) // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * columns)
    m, n = group * GROUP + inside % height, inside // height
    offs_m = m.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_n = n.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK)
    row_mask, column_mask = (offs_m < M)[:, None], (offs_n < N)[None, :]
    a_place, b_place = offs_m[:, None] * K + offs_k[None, :], offs_n[None, :] * K + offs_k[:, None]
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, blocks):
        left = K - k * BLOCK
        x = tl.load(a + a_place, mask=row_mask & (offs_k < left)[None, :], other=0)
        y = tl.load(b + b_place, mask=column_mask & (offs_k < left)[:, None], other=0)
        size = tl.load(b_scale + n * blocks + k)
        sums += tl.dot(x, y).to(tl.float32) * (tl.load(a_scale + m * blocks + k) * size)
        if flagged is not None:
            if tl.load(flagged + m * blocks + k) != 0:
                x = tl.load(residual + a_place, mask=row_mask & (offs_k < left)[None, :], other=0)
                sums += tl.dot(x, y).to(tl.float32) * (tl.load(residual_scale + m * blocks + k) * size)
        a_place += BLOCK
        b_place += BLOCK
    if bias is not None:
        sums += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offs_m[:, None] * N + offs_n[None, :], sums.to(out.dtype.element_ty), mask=row_mask & column_mask)
