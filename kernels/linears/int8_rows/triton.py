"""`int8_rows_matmul` in Triton: tiles of 128 x 128, on any architecture."""

import torch

from ...common.target import tl, triton
from ..int8_matmul import GROUP, LAUNCH
from ..rows import QuantizedRows

BLOCK = 128


def launch(x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """The product, written.

    Args:
        x: rows of activations [..., K].
        weight: rows of a weight [N, K].
        bias: [N], or None.
        out: [..., N], contiguous, written.
    """
    (N, K), M = weight.shape, x.scale.numel()
    row = LAUNCH.row(out.device)
    _int8_rows_matmul_kernel[(triton.cdiv(M, BLOCK) * triton.cdiv(N, BLOCK),)](
        x.values, x.scale, weight.values, weight.scale, bias, out, M, N, K,
        BLOCK=BLOCK, GROUP=GROUP, num_warps=row.num_warps, num_stages=row.num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _int8_rows_matmul_kernel(
    a, a_scale, b, b_scale, bias, out, M, N, K, BLOCK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    rows, columns = tl.cdiv(M, BLOCK), tl.cdiv(N, BLOCK)
    group = tl.program_id(0) // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * columns)
    offs_m = (group * GROUP + inside % height).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_n = (inside // height).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK)
    row_mask, column_mask = (offs_m < M)[:, None], (offs_n < N)[None, :]
    a_place, b_place = offs_m[:, None] * K + offs_k[None, :], offs_n[None, :] * K + offs_k[:, None]
    sums = tl.zeros([BLOCK, BLOCK], tl.int32)
    for k in range(0, tl.cdiv(K, BLOCK)):
        left = K - k * BLOCK
        x = tl.load(a + a_place, mask=row_mask & (offs_k < left)[None, :], other=0)
        y = tl.load(b + b_place, mask=column_mask & (offs_k < left)[:, None], other=0)
        sums = tl.dot(x, y, acc=sums, out_dtype=tl.int32)
        a_place += BLOCK
        b_place += BLOCK
    row_scale = tl.load(a_scale + offs_m, mask=offs_m < M, other=0.0)
    column_scale = tl.load(b_scale + offs_n, mask=offs_n < N, other=0.0)
    wide = sums.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    if bias is not None:
        wide += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offs_m[:, None] * N + offs_n[None, :], wide.to(out.dtype.element_ty), mask=row_mask & column_mask)
