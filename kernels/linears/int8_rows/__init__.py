"""Linears in rotated INT8 rows: their quantisation, and the product in Triton and for Hopper."""

from .modulate import quantize_modulated
from .op import int8_rows_matmul, int8_rows_matmul_reference
from .quantize import hadamard, quantize_activated, quantize_int8_rows, quantize_int8_rows_reference, rotation_width

__all__ = [
    "hadamard",
    "int8_rows_matmul",
    "int8_rows_matmul_reference",
    "quantize_activated",
    "quantize_int8_rows",
    "quantize_int8_rows_reference",
    "quantize_modulated",
    "rotation_width",
]
