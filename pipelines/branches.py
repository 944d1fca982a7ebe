"""Two processes, one for each branch of guidance: the alternative to splitting the sequence where there are two GPUs.

A pipeline calls its transformer twice a step with the same latents. Each process computes one call; for the first call
the second process returns a tensor that is filled when the second call ends, before the pipeline reads either. The first
step is computed whole by both, which tells what an output looks like.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class TwoBranches:
    """Stands in for a transformer's forward; made by `split_branches`.

    Args:
        transformer: whose forward it stands in for.
        rank: 0 for the first call of a step, 1 for the second.
    """

    def __init__(self, transformer: nn.Module, rank: int):
        self._forward, self.rank = transformer.forward, rank
        self._like: Tensor | None = None  # an output
        self._first: Tensor | None = None  # of the step that has begun
        self._latents: Any = None

    def __call__(self, *args, **kwargs) -> Any:
        latents = kwargs.get("hidden_states", args[0] if args else None)
        if kwargs.get("return_dict", True) is not False:
            raise NotImplementedError("return_dict must be False where branches are split: run on one GPU")
        if self._first is None:
            self._latents = latents
            self._first = self._branch(0, args, kwargs)
            return (self._first,)
        if latents is not self._latents:
            raise ValueError(
                "guidance must be above 1 in every step where branches are split over two GPUs: this pipeline called the "
                "transformer once a step; split the sequence"
            )
        out = self._branch(1, args, kwargs)
        if self._like is None:
            self._like = torch.empty_like(out, device="meta")
        else:
            dist.broadcast(self._first, 0)
            dist.broadcast(out, 1)
        self._first = self._latents = None
        return (out,)

    def _branch(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if self._like is not None and self.rank != index:
            like, latents = self._like, self._latents
            return torch.empty(like.shape, dtype=like.dtype, device=latents.device)
        return self._forward(*args, **kwargs)[0].contiguous()

    def end_run(self) -> None:
        """Begin the next run anew.

        Raises:
            ValueError: the last step had one call.
        """
        first, self._first, self._like, self._latents = self._first, None, None, None
        if first is not None:
            raise ValueError("guidance must be above 1 where branches are split over two GPUs, got one call in a step")


def split_branches(transformer: nn.Module) -> nn.Module:
    """Let two processes compute a branch of guidance each.

    Args:
        transformer: of a pipeline that calls it twice a step, as Wan's and HunyuanVideo's with a negative prompt.

    Returns:
        The same transformer.

    Raises:
        ValueError: there are not two processes.
    """
    if dist.get_world_size() != 2:
        raise ValueError(f"branches must be split over 2 processes, got {dist.get_world_size()}: split the sequence")
    transformer.forward = TwoBranches(transformer, dist.get_rank())
    return transformer


def branches_of(transformer: nn.Module) -> TwoBranches | None:
    """What `split_branches` put on a transformer, or None."""
    found = vars(transformer).get("forward")
    return found if isinstance(found, TwoBranches) else None
