"""Linear layers in 8 bits: FP8 rows, rotated INT8 rows and INT8 blocks, their quantisation, and the products."""

from .add_rows import add_rows, add_rows_reference
from .blocks import QuantizedBlocks, quantize_blocks, quantize_blocks_reference
from .int8_linear import Steering, int8_linear
from .int8_matmul import int8_matmul, int8_matmul_reference
from .int8_rows import (
    int8_rows_matmul,
    int8_rows_matmul_reference,
    quantize_int8_rows,
    quantize_int8_rows_reference,
)
from .matmul import fp8_linear, fp8_linear_reference
from .rows import QuantizedRows, quantize_rows, quantize_rows_reference

__all__ = [
    "QuantizedBlocks",
    "QuantizedRows",
    "Steering",
    "add_rows",
    "add_rows_reference",
    "fp8_linear",
    "fp8_linear_reference",
    "int8_linear",
    "int8_matmul",
    "int8_matmul_reference",
    "int8_rows_matmul",
    "int8_rows_matmul_reference",
    "quantize_blocks",
    "quantize_blocks_reference",
    "quantize_int8_rows",
    "quantize_int8_rows_reference",
    "quantize_rows",
    "quantize_rows_reference",
]
