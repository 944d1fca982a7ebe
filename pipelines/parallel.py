"""Several GPUs, one sequence: Ulysses under Diffusers' context parallelism.

Diffusers' hooks give every rank a stretch of the video's tokens. Attention exchanges them, all tokens of some heads for
some tokens of all heads, runs the method on its heads, with the whole sequence, and exchanges back. Text that the blocks
keep whole on every rank is not exchanged: a rank takes its heads of it, and gets the others' results.

Source: DeepSpeed Ulysses (arXiv 2309.14509), section 3.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn

# Diffusers has no plan for joint attention: video is split where the blocks begin, its angles with it; text stays whole.
JOINT_PLAN = {
    "rope": {
        0: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
        1: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True),
    },
    "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class Ulysses:
    """One exchange of heads for tokens, and back.

    Args:
        group: the ranks.
        tokens: split over them, as `torch.tensor_split` splits.
        heads: of all ranks, dealt the same way; more than there are ranks, or as many.
        text: tokens that every rank has whole.
        text_first: whether they come before the others.

    Raises:
        ValueError: there are fewer heads or tokens than ranks.
    """

    def __init__(self, group: Any, tokens: int, heads: int, text: int = 0, text_first: bool = False):
        self.group, self.rank = group, dist.get_rank(group)
        ranks = dist.get_world_size(group)
        if min(tokens, heads) < ranks:
            raise ValueError(
                f"ulysses_degree must be at most the number of heads and of tokens, {heads} and {tokens}, got {ranks}"
            )
        self.tokens, self.heads = _shares(tokens, ranks), _shares(heads, ranks)
        self.text, self.text_first = text, text_first

    def heads_for_tokens(self, x: Tensor) -> Tensor:
        """Some tokens of all heads [B, S / ranks + text, H, D] -> all tokens of some heads [B, S + text, H / ranks, D]."""
        text, video = self._parts(x)
        mine = self.heads[self.rank]
        if video.shape[1] != self.tokens[self.rank]:
            raise ValueError(
                f"rank {self.rank} must have {self.tokens[self.rank]} of {sum(self.tokens)} tokens, got {video.shape[1]}: "
                f"the plan of enable_parallelism splits another sequence"
            )
        shapes = [(x.shape[0], count, mine, x.shape[3]) for count in self.tokens]
        whole = torch.cat(_exchange(list(video.split(self.heads, dim=2)), shapes, self.group), dim=1)
        return self._joined(text.split(self.heads, dim=2)[self.rank], whole)

    def tokens_for_heads(self, x: Tensor) -> Tensor:
        """Undo `heads_for_tokens`; text comes back with all heads."""
        text, video = self._parts(x)
        batch, _, _, dim = x.shape
        shapes = [(batch, self.tokens[self.rank], count, dim) for count in self.heads]
        own = torch.cat(_exchange(list(video.split(self.tokens, dim=1)), shapes, self.group), dim=2)
        if not self.text:
            return own
        shapes = [(batch, self.text, count, dim) for count in self.heads]
        return self._joined(torch.cat(_exchange([text] * len(self.heads), shapes, self.group), dim=2), own)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rest = x.shape[1] - self.text
        return (x[:, : self.text], x[:, self.text :]) if self.text_first else (x[:, rest:], x[:, :rest])

    def _joined(self, text: Tensor, video: Tensor) -> Tensor:
        return torch.cat([text, video] if self.text_first else [video, text], dim=1)


def _shares(count: int, ranks: int) -> list[int]:
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


def _exchange(parts: list[Tensor], shapes: list[tuple[int, ...]], group: Any) -> list[Tensor]:
    """Send parts[r] to rank r; what rank r sends has shapes[r]."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    sizes = [prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def ulysses_group(processor: Any) -> Any:
    """The ranks that share a sequence, or None without context parallelism.

    Args:
        processor: a processor, on which Diffusers sets `_parallel_config`.

    Raises:
        NotImplementedError: ring attention is asked for.
    """
    config = getattr(processor, "_parallel_config", None)
    config = getattr(config, "context_parallel_config", config)
    if config is None:
        return None
    if config.ring_degree > 1:
        raise NotImplementedError(
            "ring_degree must be 1: in a ring no rank sees all keys at once, and what a sparse method keeps depends on all "
            "of them; use ContextParallelConfig(ulysses_degree=n)"
        )
    return config._ulysses_mesh.get_group()


def context_parallel_plan(transformer: nn.Module) -> dict[str, Any]:
    """The `cp_plan` for `transformer.enable_parallelism`: Diffusers' own, or ours where it has none.

    Args:
        transformer: a Diffusers transformer.

    Returns:
        The plan.

    Raises:
        NotImplementedError: there is none.

    Example:
        plan = svg.context_parallel_plan(pipe.transformer)
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2), cp_plan=plan)
    """
    from .registry import find_spec

    plan = find_spec(transformer).cp_plan or getattr(transformer, "_cp_plan", None)
    plan = plan(transformer) if callable(plan) else plan
    if plan is None:
        raise NotImplementedError(
            f"{type(transformer).__name__} has no plan for context parallelism: run it on one GPU"
        )
    return plan
