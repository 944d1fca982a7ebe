"""Attention for training in INT8 (SageBwd): the forward. The backward is in training_backward.py.

    s_ij  = q_scale_i k_scale_j (q8_i . k8_j)                          base 2: q_scale holds sm_scale log2 e
    out_i = v_scale sum_J 2^(m_iJ - m_i) / 127 sum_(j in J) round(127 2^(s_ij - m_iJ)) v8_j / sum_j 2^(s_ij - m_i) + v_mean

A tile J of keys has its own maximum m_iJ in each row, so that P uses all of INT8 in every tile ("per token"), and each
tile's product is added in fp32. K and V are quantised without their means: K's drops out of the softmax, V's is added
to the output; the backward may drop both, because rows of dS sum to zero. Q and K have a scale a token, V a channel.
Any head dim up to 128; GQA; causal; packed sequences of different lengths. Deterministic. sm80 and newer; Hopper has a
kernel of its own, with P V in bf16 (training_hopper.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..common import target
from ..common.rounded import check_inputs as check_shapes
from ..common.target import tl, triton
from ..quantize.channels import statistics, statistics_reference
from ..quantize.tokens import DTYPES
from . import forward_hopper as training_hopper
from .inputs import (
    LN_2,
    PackedKeys,
    Sequences,
    channel_scale,
    operand_order,
    pack_keys,
    pack_keys_reference,
    pack_queries,
    pack_queries_reference,
    sequences,
    unpack,
    whole,
)

P_GROUP = 128  # keys that share a scale of P in a row; a launch may take fewer


@dataclass(frozen=True)
class Kept:
    """What the backward needs of the forward besides its output.

    Args:
        queries: int8 [H, T, Dp], packed as training_inputs.py says.
        q_scale: fp32 [H, T].
        keys: int8 [Hkv, Tk, Dp].
        k_scale: fp32 [Hkv, Tk].
        values: bf16 [Hkv, Tk, Dp].
        v_mean: fp32 [B, Hkv, D].
        lse: fp32 [H, T], base 2; infinity where a row is padding or sees no key.
    """

    queries: torch.Tensor
    q_scale: torch.Tensor
    keys: torch.Tensor
    k_scale: torch.Tensor
    values: torch.Tensor
    v_mean: torch.Tensor
    lse: torch.Tensor


def training_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    sm_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Kept]:
    """INT8 attention of every query to every key, and what `training_attention_backward` needs.

    Args:
        q: [B, H, S, D] fp16, bf16 or fp32, last dim contiguous.
        k, v: [B, Hkv, Sk, D], q's dtype; Hkv divides H, and query head h sees key head h // (H / Hkv).
        is_causal: query i sees keys 0 .. i (as in PyTorch, also where S != Sk).
        sm_scale: softmax scale; default D ** -0.5.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], for B = 1: sequence n is tokens cu_seqlens[n] ... cu_seqlens[n + 1] - 1,
            from 0 to S (Sk), and sees itself only. None: each row of the batch is a sequence.

    Returns:
        out [B, H, S, D], q's dtype and memory layout, zeros where a sequence has no key; and what is to be kept.

    Raises:
        ValueError: shapes disagree, sm_scale is not positive, or cu_seqlens do not fit.
        TypeError: dtypes are mixed or not supported.
        NotImplementedError: head dim above 128, or autograd expects a gradient (`svg.training_attention` gives one).

    Source: arXiv 2505.11594, section 4 (8-bit attention for training), algorithm 2; arXiv 2603.02170.
    """
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    check_inputs(q, k, v, sm_scale, cu_seqlens_q, cu_seqlens_k)
    target.refuse_gradients("svg.kernels.training_attention", q, k, v)
    op = _launch if target.use_triton(q) else training_attention_reference
    return op(q, k, v, is_causal=is_causal, sm_scale=sm_scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def training_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool = False,
    sm_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Kept]:
    """Specification of `training_attention` in plain torch; same arguments and result."""
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    rows, columns = layouts(q, k, cu_seqlens_q, cu_seqlens_k)
    stats = statistics_reference(k, v)
    packed = pack_keys_reference(k, v, stats, columns)
    queries, q_scale = pack_queries_reference(q, rows, sm_scale)
    lse = torch.full_like(q_scale, torch.inf)
    kept = Kept(queries, q_scale, packed.keys, packed.scale, packed.values, stats.v_mean, lse)
    steps = packed.values8[:, :, operand_order(columns.tokens, q.device).argsort()].transpose(1, 2)  # [Hkv, T, Dp]
    v_scale, total = channel_scale(stats), q.new_zeros(*queries.shape[:2], q.shape[3], dtype=torch.float32)
    for b, h, kv, m, n in pairs(kept, rows, columns):
        scores = scores_of(kept, h, kv, m, n, is_causal)
        seen = ~scores.isneginf().all(1)
        lse[h, m] = torch.where(seen, (scores * LN_2).logsumexp(1) / LN_2, torch.inf)
        means = rounded(torch.exp2(scores - lse[h, m, None]), P_GROUP) @ steps[kv, n, : q.shape[3]].float()
        total[h, m] = (means * v_scale[b, kv] + stats.v_mean[b, kv]) * seen[:, None]
    return unpack(total, rows, torch.empty_like(q)), kept


def layouts(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> tuple[Sequences, Sequences]:
    """Where the sequences of queries and of keys lie; arguments as in `training_attention`."""
    return tuple(
        sequences(x.shape[0], x.shape[2], starts, x.device) for x, starts in ((q, cu_seqlens_q), (k, cu_seqlens_k))
    )


def pairs(kept: Kept, rows: Sequences, columns: Sequences) -> Iterator[tuple[int, int, int, slice, slice]]:
    """Batch, head, key head, packed rows and packed columns of every sequence and head."""
    heads = kept.queries.shape[0]
    group = heads // kept.keys.shape[0]
    for (b, _, count, start), (_, _, keys, first) in zip(rows.table.tolist(), columns.table.tolist(), strict=True):
        for h in range(heads if count and keys else 0):
            yield b, h, h // group, slice(start, start + count), slice(first, first + keys)


def scores_of(kept: Kept, h: int, kv: int, m: slice, n: slice, is_causal: bool) -> torch.Tensor:
    """Scores of one head and sequence, base 2: fp32 [queries, keys]."""
    scores = kept.queries[h, m].float() @ kept.keys[kv, n].float().T
    scores = scores * kept.k_scale[kv, n] * kept.q_scale[h, m, None]
    if is_causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """A matrix in INT8 and back, with one scale for `group` neighbours in a row."""
    parts = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((parts / scale).round() * scale).flatten(1)[:, : x.shape[1]]


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> None:
    """Raises where arguments of `training_attention` do not fit together; same arguments."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}: convert it")
        if x.dim() == 4 and x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last dim, got strides {x.stride()}: call .contiguous()")
    check_shapes(q, k, v, sm_scale)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together, got one: pass it twice for both")
    if cu_seqlens_q is None:
        return
    for name, starts, tokens in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[2]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[2]),
    ):
        if starts.dtype != torch.int32 or starts.dim() != 1 or starts.shape != cu_seqlens_q.shape or len(starts) < 2:
            raise ValueError(
                f"{name} must be int32 [N + 1], the same N for both, got {starts.dtype} {tuple(starts.shape)}: convert it"
            )
        if starts.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {starts.device}: move it")
        if q.shape[0] != 1:
            raise ValueError(f"{name} needs a batch of 1, got {q.shape[0]}: pack the sequences along the tokens")
        # On CUDA the look would cost a wait for the device.
        if not starts.is_cuda and (starts[0] != 0 or starts[-1] != tokens or bool((starts.diff() < 0).any())):
            raise ValueError(f"{name} must rise from 0 to {tokens}, got {starts.tolist()}: count every token once")


@dataclass(frozen=True)
class Launch:
    """Tile sizes of one kernel; both block sizes divide 128.

    Args:
        block_m, block_n: queries and keys of a tile.
        num_warps, num_stages: as Triton has them.
        tma: read tiles through tensor descriptors (sm90 and newer), not pointers.
        registers: at most so many a thread, so that more programs share a multiprocessor; None: as many as it takes.
        specialised: Hopper's kernels with a producer and consumers; of the rest only num_stages counts.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    registers: int | None = None
    specialised: bool = False

    def name(self) -> str:
        """Such as 128x64_w8_s3_tma."""
        if self.specialised:
            return f"specialised_s{self.num_stages}"
        flags = ("_tma" if self.tma else "") + ("" if self.registers is None else f"_r{self.registers}")
        return f"{self.block_m}x{self.block_n}_w{self.num_warps}_s{self.num_stages}{flags}"

    def source(self, x: torch.Tensor, rows: int, columns: int):
        """Packed tokens or a turned copy as the kernels read them: a tensor, or a descriptor of its tiles."""
        return target.tiles_of(x.flatten(0, 1), [rows, columns]) if self.tma else x

    def options(self) -> dict[str, int | None]:
        """What a launch takes besides the arguments."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "TMA": self.tma,
            "num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.registers,
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


# arch -> padded head dim -> tile sizes. Not measured: chosen by ahead-of-time compile (no spills, shared memory).
LAUNCH = {
    80: {64: Launch(128, 64, 4, 3), 128: Launch(128, 32, 8, 3)},
    89: {64: Launch(128, 64, 4, 3), 128: Launch(128, 32, 8, 3)},
    90: {64: Launch(128, 128, 8, 3, tma=True), 128: Launch(128, 128, 8, 3, tma=True)},
    100: {64: Launch(128, 64, 4, 3, tma=True), 128: Launch(128, 64, 8, 3, tma=True)},
    120: {64: Launch(128, 64, 8, 3, tma=True), 128: Launch(128, 64, 8, 3, tma=True)},
}


def _launch(q, k, v, *, is_causal, sm_scale, cu_seqlens_q, cu_seqlens_k):
    rows, columns = layouts(q, k, cu_seqlens_q, cu_seqlens_k)
    stats = statistics(k, v)
    packed = pack_keys(k, v, stats, columns)
    queries, q_scale = pack_queries(q, rows, sm_scale)
    out, lse = attend_packed(queries, q_scale, packed, channel_scale(stats), stats.v_mean, rows, columns, q, is_causal)
    return out, Kept(queries, q_scale, packed.keys, packed.scale, packed.values, stats.v_mean, lse)


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
    row = target.launch_row(LAUNCH, q.device)[block_d]
    out, lse = torch.empty_like(q), torch.empty_like(q_scale)
    with target.on_device(q):
        _training_forward_kernel[(T // row.block_m, H)](
            row.source(queries, row.block_m, block_d), row.source(packed.keys, row.block_n, block_d),
            row.source(packed.values8, block_d, row.block_n),
            q_scale, packed.scale, v_scale, v_mean, rows.owner, rows.table, columns.table, out, lse,
            H // packed.keys.shape[0], packed.keys.shape[0], T, columns.tokens, *out.stride()[:3],
            D=q.shape[3], BLOCK_D=block_d, CAUSAL=is_causal, **row.options(),
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
