"""Where sequences lie when those of a batch, or of a packed (varlen) row, are packed into blocks of 128 tokens."""

from dataclasses import dataclass

import torch

from ..quantize.tokens import padded_head_dim

BLOCK = 128


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of queries, or of keys, lie.

    Args:
        tokens: T, a multiple of 128.
        owner: int32 [T / 128], the sequence of each block; -1: none.
        table: int32 [N, 4], of each sequence: batch, first token there, tokens, first row in [heads, T, Dp].
    """

    tokens: int
    owner: torch.Tensor
    table: torch.Tensor


def sequences(batch: int, tokens: int, cu_seqlens: torch.Tensor | None, device: torch.device) -> Sequences:
    """Lay out a batch of equal sequences, or the sequences of a packed row; nothing waits for the device.

    Args:
        batch: B.
        tokens: S.
        cu_seqlens: int32 [N + 1], where each sequence of the one row begins, and S; None: a batch.
        device: where the tables go.

    Returns:
        The layout.
    """
    if cu_seqlens is None:
        n = torch.arange(batch, dtype=torch.int32, device=device)
        blocks = -(-tokens // BLOCK)
        table = torch.stack([n, torch.zeros_like(n), torch.full_like(n, tokens), n * (blocks * BLOCK)], 1)
        return Sequences(batch * blocks * BLOCK, n.repeat_interleave(blocks), table)
    lengths = cu_seqlens.diff()
    used = (lengths + (BLOCK - 1)) // BLOCK
    ends = used.cumsum(0)
    count = tokens // BLOCK + len(lengths)  # at least as many as are used
    owner = torch.searchsorted(ends, torch.arange(count, device=device), right=True)
    owner = torch.where(owner < len(lengths), owner, -1).int()
    table = torch.stack([torch.zeros_like(lengths), cu_seqlens[:-1], lengths, (ends - used) * BLOCK], 1)
    return Sequences(count * BLOCK, owner, table.int())


def layouts(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> tuple[Sequences, Sequences]:
    """Where the sequences of queries and of keys lie; arguments as in `training_attention`."""
    rows = sequences(q.shape[0], q.shape[2], cu_seqlens_q, q.device)
    return rows, sequences(k.shape[0], k.shape[2], cu_seqlens_k, k.device)


def packed_tokens(batch: int, tokens: int, count: int | None) -> int:
    """T of `sequences`, without tensors.

    Args:
        batch: B.
        tokens: S.
        count: N of a packed row; None: a batch.
    """
    return (batch * -(-tokens // BLOCK) if count is None else tokens // BLOCK + count) * BLOCK


def operand_order(tokens: int, device: torch.device) -> torch.Tensor:
    """Which token is at each place of a turned copy: in 16, thread t of 4 holds 2t, 2t + 1, 8 + 2t and 8 + 2t + 1.

    Args:
        tokens: T, a multiple of 16.
        device: where the result goes.

    Returns:
        int64 [T].
    """
    place = torch.arange(tokens, device=device)
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


def packed_rows(layout: Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch and token of every packed row, int64 [T], and whether there is one, bool [T]."""
    owner = layout.owner.repeat_interleave(BLOCK)
    batch, first, length, start = layout.table[owner.clamp(min=0)].long().unbind(1)
    position = torch.arange(layout.tokens, device=owner.device) - start
    inside = (owner >= 0) & (position < length)
    return batch, torch.where(inside, first + position, 0), inside


def pack(x: torch.Tensor, layout: Sequences) -> torch.Tensor:
    """[B, H, S, D] as fp32 [H, T, Dp], zeros where there is no token."""
    batch, token, inside = packed_rows(layout)
    packed = x.new_zeros(x.shape[1], layout.tokens, padded_head_dim(x.shape[3]), dtype=torch.float32)
    packed[:, inside, : x.shape[3]] = x[batch[inside], :, token[inside]].transpose(0, 1).float()
    return packed


def unpack(packed: torch.Tensor, layout: Sequences, out: torch.Tensor) -> torch.Tensor:
    """Write [H, T, Dp] into `out` [B, H, S, D], zeros where no sequence has the token; returns `out`."""
    batch, token, inside = packed_rows(layout)
    out.zero_()
    out[batch[inside], :, token[inside]] = packed[:, inside, : out.shape[3]].transpose(0, 1).to(out.dtype)
    return out
