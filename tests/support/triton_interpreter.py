"""Makes TRITON_INTERPRET=1 compute bf16 and fp8 as a GPU does (Triton 3.8).

The interpreter keeps bf16 and fp8 values as raw integers and hands those to numpy: sums and products of bf16 are then
nonsense, and its conversions drop the carry when a mantissa rounds up. Here every operation on such values goes through
fp32, and torch does the conversions. Not corrected: reductions and scans of bf16 (our kernels convert to fp32 first).
Block scales in e4m3 are read as such; the stock interpreter takes every scale for a power of two.
Tensor descriptors take tiles whose last coordinate is a multiple of 16 bytes, as the GPU does (elsewhere it stops with an
illegal instruction); the other coordinates may be anything.
"""

import inspect
from functools import cache, partial

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FLOATS = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
RAW = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
FP8 = (tl.float8e4nv, tl.float8e5)


def decode(handle):
    """The values of an interpreter tensor: fp32, or its own type where numpy has it."""
    dtype = handle.dtype.scalar
    if dtype not in RAW:
        return handle.data
    signed = np.int16 if dtype == tl.bfloat16 else np.uint8
    bits = torch.from_numpy(np.array(handle.data, order="C").view(signed))
    return bits.view(FLOATS[dtype]).float().numpy()


def encode(values, dtype):
    """An interpreter tensor of bf16 or fp8, rounded to nearest even; fp8 saturates, as the GPU's conversion does."""
    wide = torch.from_numpy(np.array(values, order="C"))
    if dtype in FP8:
        limit = torch.finfo(FLOATS[dtype]).max
        wide = torch.where(wide.isnan(), wide, wide.clamp(-limit, limit))
    signed, unsigned = (torch.int16, np.uint16) if dtype == tl.bfloat16 else (torch.uint8, np.uint8)
    return interpreter.TensorHandle(wide.to(FLOATS[dtype]).view(signed).numpy().view(unsigned), dtype)


def materialize_pointers(self, offsets):
    """Addresses of a descriptor's tile, and which of them lie inside."""
    pointers, inside = np.broadcast_to(self.base.data, self.block_shape), np.ones(self.block_shape, dtype=bool)
    size = self.base.dtype.element_ty.primitive_bitwidth // 8
    assert np.all(offsets[-1].data * size % 16 == 0), "a tile's last coordinate must be a multiple of 16 bytes"
    for axis, (offset, length) in enumerate(zip(offsets, self.block_shape, strict=True)):
        place = (offset.data + np.arange(length)).reshape([-1 if i == axis else 1 for i in range(self.ndim)])
        pointers = pointers + (size * place * self.strides[axis].data).astype(np.uint64)
        inside = inside & (place >= 0) & (place < self.shape[axis].data)
    return interpreter.TensorHandle(pointers, self.base.dtype.scalar), inside


def scaled_operand(value, scale, *args, stock, is_rhs, **kwargs):
    """One factor of a scaled product in fp32: with e4m3 scales of 16 neighbours, or as the interpreter has it."""
    if scale is None or scale.dtype.scalar != tl.float8e4nv:
        return stock(value, scale, *args, is_rhs=is_rhs, **kwargs)
    wide = np.repeat(decode(scale), 16, axis=-1)  # [rows, K]
    return stock(value, None, *args, is_rhs=is_rhs, **kwargs) * (wide.swapaxes(-1, -2) if is_rhs else wide)


@cache
def builtins_of(package):
    """Names of a module's or class's built-in functions; asked first while nothing is patched."""
    return [name for name, member in inspect.getmembers(package, tl.core.is_builtin)]


def patch_builtin(package, builder, scope):
    """As the stock one, which looks at every member at every call of a function: a third of the time. All are patched or none is."""
    names = builtins_of(package)
    if names and tl.core.is_builtin(getattr(package, names[0])):
        for name in names:
            interpreter._patch_attr(package, name, getattr(package, name), builder, scope)


def install():
    """Corrects the interpreter of this process; calling it again changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "computes_bf16", False):
        return
    stock = {
        name: getattr(builder, name) for name in ("binary_op", "unary_op", "cast_impl", "create_fp_to_fp", "create_dot")
    }

    def binary_op(self, lhs, rhs, op):
        dtype = lhs.dtype.scalar
        if dtype not in RAW:
            return stock["binary_op"](self, lhs, rhs, op)
        result = op(decode(lhs), decode(rhs))
        return interpreter.TensorHandle(result, tl.int1) if result.dtype == np.bool_ else encode(result, dtype)

    def unary_op(self, arg, op):
        dtype = arg.dtype.scalar
        return encode(op(decode(arg)), dtype) if dtype in RAW else stock["unary_op"](self, arg, op)

    def cast_impl(self, src, dst_type):
        source, goal = src.dtype.scalar, dst_type.scalar
        if source == goal or not (source in RAW or goal in RAW):
            return stock["cast_impl"](self, src, dst_type)
        if goal in RAW:
            return encode(decode(src), goal)
        return interpreter.TensorHandle(decode(src).astype(interpreter._get_np_dtype(goal)), goal)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError(
                "the corrected interpreter rounds to nearest only: RTZ is not used by our kernels"
            )
        return cast_impl(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar not in RAW:
            return stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
        return interpreter.TensorHandle((decode(a) @ decode(b) + d.data).astype(d.data.dtype), d.dtype.scalar)

    for method in (binary_op, unary_op, cast_impl, create_fp_to_fp, create_dot):
        setattr(builder, method.__name__, method)
    stock_operand = interpreter._prepare_dot_scaled_operand
    interpreter._prepare_dot_scaled_operand = partial(scaled_operand, stock=stock_operand)
    interpreter.TensorDescHandle.materialize_pointers = materialize_pointers
    for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        builtins_of(package)
    interpreter._patch_builtin = patch_builtin
    builder.get_bf16 = lambda self, value: encode(np.array([value], np.float32), tl.bfloat16)
    # The aliases were bound to the stock cast when the class was made.
    for name in (
        "create_fp_ext",
        "create_fp_trunc",
        "create_si_to_fp",
        "create_ui_to_fp",
        "create_fp_to_si",
        "create_fp_to_ui",
    ):
        setattr(builder, name, cast_impl)
    builder.computes_bf16 = True
