"""Weights between two products, two 16-bit numbers to a register.

Held over a loop as 16-bit numbers they are taken apart and put together again, one instruction for two of them, between the
products. As integers they stay as they are.
"""

from . import LOADABLE

if LOADABLE:
    from . import gl, gluon

    @gluon.jit
    def packed(p, dtype: gl.constexpr):
        """fp32 [M, N], neighbours of a row in one thread, rounded to fp16 or bf16: int32 [M, N / 2]."""
        even, odd = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
        asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
        return gl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)

    @gluon.jit
    def unpacked(both, dtype: gl.constexpr, layout: gl.constexpr):
        """`packed`'s numbers in the layout of a product's operand."""
        even = (both & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
        odd = (both >> 16).to(gl.int16).to(dtype, bitcast=True)
        return gl.convert_layout(gl.join(even, odd).reshape([both.shape[0], both.shape[1] * 2]), layout)
