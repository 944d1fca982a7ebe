"""Processes that make one video together: their group, and the split of a transformer's sequence over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.hooks import context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig
from torch import Tensor, nn

from svg.engine.records import AttentionRecord

from .branches import branches_of
from .parallel import context_parallel_plan


def join(device: str) -> torch.device:
    """Join the processes that torchrun started, unless this one has.

    Args:
        device: "cuda" or "cpu".

    Returns:
        This process' device: the GPU of its local rank, or the CPU.
    """
    here = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "cpu:gloo")
    return here


def split_sequence(transformer: Any) -> Any:
    """Split a transformer's sequence over all processes, through Diffusers' hooks; uneven numbers are fine.

    Args:
        transformer: a Diffusers transformer of a family that has a plan for it, accelerated or not.

    Returns:
        The same transformer.

    Raises:
        NotImplementedError: it has no plan.

    Example:
        split_sequence(pipe.transformer)
    """
    plan = context_parallel_plan(transformer)
    for name in ("diffusers.models.modeling_utils", "diffusers.hooks.context_parallel"):
        diffusers.utils.logging.get_logger(name).setLevel("ERROR")  # that it may change, and what it leaves whole
    config = ContextParallelConfig(ulysses_degree=dist.get_world_size(), ulysses_anything=True)
    with _a_cpu_counts_as_one():
        transformer.enable_parallelism(config=config, cp_plan=plan)
    return transformer


def is_split(transformer: nn.Module) -> bool:
    """Whether several processes share a transformer's sequence, or its branches."""
    return getattr(transformer, "_parallel_config", None) is not None or branches_of(transformer) is not None


def share_records(records: list[AttentionRecord]) -> list[AttentionRecord]:
    """The records of all processes: one's own, and what others computed of calls that this one left out."""
    own = {(record.step, record.layer, record.branch) for record in records}
    others = sum(everyones([record.read() for record in records]), [])
    missing = [record for record in others if (record.step, record.layer, record.branch) not in own]
    return sorted(records + missing, key=lambda record: (record.step, record.branch or "", record.layer))


def everyones(value: Any) -> list[Any]:
    """A value of every process, in their order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _a_cpu_counts_as_one() -> Iterator[None]:
    """Diffusers divides by the number of accelerators; and it gathers unequal parts as NCCL can and gloo cannot."""
    if torch.accelerator.is_available():
        yield
        return
    context_parallel._all_gather_anything = _gather_unequal
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def _gather_unequal(tensor: Tensor, dim: int, group: Any) -> Tensor:
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor, group=group)
    return torch.cat(parts, dim)
