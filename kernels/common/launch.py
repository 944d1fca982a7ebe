"""How kernels are launched: one row a kernel, architecture and kind of input, and whether it was measured."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import target


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Args:
        block_m: rows of a tile: queries or tokens.
        block_n: columns of a tile: keys or centroids; 1 where a kernel has none.
        num_warps, num_stages: as Triton has them.
        tma: read tiles through tensor descriptors (Hopper and newer), not pointers.
        specialised: on sm90, calls that the operation's Hopper kernel takes run there; the other fields are for the rest.
        registers: at most so many a thread, so that more programs share a multiprocessor; None: as many as it takes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    specialised: bool = False
    registers: int | None = None

    def name(self) -> str:
        """Such as 128x64_w8_s3_tma."""
        flags = "".join(f"_{flag}" for flag in ("tma", "specialised") if getattr(self, flag))
        flags += "" if self.registers is None else f"_r{self.registers}"
        return f"{self.block_m}x{self.block_n}_w{self.num_warps}_s{self.num_stages}{flags}"

    def source(self, x: torch.Tensor, rows: int, columns: int):
        """A tensor as kernels read it: itself, or with `tma` a descriptor of tiles of its last two dims.

        Args:
            x: [..., rows, columns], contiguous.
            rows, columns: of a tile.
        """
        return target.tiles_of(x.flatten(0, -2), [rows, columns]) if self.tma else x


class LaunchTable(dict):
    """Architecture -> rows by kind of input; an architecture that is not listed takes the newest one below it.

    Args:
        rows: architecture -> key -> `Launch`, or one row for all kinds.
        measured: architectures, or pairs of one and a key, whose rows were timed against others on such a GPU. The others
            were chosen by ahead-of-time compile: no spills, and shared memory that fits.
    """

    def __init__(self, rows: Mapping, measured: Iterable = ()) -> None:
        super().__init__(rows)
        self.measured = frozenset(measured)

    def row(self, device: torch.device, *key):
        """The row of a device: its architecture's, and of it the one for a key, where there are keys."""
        found = target.launch_row(self, device)
        return found[_joined(key)] if key else found

    def status(self, arch: int, *key) -> str:
        """ "measured" or "compiled only"; arguments as in the table."""
        pair = (arch, _joined(key)) if key else arch
        return "measured" if arch in self.measured or pair in self.measured else "compiled only"


def _joined(key: tuple[Any, ...]) -> Any:
    """A key as rows have it: one value by itself, several as a tuple."""
    first, *rest = key
    return key if rest else first
