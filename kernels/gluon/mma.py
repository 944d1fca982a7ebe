"""Products of 8-bit numbers as Hopper's warpgroups hold them in registers, and what is done to them there."""

from ..common.numbers import FP8_MAX, INT8_MAX, INT_AS_FLOAT, INT_AS_FLOAT_BITS, TINY
from . import LOADABLE

if LOADABLE:
    from . import fence_async_shared, gl, gluon, warpgroup_mma

    @gluon.jit
    def integer_scores(q, k_stage, layout: gl.constexpr):
        """Starts Q K^T of a tile of keys, from the bits of 1.5 * 2^23.

        An integer below 2^22 that is added to these bits is added to the number: no conversion.
        """
        start = gl.full([64, 128], INT_AS_FLOAT_BITS, gl.int32, layout)
        return warpgroup_mma(q, k_stage.permute((1, 0)), start, is_async=True)

    @gluon.jit
    def by_sixteens(x):
        """Scores [64, 128] as [64, 8, 2, 4, 2]: a thread has columns (2t, 2t + 1) and (8 + 2t, 9 + 2t) of every 16."""
        return x.reshape([64, 8, 2, 4, 2])

    @gluon.jit
    def own_sum(p):
        """Sums of p over what one thread has of a row: [64, 4]."""
        return gl.sum(gl.sum(gl.sum(by_sixteens(p), 4), 2), 1)

    @gluon.jit
    def one_column(total):
        """Of a product with ones, whose columns are equal, one of the two columns that a thread has: [64, 4]."""
        return total.reshape([64, 4, 2]).split()[0]

    @gluon.jit
    def store_ones(ones, KEYS: gl.constexpr):
        """Fills an operand [8, KEYS], by its bits: ptxas 12.8 packs converted constants beside a stale register."""
        bits = gl.full([8, KEYS], 0x38, gl.int8, gl.BlockedLayout([1, KEYS // 16], [2, 16], [4, 1], [1, 0]))
        ones.store(bits.to(gl.float8e4nv, bitcast=True))
        fence_async_shared()

    @gluon.jit
    def to_bytes(p, layout: gl.constexpr):
        """p in FP8, two instructions for four numbers and nothing to put them together."""
        return gl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3;"
            " mov.b32 $0, {lo, hi}; }",
            "=r,f,f,f,f", [gl.convert_layout(p, layout)], dtype=gl.float8e4nv, is_pure=True, pack=4,
        )  # fmt: skip

    @gluon.jit
    def in_values_range(acc, v_scale, failed, BLOCK_D: gl.constexpr, HAS_FAILED: gl.constexpr, layout: gl.constexpr):
        """Weighted means of quantised V, clamped and in V's units; sets the flag where they left V's range."""
        if HAS_FAILED:
            # e4m3 rounds P by 6.25 % at most. Row by row: nobody waits for other warps' rows.
            bad = gl.max(gl.where(gl.abs(acc) <= 1.07 * FP8_MAX, 0, 1), 1)
            gl.store(failed + gl.zeros_like(bad), bad, mask=bad > 0)
        acc = gl.where(acc > FP8_MAX, FP8_MAX, gl.where(acc < -FP8_MAX, -FP8_MAX, acc))  # NaN stays
        return acc * gl.load(v_scale + gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout)))[None, :]

    @gluon.jit
    def rows_to_int8(q, q_shared, scale_log2, s_layout: gl.constexpr):
        """Rows to INT8 in shared memory; their scales, those of scores included."""
        q = q.to(gl.float32)
        size = gl.abs(q)
        largest = gl.max(gl.where(size < float("inf"), size, float("inf")), 1)
        largest = gl.where(largest > TINY, largest, 1.0)
        rounded = (q * (INT8_MAX / largest)[:, None] + INT_AS_FLOAT) - INT_AS_FLOAT
        q_shared.store(gl.where(gl.abs(rounded) < 128, rounded, 0.0).to(gl.int8))
        fence_async_shared()
        scale = gl.where(largest < float("inf"), largest / INT8_MAX, float("nan")) * scale_log2
        return gl.convert_layout(scale, gl.SliceLayout(1, s_layout))
