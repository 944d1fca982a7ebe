"""The forward of INT8 training attention in Triton."""

from collections.abc import Iterator

import torch

from ..common import target
from ..common.launch import Launch, LaunchTable
from ..common.target import tl, triton
from ..quantize.channels import statistics
from . import forward_hopper as training_hopper
from .inputs import PackedKeys, SavedForBackward, channel_scale, pack_keys, pack_queries, whole
from .sequences import Sequences, layouts


def options(row: Launch) -> dict[str, int | None]:
    """What the kernels of training take besides their arguments."""
    return {
        "BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "TMA": row.tma,
        "num_warps": row.num_warps, "num_stages": row.num_stages, "maxnreg": row.registers,
    }  # fmt: skip


def candidates() -> Iterator[Launch]:
    """Rows of the forward worth timing; what doesn't fit a GPU is refused at its launch."""
    for m, n, warps, stages in (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4), (64, 128, 4, 2),
        (64, 128, 4, 3), (64, 64, 4, 3),
    ):  # fmt: skip
        yield Launch(m, n, warps, stages, tma=True)
    yield Launch(128, 128, 8, 3)
    yield Launch(128, 64, 8, 3, tma=True, registers=128)


# arch -> padded head dim -> tile sizes.
LAUNCH = LaunchTable(
    {
        80: {64: Launch(128, 64, 4, 3), 128: Launch(128, 32, 8, 3)},
        89: {64: Launch(128, 64, 4, 3), 128: Launch(128, 32, 8, 3)},
        90: {64: Launch(128, 128, 8, 3, tma=True), 128: Launch(128, 128, 8, 3, tma=True)},
        100: {64: Launch(128, 64, 4, 3, tma=True), 128: Launch(128, 64, 8, 3, tma=True)},
        120: {64: Launch(128, 64, 8, 3, tma=True), 128: Launch(128, 64, 8, 3, tma=True)},
    }
)


def launch(q, k, v, *, is_causal, sm_scale, cu_seqlens_q, cu_seqlens_k):
    rows, columns = layouts(q, k, cu_seqlens_q, cu_seqlens_k)
    stats = statistics(k, v)
    packed = pack_keys(k, v, stats, columns)
    queries, q_scale = pack_queries(q, rows, sm_scale)
    out, lse = attend_packed(queries, q_scale, packed, channel_scale(stats), stats.v_mean, rows, columns, q, is_causal)
    return out, SavedForBackward(queries, q_scale, packed.keys, packed.scale, packed.values, stats.v_mean, lse)


def attend_packed(
    queries: torch.Tensor,
    q_scale: torch.Tensor,
    packed: PackedKeys,
    v_scale: torch.Tensor,
    v_mean: torch.Tensor,
    rows: Sequences,
    columns: Sequences,
    q: torch.Tensor,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of `training_attention`, on packed inputs.

    Args:
        queries, q_scale: from `pack_queries`.
        packed: from `pack_keys`.
        v_scale, v_mean: fp32 [B, Hkv, D].
        rows, columns: from `layouts`.
        q: whose shape, dtype and memory layout the output gets.
        is_causal: as in `training_attention`.

    Returns:
        out, and lse fp32 [H, T], base 2.
    """
    if packed.wide is not None:
        return training_hopper.attend(queries, q_scale, packed, rows, columns, q, is_causal)
    H, T, block_d = queries.shape
    row = LAUNCH.row(q.device, block_d)
    out, lse = torch.empty_like(q), torch.empty_like(q_scale)
    with target.on_device(q):
        _training_forward_kernel[(T // row.block_m, H)](
            row.source(queries, row.block_m, block_d), row.source(packed.keys, row.block_n, block_d),
            row.source(packed.values8, block_d, row.block_n),
            q_scale, packed.scale, v_scale, v_mean, rows.owner, rows.table, columns.table, out, lse,
            H // packed.keys.shape[0], packed.keys.shape[0], T, columns.tokens, *out.stride()[:3],
            D=q.shape[3], BLOCK_D=block_d, CAUSAL=is_causal, **options(row),
        )  # fmt: skip
    return out, lse


@triton.jit
def tile(x, row, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A tile of a matrix with rows of `width`: packed tokens, or a turned copy; all of it exists."""
    if TMA:
        return x.load([row, column])
    else:
        x += tl.cast(row, tl.int64) * width + column
        return tl.load(x + tl.arange(0, ROWS)[:, None] * width + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def larger(a, b):
    """Maximum, NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def operand(x):
    """A tile of scores in `operand_order`: each thread keeps its own, so this moves nothing."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, [ROWS, COLUMNS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    return tl.reshape(x, [ROWS, COLUMNS])


@triton.jit
def _attend_tile(
    q, row_scale, k, k_scale, v, k_row, v_row, Tk, first, start, keys, position, acc, l_i, m_i,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of keys, the sequence's [first, first + BLOCK_N): running output, sum and maximum of each row.

    The sequence begins at packed row `start`; k_row and v_row are the head's first rows.
    """
    k_tile = tile(k, k_row + start + first, 0, BLOCK_D, BLOCK_N, BLOCK_D, TMA)
    offs_n = first + tl.arange(0, BLOCK_N)
    x = tl.dot(q, tl.trans(k_tile), out_dtype=tl.int32).to(tl.float32)  # [BM, BN]
    x = x * tl.load(k_scale + start + offs_n)[None, :]
    if MASKED:
        seen = (offs_n < keys)[None, :]
        if CAUSAL:
            seen = seen & (offs_n[None, :] <= position[:, None])
        x = tl.where(seen, x, float("-inf"))
    peak = tl.maximum(tl.max(x, 1) * row_scale, -1e30)  # finite also where nothing is seen
    m_new = tl.maximum(m_i, peak)
    p = tl.exp2(x * row_scale[:, None] - (peak - 6.988684686772166)[:, None])  # log2 127
    alpha = tl.exp2(m_i - m_new)
    beta = tl.exp2(peak - m_new)
    l_i = l_i * alpha + tl.sum(p, 1) * beta
    v_tile = tile(v, v_row, start + first, Tk, BLOCK_D, BLOCK_N, TMA)
    product = tl.dot(operand(whole(p)), tl.trans(v_tile), out_dtype=tl.int32)
    acc = acc * alpha[:, None] + product.to(tl.float32) * beta[:, None]
    return acc, l_i, m_new


@triton.jit(do_not_specialize=["T", "Tk"])
def _training_forward_kernel(
    q, k, v, q_scale, k_scale, v_scale, v_mean, owner, rows, columns, out, lse, HEADS_PER_KEY, KV_HEADS, T, Tk,
    stride_b, stride_h, stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    kv = h // HEADS_PER_KEY
    # The longest rows first, so that the last programs are short.
    row = (tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)) * BLOCK_M
    n = tl.load(owner + row // 128)
    if n < 0:
        return
    place = row - tl.load(rows + n * 4 + 3)
    position = place + tl.arange(0, BLOCK_M)
    inside = position < tl.load(rows + n * 4 + 2)
    keys, start = tl.load(columns + n * 4 + 2), tl.load(columns + n * 4 + 3)
    offs_m, offs_d = h * T + row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_tile = tile(q, (h * T).to(tl.int32) + row, 0, BLOCK_D, BLOCK_M, BLOCK_D, TMA)
    row_scale = tl.load(q_scale + offs_m)  # [BM]
    k_scale += kv * Tk
    k_row, v_row = (kv * Tk).to(tl.int32), (kv * BLOCK_D).to(tl.int32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    full = tl.minimum(place + 1, keys) // BLOCK_N if CAUSAL else keys // BLOCK_N
    stop = tl.minimum(place + BLOCK_M, keys) if CAUSAL else keys
    for i in range(full):
        acc, l_i, m_i = _attend_tile(
            q_tile, row_scale, k, k_scale, v, k_row, v_row, Tk, i * BLOCK_N, start, keys, position, acc, l_i, m_i,
            BLOCK_D, BLOCK_N, False, CAUSAL, TMA,
        )  # fmt: skip
    for i in range(full, tl.cdiv(stop, BLOCK_N)):
        acc, l_i, m_i = _attend_tile(
            q_tile, row_scale, k, k_scale, v, k_row, v_row, Tk, i * BLOCK_N, start, keys, position, acc, l_i, m_i,
            BLOCK_D, BLOCK_N, True, CAUSAL, TMA,
        )  # fmt: skip
    empty = l_i == 0
    batch = tl.load(rows + n * 4).to(tl.int64)
    channel, real = (batch * KV_HEADS + kv) * D + offs_d, offs_d < D
    acc = acc / tl.where(empty, 1.0, l_i)[:, None] * tl.load(v_scale + channel, mask=real, other=0.0)[None, :]
    acc = tl.where(empty[:, None], 0.0, acc + tl.load(v_mean + channel, mask=real, other=0.0)[None, :])
    token = tl.load(rows + n * 4 + 1).to(tl.int64) + position
    goal = out + batch * stride_b + h * stride_h + token[:, None] * stride_s + offs_d[None, :]
    tl.store(goal, acc.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])
    total = m_i + tl.log2(l_i) - 6.988684686772166
    tl.store(lse + offs_m, tl.where(inside & (l_i != 0), total, float("inf")))
