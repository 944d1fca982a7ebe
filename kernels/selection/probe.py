"""Attention of a few query rows under several masks at once: what a head would lose by each.

    out[0] = softmax(sm_scale * q K^T) V over all visible keys,   out[1 + i] = the same over the keys of mask i

K and V are read in their own dtype, in stretches of keys whose results are merged at the end.
fp16, bf16 and fp32 with fp32 accumulation; 16-bit weights are split into two 16-bit parts, so that small differences
between the outputs are differences of the masks. Two masks, head dims up to 128, sm80 and newer, no wait for the device.
"""

import torch

from ..common import target
from ..common.launch import Launch, LaunchTable
from ..common.numbers import base2, softmax_scale
from ..common.target import tl, triton

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHUNK_BYTES = 256 << 20
PROGRAMS_PER_SM = 2


def probe_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: torch.Tensor,
    visible: torch.Tensor | None = None,
    sm_scale: float | None = None,
    mask_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs of some query rows over all visible keys and over those of either mask.

    Args:
        q: [B, H, t, D] fp16, bf16 or fp32, the rows.
        k, v: [B, H, S, D], q's dtype, last dim contiguous, other strides arbitrary.
        masks: bool [N, 2, t, S] with N = 1 or B, True where a row sees a key.
        visible: bool [B, S], keys that dense attention sees; None: all.
        sm_scale: softmax scale; default D ** -0.5.
        mask_index: int32 [B, H], which of the N masks a head has, where heads differ; N is then any, and visible, if
            given, bool [N, S]. None: sample b has masks b.

    Returns:
        fp32 [B, H, 3, t, D]: dense, first mask, second mask; zeros where a row sees nothing.

    Raises:
        ValueError: shapes disagree, or a last dim is strided.
        TypeError: a dtype that is not supported.
        NotImplementedError: on the Triton path, head dim above 128.

    Source: arXiv 2502.01776, section 3.2 (online profiling).
    """
    _check(q, k, v, masks, visible, mask_index)
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    op = _launch if target.use_triton(k) else probe_attention_reference
    return op(q, k, v, masks, visible, sm_scale, mask_index)


def probe_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: torch.Tensor,
    visible: torch.Tensor | None = None,
    sm_scale: float | None = None,
    mask_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Specification of `probe_attention` in plain torch; same arguments and result (fp64 stays fp64)."""
    sm_scale = softmax_scale(sm_scale, q.shape[-1])
    if mask_index is not None:
        alone = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))  # [B * H, 1, .., D]
        picked = mask_index.flatten().long()
        seen = None if visible is None else visible[picked]
        return probe_attention_reference(*alone, masks[picked], seen, sm_scale).view(*q.shape[:2], 3, *q.shape[2:])
    B, H, S, D = k.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    # Wide copies of K and V, logits, their masked copy and its softmax.
    chunk = max(1, CHUNK_BYTES // (4 * S * (2 * D + 3 * q.shape[2])))
    out = torch.empty(B, H, 3, q.shape[2], D, dtype=wide, device=q.device)
    for b in range(B):
        seen = [torch.ones(S, dtype=torch.bool, device=q.device) if visible is None else visible[b]]
        seen += masks[b if masks.shape[0] > 1 else 0].unbind(0)
        for h in range(0, H, chunk):
            part = slice(h, h + chunk)
            logits = (q[b, part].to(wide) * sm_scale) @ k[b, part].to(wide).mT  # [h, t, S]
            values = v[b, part].to(wide)
            for i, mask in enumerate(seen):
                out[b, part, i] = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0) @ values
    return out


def _check(q, k, v, masks, visible, mask_index):
    if q.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        raise ValueError(
            "q must be [B, H, t, D] and k, v [B, H, S, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: expand k and v to q's heads"
        )
    B, _, S, _ = k.shape
    if mask_index is not None and (mask_index.shape != q.shape[:2] or mask_index.dtype != torch.int32):
        shape = tuple(q.shape[:2])
        raise ValueError(f"mask_index must be int32 {shape}, got {mask_index.dtype} {tuple(mask_index.shape)}")
    free = mask_index is not None  # any number of masks
    if not (free or masks.shape[0] in (1, B)) or masks.shape[1:] != (2, q.shape[2], S) or masks.dtype != torch.bool:
        raise ValueError(
            f"masks must be bool [1 or B, 2, t, S] = [1 or {B}, 2, {q.shape[2]}, {S}], got {masks.dtype} {tuple(masks.shape)}"
        )
    rows = masks.shape[0] if free else B
    if visible is not None and (visible.shape != (rows, S) or visible.dtype != torch.bool):
        raise ValueError(f"visible must be bool [B, S] = [{rows}, {S}], got {visible.dtype} {tuple(visible.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dim, got strides {x.stride()}: call .contiguous()")


# arch -> rows and keys of a tile
LAUNCH = LaunchTable({arch: Launch(32, 32, 8, 2) for arch in (80, 89, 100, 120)} | {90: Launch(64, 32, 4, 2)})


def _launch(q, k, v, masks, visible, sm_scale, mask_index):
    target.refuse_gradients("probe_attention", q, k, v)
    if q.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(f"head dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}: use dense attention")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share fp16, bf16 or fp32, got {q.dtype}, {k.dtype}, {v.dtype}: convert them")
    B, H, S, D = k.shape
    t = q.shape[2]
    row = LAUNCH.row(k.device)
    block_t, block_n = row.block_m, row.block_n
    if q.dtype == torch.float32:
        block_t, block_n = 16, 32
    row_blocks = triton.cdiv(t, block_t)
    wanted = triton.cdiv(PROGRAMS_PER_SM * target.sm_count(k.device), 3 * B * H * row_blocks)
    tiles = triton.cdiv(triton.cdiv(S, block_n), max(1, wanted))  # of one stretch
    stretches = triton.cdiv(S, tiles * block_n)
    acc = torch.empty(stretches, B * H, 3, t, D, dtype=torch.float32, device=k.device)
    top = torch.empty(stretches, B * H, 3, t, dtype=torch.float32, device=k.device)
    total = torch.empty_like(top)
    masks = _with_dense(masks, visible)
    with target.on_device(k):
        _probe_kernel[(stretches, 3 * B * H, row_blocks)](
            q.contiguous(), k, v, masks.view(torch.uint8), acc, top, total, base2(sm_scale), B * H, H, t, S, tiles,
            masks.stride(0) if masks.shape[0] > 1 else 0,
            None if mask_index is None else mask_index.contiguous(),
            *k.stride()[:3], *v.stride()[:3],
            D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_T=block_t, BLOCK_N=block_n,
            SPLIT=q.dtype != torch.float32, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            num_warps=row.num_warps, num_stages=row.num_stages,
        )  # fmt: skip
    highest = top.amax(0).clamp_min(torch.finfo(torch.float32).min)  # finite where a row sees nothing
    weight = torch.exp2(top - highest)
    summed = (total * weight).sum(0)
    out = (acc * weight.unsqueeze(-1)).sum(0) / torch.where(summed == 0, 1.0, summed).unsqueeze(-1)
    return out.view(B, H, 3, t, D)


def _with_dense(masks, visible):
    """Masks bool [N, 3, t, S]: dense attention's, then the two given."""
    N, _, t, S = masks.shape if visible is None else (visible.shape[0], *masks.shape[1:])
    out = torch.ones(N, 3, t, S, dtype=torch.bool, device=masks.device)
    if visible is not None:
        out[:, 0] = visible[:, None]
    out[:, 1:] = masks
    return out


@triton.jit(do_not_specialize=["t", "S", "tiles", "stride_mask"])
def _probe_kernel(
    q, k, v, masks, acc, top, total, scale_log2, BH, H, t, S, tiles, stride_mask, mask_index,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64) // 3
    mask = tl.program_id(1).to(tl.int64) % 3
    b, h = bh // H, bh % H
    offs_t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    real = (offs_d < D)[None, :]
    rows = offs_t < t
    q_tile = tl.load(q + (bh * t + offs_t)[:, None] * D + offs_d[None, :], mask=rows[:, None] & real, other=0.0)
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    own = b
    if mask_index is not None:
        own = tl.load(mask_index + bh).to(tl.int64)
    masks += own * stride_mask + (mask * t + offs_t)[:, None] * S
    acc_i = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_T], dtype=tl.float32)
    m_i = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    for i in range(tiles):
        offs_n = (tl.program_id(0) * tiles + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = offs_n < S
        key = offs_n.to(tl.int64)[:, None]
        k_tile = tl.load(k + key * stride_ks + offs_d[None, :], mask=inside[:, None] & real, other=0.0)  # [BN, BD]
        v_tile = tl.load(v + key * stride_vs + offs_d[None, :], mask=inside[:, None] & real, other=0.0)
        seen = tl.load(masks + offs_n[None, :], mask=rows[:, None] & inside[None, :], other=0) != 0  # [BT, BN]
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen so far
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m_i - base)
        high = p.to(v_tile.dtype)
        acc_i = tl.dot(high, v_tile, acc_i * alpha[:, None], input_precision=PRECISION)
        if SPLIT:
            acc_i = tl.dot((p - high.to(tl.float32)).to(v_tile.dtype), v_tile, acc_i, input_precision=PRECISION)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
    row = ((tl.program_id(0).to(tl.int64) * BH + bh) * 3 + mask) * t + offs_t
    tl.store(top + row, m_i, mask=rows)
    tl.store(total + row, l_i, mask=rows)
    tl.store(acc + row[:, None] * D + offs_d[None, :], acc_i, mask=rows[:, None] & real)
