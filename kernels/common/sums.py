"""Sums of whole tensors: NaN or infinity in any value shows in its sum, for one read and one launch."""

import torch

from . import target
from .target import tl, triton

PROGRAMS, BLOCK, WARPS = 16, 4096, 8  # programs a multiprocessor; values that a program reads at once


def sums_of(*tensors: torch.Tensor) -> torch.Tensor:
    """One fp32 sum a tensor, in an order that is fixed for a shape and a device.

    Args:
        tensors: float, each of any shape and strides.

    Returns:
        fp32 [n]. Not finite where a value is not; finite values whose sum leaves fp32's range give infinity too.

    Example:
        >>> sums_of(torch.ones(2, 3), torch.tensor([1.0, float("nan")]))
        tensor([6., nan])
    """
    x = tensors[0]
    alike = all(_is_dense(t) and t.numel() == x.numel() and t.dtype == x.dtype for t in tensors)
    if alike and 0 < len(tensors) <= 3 and target.use_triton(x):
        return _sums(tensors)
    return sums_reference(*tensors)


def sums_reference(*tensors: torch.Tensor) -> torch.Tensor:
    """Specification of `sums_of` in plain torch; same arguments and result."""
    return torch.stack([x.detach().sum(dtype=torch.float32) for x in tensors])


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the values fill one piece of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return x.numel() > 0


def _sums(tensors):
    first, second, third = (tensors * 3)[:3]
    number = first.numel()
    programs = min(triton.cdiv(number, BLOCK), PROGRAMS * target.sm_count(first.device))
    parts = torch.empty(len(tensors), programs, dtype=torch.float32, device=first.device)
    with target.on_device(first):
        _sums_kernel[(programs,)](first, second, third, parts, number, COUNT=len(tensors), BLOCK=BLOCK, num_warps=WARPS)
    return parts.sum(1)


@triton.jit(do_not_specialize=["number"])
def _sums_kernel(first, second, third, parts, number, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    _sum(first, parts, number, 0, BLOCK)
    if COUNT > 1:
        _sum(second, parts, number, 1, BLOCK)
    if COUNT > 2:
        _sum(third, parts, number, 2, BLOCK)


@triton.jit
def _sum(x, parts, number, which: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, number, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(x + place, mask=place < number, other=0.0).to(tl.float32)
    tl.store(parts + which * tl.num_programs(0) + tl.program_id(0), tl.sum(total, 0))
