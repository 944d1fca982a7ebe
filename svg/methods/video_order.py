"""Orders of a video's tokens in which neighbours in sequence are neighbours in space and time."""

from __future__ import annotations

import torch
from torch import Tensor

from svg.kernels.common.constants import constant

from ..config.base import ORDERS
from ..engine.layout import TokenLayout


def video_order(layout: TokenLayout, order: str) -> Tensor:
    """Video tokens along a curve through the grid.

    Args:
        layout: where the video's frames, rows and columns are; its text takes no part.
        order: "rowmajor" (as they are: frame, row, column) or "hilbert".

    Returns:
        int64 [V] on the CPU, sorted -> original index from 0; not to be written to, as all layers of a run share it.

    Raises:
        ValueError: an unknown order.

    Source: arXiv 2502.18137, section 3.6 (Hilbert curve permutation).
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if order == "rowmajor":
        return torch.arange(layout.video_tokens)
    return _along_hilbert(layout.frames, layout.height, layout.width)


@constant(maxsize=4)
def _along_hilbert(*grid: int) -> Tensor:
    axes = (torch.arange(n) for n in grid)
    place = torch.cartesian_prod(*axes).view(-1, 3).T  # [3, V]
    return hilbert_index(place).argsort()


def hilbert_index(place: Tensor) -> Tensor:
    """How far along a 3-D Hilbert curve each place is; the curve fills the smallest cube of side 2^n that holds them.

    Where the grid is smaller than the cube the curve leaves it and comes back, and what lies outside is just not there.

    Args:
        place: int64 [3, N], >= 0.

    Returns:
        int64 [N].

    Source: J. Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004).
    """
    bits = max(1, int(place.max()).bit_length())
    x = list(place.unbind(0))
    for bit in reversed(range(1, bits)):  # undo the turns of each smaller cube
        low = (1 << bit) - 1
        for axis in range(3):
            flip = (x[axis] >> bit) & 1
            swap = (x[0] ^ x[axis]) & low
            x[axis], x[0] = (
                torch.where(flip == 1, x[axis], x[axis] ^ swap),
                torch.where(flip == 1, x[0] ^ low, x[0] ^ swap),
            )
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    turn = torch.zeros_like(x[0])
    for bit in range(1, bits):
        turn = torch.where((x[2] >> bit) & 1 == 1, turn ^ ((1 << bit) - 1), turn)
    index = torch.zeros_like(turn)
    for bit in reversed(range(bits)):
        for axis in x:
            index = index << 1 | ((axis ^ turn) >> bit) & 1
    return index
