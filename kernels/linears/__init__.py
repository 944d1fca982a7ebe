"""Linear layers in 8 bits: rows and their quantisation, and the products."""

from .matmul import fp8_linear, fp8_linear_reference
from .rows import QuantizedRows, quantize_rows, quantize_rows_reference

__all__ = ["QuantizedRows", "fp8_linear", "fp8_linear_reference", "quantize_rows", "quantize_rows_reference"]
