"""Dense quantised attention in Triton: the kernel, its launch table, and what is quantised before it."""

import dataclasses
from dataclasses import dataclass

import torch

from ..common import target
from ..common.launch import Launch, LaunchTable
from ..common.numbers import LN_2, LOG2_FP8_MAX, base2
from ..common.quantised_tile import attend_tile, finish_rows, key_source, value_source
from ..common.smoothing import mean_scores, unsmoothed_lse
from ..common.target import tl, triton
from ..quantize.channels import QuantizedChannels, quantize_channels, statistics
from ..quantize.precision import PRECISIONS, Quantisation, pv_dtype
from ..quantize.tokens import QuantizedTokens, padded_head_dim, quantize_tokens
from . import hopper as quantised_hopper

ACC16_KEYS = 64  # keys whose products fp16 sums hold


# arch -> (P V in FP8, padded head dim) -> tile sizes.
LAUNCH = LaunchTable({
    80: {(False, 64): Launch(128, 64, 4, 3), (False, 128): Launch(128, 64, 8, 3)},
    89: {(False, 64): Launch(64, 64, 4, 3), (False, 128): Launch(64, 64, 4, 2),
         (True, 64): Launch(128, 64, 4, 3), (True, 128): Launch(128, 64, 8, 3)},
    90: {(False, 64): Launch(128, 64, 8, 3), (False, 128): Launch(128, 64, 8, 3),
         (True, 64): Launch(128, 128, 8, 3, tma=True, specialised=True),
         (True, 128): Launch(128, 128, 8, 3, tma=True, specialised=True)},
    100: {(False, 64): Launch(128, 64, 4, 3), (False, 128): Launch(128, 64, 8, 3),
          (True, 64): Launch(128, 128, 8, 3, tma=True), (True, 128): Launch(128, 64, 8, 3, tma=True)},
    120: {(False, 64): Launch(64, 64, 4, 3), (False, 128): Launch(64, 64, 4, 2),
          (True, 64): Launch(128, 64, 4, 3, tma=True), (True, 128): Launch(64, 64, 4, 3, tma=True)},
}, measured=[90])  # fmt: skip


def launch_for(kind, block_d: int, device: torch.device, roomy: bool = False) -> Launch:
    """The row of the launch table for a precision and padded head dim; sums in fp16 take no more than 64 keys.

    Args:
        kind: one of `precision.PRECISIONS`.
        block_d: 64 or 128.
        device: where the tensors are.
        roomy: leave registers for masks or packed sequences: 64 x 64 and 8 warps.
    """
    row = LAUNCH.row(device, kind.fp8, block_d)
    if roomy:
        return dataclasses.replace(row, block_m=64, block_n=64, num_warps=8)
    return dataclasses.replace(row, block_n=min(row.block_n, ACC16_KEYS)) if kind.acc16 else row


def launch(q, k, v, how, *, is_causal, mask, sm_scale, failed, return_lse):
    interleave = runs_specialised(q, how, plain=not (is_causal or mask is not None))
    inputs = quantize_inputs(q, k, v, how, sm_scale=sm_scale, interleave=interleave)
    out, lse = attend_quantized(inputs, torch.empty_like(q), is_causal, sm_scale, return_lse, mask, failed)
    return (out, unsmoothed_lse(lse, q, inputs.k_mean, sm_scale)) if return_lse else out


def runs_specialised(q: torch.Tensor, how: Quantisation, plain: bool) -> bool:
    """Whether a call runs on hopper.py's kernel, which wants V interleaved.

    Args:
        q: [B, H, S, D].
        how: how it is quantised.
        plain: no mask of any kind, no packed sequences.
    """
    plain = plain and not how.smooths_q and how.k_groups == "block"
    if not (plain and quantised_hopper.supports(q.device, how.kind)):
        return False
    return launch_for(how.kind, padded_head_dim(q.shape[-1]), q.device).specialised


@dataclass(frozen=True)
class QuantizedInputs:
    """What the kernel reads; `values` is quantised V, or V in 16 bits."""

    precision: str
    rows: QuantizedTokens
    keys: QuantizedTokens
    channels: QuantizedChannels | None
    values: torch.Tensor
    k_mean: torch.Tensor | None
    bias: torch.Tensor | None
    interleaved: bool


def quantize_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Quantisation, *, sm_scale: float, interleave: bool = False
) -> QuantizedInputs:
    """Everything that `quantised_attention` does before its attention; same arguments, and V's order in a head."""
    kind, smooth_q = how.kind, how.smooths_q
    if kind.fp8:
        target.require_fp8(q.device)
    stats = statistics(k, v) if how.smooth_k or kind.fp8 else None
    mean = stats.k_mean if how.smooth_k else None
    rows = quantize_tokens(q, side="q", groups=how.q_groups, bits=kind.bits, own_mean=smooth_q)
    channels = None
    if kind.fp8:
        channels = quantize_channels(v, stats, smooth=how.smooth_v, limit=kind.v_range, interleave=interleave)
    return QuantizedInputs(
        precision=how.precision,
        rows=rows,
        keys=quantize_tokens(k, side="k", groups=how.k_groups, bits=kind.bits, mean=mean),
        channels=channels,
        values=channels.values if kind.fp8 else v.to(pv_dtype(v)),
        k_mean=mean,
        bias=mean_scores(rows.mean, k, mean) * base2(sm_scale) if smooth_q else None,
        interleaved=interleave,
    )


@dataclass(frozen=True)
class Sequences:
    """Where packed sequences lie: int32 [n] each, in tokens; keys of a sequence begin at a multiple of 128."""

    q_start: torch.Tensor
    q_length: torch.Tensor
    k_start: torch.Tensor
    k_length: torch.Tensor

    def tiles(self, tokens: int, block_m: int) -> tuple[torch.Tensor, int]:
        """Where each sequence's query tiles end, int32 [n], and how many there are at most."""
        ends = ((self.q_length + block_m - 1) // block_m).cumsum(0, dtype=torch.int32)
        return ends, tokens // block_m + len(self.q_length)


def attend_quantized(
    inputs: QuantizedInputs,
    out: torch.Tensor,
    is_causal: bool,
    sm_scale: float,
    return_lse: bool,
    mask: torch.Tensor | None = None,
    failed: torch.Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of `quantised_attention`, on inputs that are quantised; its lse is the smoothed scores'.

    Args:
        inputs: from `quantize_inputs`.
        out: [B, H, S, D], written.
        is_causal, sm_scale, return_lse, mask, failed: as in `quantised_attention`.
        sequences: packed sequences in a batch of 1, each seen by itself; None: none are packed.

    Returns:
        out, and lse fp32 [B, H, S] or None.
    """
    B, H, S, D = out.shape
    rows, keys, channels, values = inputs.rows, inputs.keys, inputs.channels, inputs.values
    kv_heads, Sk, block_d = keys.values.shape[1:]
    kind = PRECISIONS[inputs.precision]
    row = launch_for(kind, block_d, out.device, roomy=mask is not None or sequences is not None)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=out.device) if return_lse else None
    if inputs.interleaved:
        quantised_hopper.launch(rows, keys, channels, out, lse, failed, base2(sm_scale))
        return out, lse
    if mask is not None:
        mask = mask.expand(B, H, S, Sk).view(torch.uint8)
    if sequences is None:
        grid, packed, most = (triton.cdiv(S, row.block_m), B * H), (None,) * 5, 0
    else:
        ends, tiles = sequences.tiles(S, row.block_m)
        grid, most = (tiles, H), triton.next_power_of_2(len(ends))
        packed = (ends, sequences.q_start, sequences.q_length, sequences.k_start, sequences.k_length)
    with target.on_device(out):
        _quantised_attention_kernel[grid](
            rows.values, rows.scale, key_source(keys.values, row), keys.scale, value_source(values, row),
            channels.scale if channels else None, channels.mean if channels else None, inputs.bias, mask, out, lse,
            failed, *packed, len(packed[0]) if most else 0, base2(sm_scale), H, H // kv_heads, S, Sk,
            *values.stride()[:3], *out.stride()[:3], *((0,) * 4 if mask is None else mask.stride()),
            D=D, BLOCK_D=block_d, BLOCK_M=row.block_m, BLOCK_N=row.block_n, CAUSAL=is_causal,
            K_PER_TOKEN=keys.scale.shape[2] == Sk and Sk > 1, FP8=kind.fp8, ACC16=kind.acc16,
            TMA=row.tma, SEQUENCES=most,
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["S", "Sk", "n"])
def _quantised_attention_kernel(
    q, q_scale, k, k_scale, v, v_scale, v_mean, bias, mask, out, lse, failed, tile_ends, q_start, q_length, k_start, k_length, n,
    scale_log2, H, HEADS_PER_KEY, S, Sk,
    stride_vb, stride_vh, stride_v, stride_ob, stride_oh, stride_os, stride_mb, stride_mh, stride_mq, stride_mk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    K_PER_TOKEN: tl.constexpr, FP8: tl.constexpr, ACC16: tl.constexpr,
    TMA: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    # The longest rows first, so that the last programs are short.
    start = (tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)) * BLOCK_M
    rows, keys, first_row, first_key = S, Sk, b * 0, b * 0
    if SEQUENCES:
        number = tl.arange(0, SEQUENCES)
        ends = tl.load(tile_ends + number, mask=number < n, other=2147483647)
        before = ends <= tl.program_id(0)
        sequence = tl.sum(before.to(tl.int32))
        if sequence >= n:
            return
        start = (tl.program_id(0) - tl.max(tl.where(before, ends, 0))) * BLOCK_M
        rows, keys = tl.load(q_length + sequence), tl.load(k_length + sequence)
        first_row = tl.load(q_start + sequence).to(tl.int64)
        first_key = tl.multiple_of(tl.load(k_start + sequence).to(tl.int64), 128)
    kv = bh // HEADS_PER_KEY
    row = start + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    inside = row < rows
    place = bh * S + first_row + row  # of each query
    q_tile = tl.load(q + place[:, None] * BLOCK_D + offs_d[None, :], mask=inside[:, None], other=0)
    row_scale = tl.load(q_scale + place, mask=inside, other=1.0) * scale_log2  # [BM]
    k_scale += kv * Sk + first_key if K_PER_TOKEN else kv * tl.cdiv(Sk, 128) + first_key // 128
    k_row, v_row = (kv * Sk + first_key).to(tl.int32), (kv * BLOCK_D).to(tl.int32)
    if not TMA:
        k += (kv * Sk + first_key) * BLOCK_D
    if not (TMA and FP8):
        v += b * stride_vb + (h // HEADS_PER_KEY) * stride_vh + first_key * (1 if FP8 else stride_v)
    if bias is not None:
        bias += (bh * tl.cdiv(S, 128) + start // 128) * Sk
    if mask is not None:
        mask += b * stride_mb + h * stride_mh + tl.where(inside, row, 0).to(tl.int64) * stride_mq  # [BM]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    full = tl.minimum(start + 1, keys) // BLOCK_N if CAUSAL else keys // BLOCK_N
    stop = tl.minimum(start + BLOCK_M, keys) if CAUSAL else keys
    for i in range(full):
        acc, l_i, m_i = attend_tile(
            q_tile, row_scale, k, k_scale, v, bias, mask, stride_mk, k_row, v_row, first_key.to(tl.int32), stride_v, i * BLOCK_N,
            BLOCK_N, row, acc, l_i, m_i,
            D, BLOCK_D, BLOCK_N, False, False, K_PER_TOKEN, FP8, ACC16, TMA,
        )  # fmt: skip
    for i in range(full, tl.cdiv(stop, BLOCK_N)):
        acc, l_i, m_i = attend_tile(
            q_tile, row_scale, k, k_scale, v, bias, mask, stride_mk, k_row, v_row, first_key.to(tl.int32), stride_v, i * BLOCK_N,
            keys - i * BLOCK_N, row, acc, l_i, m_i,
            D, BLOCK_D, BLOCK_N, True, CAUSAL, K_PER_TOKEN, FP8, ACC16, TMA,
        )  # fmt: skip
    acc = finish_rows(acc, l_i, v_scale, v_mean, failed, bh, kv * BLOCK_D, BLOCK_D, FP8, ACC16)
    out_ptr = out + b * stride_ob + h * stride_oh + (first_row + row)[:, None] * stride_os + offs_d[None, :]
    tl.store(out_ptr, acc.to(out.dtype.element_ty), mask=inside[:, None] & (offs_d < D)[None, :])
    if lse is not None:
        total = m_i + tl.log2(tl.where(l_i == 0, 1.0, l_i)) - (LOG2_FP8_MAX if FP8 else 0.0)
        tl.store(lse + place, total * LN_2, mask=inside)
