"""Product of rotated INT8 rows, which any architecture takes.

    out = scale_x scale_w (values_x values_w^T) + bias        (x H)(w H)^T = x w^T

Sums are exact in INT32.
"""

import torch

from ...common import target
from ..matmul import fp8_linear_reference
from ..rows import QuantizedRows, check_product
from . import hopper, triton


def int8_rows_matmul(x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Product of quantised rows with a quantised weight, both rotated alike.

    Args:
        x: INT8 rows of activations [..., K].
        weight: INT8 rows of a weight [N, K].
        bias: [N], or None.

    Returns:
        [..., N] of the dtype that x's rows had before.

    Raises:
        ValueError: shapes disagree.
    """
    N, _ = check_product(x, weight, bias)
    if not target.use_triton(x.values):
        return int8_rows_matmul_reference(x, weight, bias)
    out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.values.device)
    if out.numel():
        kernel = hopper if hopper.supports(x, weight) else triton
        with target.on_device(out):
            kernel.launch(x, weight, bias, out)
    return out


def int8_rows_matmul_reference(
    x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Specification of `int8_rows_matmul` in plain torch, with sums in fp32; same arguments and result."""
    return fp8_linear_reference(x, weight, bias)  # which takes any 8 bits
