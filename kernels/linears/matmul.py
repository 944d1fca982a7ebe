"""A linear layer in FP8: a scale a row of activations and an output channel of weights, torch's own scaled product.

out = scale_x scale_w (values_x values_w^T) + bias
"""

import torch

from ..common import target
from .rows import QuantizedRows, check_product

# On Hopper FP8 products are summed with 14 bits between two additions in fp32: each 128 products, or never.
FAST_SUMS = True
FEW_ROWS = (
    256  # below which sums stay in fp32: they cost nothing, and cuBLAS has no fast product of 9 rows of 15,360 numbers
)


def fp8_linear(
    x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor | None = None, *, fast: bool = FAST_SUMS
) -> torch.Tensor:
    """Product of quantised rows with a quantised weight.

    Args:
        x: rows of activations [..., K].
        weight: rows of a weight [N, K]; on a GPU K and N are multiples of 16.
        bias: [N], or None.
        fast: leave sums of 256 rows and more to the tensor cores, which on Hopper keep 14 bits, not to fp32.

    Returns:
        [..., N] of the dtype that x's rows had before; on a GPU it has been bf16.

    Raises:
        ValueError: shapes disagree, or on a GPU K or N is no multiple of 16.
        NotImplementedError: the GPU has no FP8.

    Source: row-wise scaled products of CUTLASS and cuBLASLt, as `torch._scaled_mm` gives them.
    """
    N, K = check_product(x, weight, bias)
    if not x.values.is_cuda:
        return fp8_linear_reference(x, weight, bias)
    if K % 16 or N % 16:
        raise ValueError(f"weight must have sides that are multiples of 16, got [{N}, {K}]: keep this layer in 16 bits")
    target.require_fp8(x.values.device)
    if x.values.numel() == 0:
        return x.scale.new_zeros((*x.shape[:-1], N), dtype=x.dtype)
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]  # it has no public name
        x.values.view(-1, K), weight.values.t(), x.scale.view(-1, 1), weight.scale.view(1, N),
        bias=None if bias is None else bias.to(torch.bfloat16), out_dtype=torch.bfloat16,
        use_fast_accum=fast and x.scale.numel() >= FEW_ROWS,
    )  # fmt: skip
    return out.view(*x.shape[:-1], N).to(x.dtype)


def fp8_linear_reference(
    x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor | None = None, *, fast: bool = FAST_SUMS
) -> torch.Tensor:
    """Specification of `fp8_linear` in plain torch, with sums in fp32; same arguments and result."""
    out = x.values.float() @ weight.values.float().t()
    out = out * x.scale[..., None] * weight.scale
    return (out if bias is None else out + bias.float()).to(x.dtype)
