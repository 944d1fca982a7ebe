"""Several GPUs, one sequence: Ulysses under Diffusers' context parallelism.

Diffusers' hooks give every rank a stretch of the video's tokens. Attention exchanges them, all tokens of some heads for
some tokens of all heads, runs the method on its heads, with the whole sequence, and exchanges back. Text that the blocks
keep whole on every rank is not exchanged: a rank takes its heads of it, and gets the others' results.

Source: DeepSpeed Ulysses (arXiv 2309.14509), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn

from svg.engine.peers import Deal, Peers, even_deal

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
        heads: of all ranks; more than there are ranks, or as many.
        text: tokens that every rank has whole.
        text_first: whether they come before the others.
        deal: which heads each rank takes, as many as in `even_deal`; None: that.

    Raises:
        ValueError: there are fewer heads or tokens than ranks.
    """

    def __init__(
        self, group: Any, tokens: int, heads: int, text: int = 0, text_first: bool = False, deal: Deal | None = None
    ):
        self.group, self.rank = group, dist.get_rank(group)
        ranks = dist.get_world_size(group)
        if min(tokens, heads) < ranks:
            raise ValueError(
                f"ulysses_degree must be at most the number of heads and of tokens, {heads} and {tokens}, got {ranks}"
            )
        self.tokens = [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]
        self.deal = even_deal(heads, ranks) if deal is None else deal
        self.text, self.text_first = text, text_first

    @property
    def peers(self) -> Peers:
        """The ranks as the method sees them: whoever has the other heads."""
        return Peers(self.deal, self.rank, self.group)

    def heads_for_tokens(self, *several: Tensor) -> list[Tensor]:
        """Some tokens of all heads [B, S / ranks + text, H, D] -> all tokens of some heads [B, S + text, H / ranks, D].

        Of several tensors: one travels while the next is packed, and is unpacked while that one travels.
        """
        return [arrive() for arrive in [self._send(x) for x in several]]

    def _send(self, x: Tensor) -> Callable[[], Tensor]:
        text, video = self._parts(x)
        batch, count, _, dim = video.shape
        mine = len(self.deal[self.rank])
        if count != self.tokens[self.rank]:
            raise ValueError(
                f"rank {self.rank} must have {self.tokens[self.rank]} of {sum(self.tokens)} tokens, got {count}: "
                f"the plan of enable_parallelism splits another sequence"
            )
        sent = [_of_heads(video, heads) for heads in self.deal]
        shapes = [(batch, tokens, mine, dim) for tokens in self.tokens]
        arrive = _exchange(sent, shapes, 1, self.group)
        return lambda: self._joined(_of_heads(text, self.deal[self.rank]), arrive())

    def tokens_for_heads(self, x: Tensor) -> Tensor:
        """Undo `heads_for_tokens`; text comes back with all heads."""
        text, video = self._parts(x)
        batch, _, _, dim = x.shape
        shapes = [(batch, self.tokens[self.rank], len(heads), dim) for heads in self.deal]
        own = _exchange(list(video.split(self.tokens, dim=1)), shapes, 2, self.group)
        if not self.text:
            return self._in_order(own())
        shapes = [(batch, self.text, len(heads), dim) for heads in self.deal]
        others = _exchange([text] * len(shapes), shapes, 2, self.group)
        return self._joined(self._in_order(others()), self._in_order(own()))

    def _in_order(self, x: Tensor) -> Tensor:
        """Heads [B, S, H, D] as they were dealt -> by index."""
        dealt = sum(self.deal, ())
        if dealt == tuple(range(len(dealt))):
            return x
        return _of_heads(x, tuple(dealt.index(head) for head in range(len(dealt))))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rest = x.shape[1] - self.text
        return (x[:, : self.text], x[:, self.text :]) if self.text_first else (x[:, rest:], x[:, :rest])

    def _joined(self, text: Tensor, video: Tensor) -> Tensor:
        if not self.text:
            return video
        return torch.cat([text, video] if self.text_first else [video, text], dim=1)


def _of_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of [B, S, H, D]; a view where they are neighbours."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return x[:, :, heads[0] : heads[-1] + 1]
    return x.index_select(2, torch.tensor(heads, pin_memory=x.is_cuda).to(x.device, non_blocking=True))


def _exchange(parts: list[Tensor], shapes: list[tuple[int, ...]], dim: int, group: Any) -> Callable[[], Tensor]:
    """Send parts[r] to rank r; what rank r sends has shapes[r]. Call the result for all of it, joined along a dimension."""
    sizes, lengths = [prod(shape) for shape in shapes], [part.numel() for part in parts]
    sent = parts[0].new_empty(sum(lengths))
    for room, part in zip(sent.split(lengths), parts, strict=True):
        room.view(part.shape).copy_(part)
    received = sent.new_empty(sum(sizes))
    work = dist.all_to_all_single(received, sent, sizes, lengths, group=group, async_op=True)
    assert work is not None  # this process is one of the group's
    whole = list(shapes[0])
    whole[dim] = sum(shape[dim] for shape in shapes)

    def arrive() -> Tensor:
        work.wait()
        if prod(whole[:dim]) == 1:  # the ranks' parts already lie as they must
            return received.view(whole)
        return torch.cat([part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)], dim=dim)

    return arrive


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

    plan: Any = find_spec(transformer).cp_plan or getattr(transformer, "_cp_plan", None)
    plan = plan(transformer) if callable(plan) else plan
    if plan is None:
        raise NotImplementedError(
            f"{type(transformer).__name__} has no plan for context parallelism: run it on one GPU"
        )
    return plan
