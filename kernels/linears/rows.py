"""Rows in FP8 (e4m3), each with a scale of its own: activations by token, weights by output channel.

    x ~ scale * values        scale = absmax of the row / 448,        values = e4m3(x * 448 / absmax)

An all-zero row counts as one of absmax 1; a row with NaN or infinity has scale NaN, so that the output shows it. One read, one write.
"""

from dataclasses import dataclass

import torch

from ..common import target
from ..common.numbers import FP8_MAX, SMALLEST, TINY
from ..common.target import tl, triton

FP8 = torch.float8_e4m3fn
MAX_WIDTH = 32768
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantizedRows:
    """Rows in FP8, or in INT8 as int8_rows.py has them.

    Args:
        values: e4m3 or int8 [..., K], contiguous.
        scale: fp32 [...], contiguous.
        dtype: of the rows before, which what is computed of them has again.
    """

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[..., K]."""
        return self.values.shape

    def dequantize(self) -> torch.Tensor:
        """The numbers that the rows stand for, rotated ones in INT8: fp32 [..., K]."""
        return self.values.float() * self.scale[..., None]


def check_product(x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor | None) -> torch.Size:
    """Shape [N, K] of the weight of a linear.

    Raises:
        ValueError: x or bias are of another.
    """
    N, K = weight.shape
    if x.shape[-1] != K or (bias is not None and bias.shape != (N,)):
        shown = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"x must be [..., {K}] and bias [{N}] for a weight [{N}, {K}], got {tuple(x.shape)} and {shown}: "
            "pass the layer's own"
        )
    return weight.shape


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """FP8 values of the last dim, with one scale a row.

    Args:
        x: [..., K] fp16, bf16 or fp32.

    Returns:
        The rows.

    Raises:
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, rows wider than 32768, a gradient would be needed, or no FP8.

    Source: FP8 formats (arXiv 2209.05433); a scale a row and a channel as in torch's row-wise scaled product.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}: convert it")
    if not target.use_triton(x):
        return quantize_rows_reference(x)
    check_width("quantize_rows", x.shape[-1], x)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    values, scale = empty_rows(x)
    M, K = flat.shape
    if M:
        with target.on_device(x):
            _quantize_rows_kernel[(M,)](
                flat, values, scale, flat.stride(0), K=K, BLOCK_K=triton.next_power_of_2(K), num_warps=warps(K)
            )
    return QuantizedRows(values, scale, x.dtype)


def quantize_rows_reference(x: torch.Tensor) -> QuantizedRows:
    """Specification of `quantize_rows` in plain torch; same arguments and result."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    largest = torch.where(largest <= SMALLEST, 1.0, largest)
    limit = torch.full_like(largest, FP8_MAX.value)
    values = (wide * (limit / largest)[..., None]).to(FP8)
    scale = torch.where(largest.isfinite(), largest / limit, torch.nan)
    return QuantizedRows(values.contiguous(), scale.contiguous(), x.dtype)


def empty_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a kernel writes the quantised rows of a tensor of x's shape and device: values, scale."""
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def check_width(op: str, width: int, *tensors: torch.Tensor) -> None:
    """Raises NotImplementedError where a Triton kernel cannot quantise rows.

    Args:
        op: name of the operation, for the message.
        width: numbers of a row.
        tensors: its inputs.
    """
    if width > MAX_WIDTH:
        raise NotImplementedError(f"{op} takes rows of at most {MAX_WIDTH} numbers, got {width}: stay in 16 bits")
    target.require_fp8(tensors[0].device)
    target.refuse_gradients(op, *tensors)


def warps(width: int) -> int:
    """Warps for a row: 16 bytes a thread and load."""
    return min(16, max(1, triton.next_power_of_2(width) // 512))


@triton.jit
def store_quantized(y, values, scale, row, offs, K: tl.constexpr):
    """Writes one fp32 row [BLOCK_K], zero beyond K, in FP8, and its scale."""
    largest = tl.max(tl.where(tl.abs(y) < float("inf"), tl.abs(y), float("inf")), 0)
    largest = tl.where(largest > TINY, largest, 1.0)
    inverse = tl.div_rn(tl.zeros_like(largest) + FP8_MAX, largest)
    tl.store(values + row * K + offs, (y * inverse).to(values.dtype.element_ty), mask=offs < K)
    size = tl.div_rn(largest, tl.zeros_like(largest) + FP8_MAX)
    tl.store(scale + row, tl.where(largest < float("inf"), size, float("nan")))


@triton.jit
def _quantize_rows_kernel(x, values, scale, stride_x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    y = tl.load(x + row * stride_x + offs, mask=offs < K, other=0.0).to(tl.float32)
    store_quantized(y, values, scale, row, offs, K)
