"""One call of `near`: order, granules, the error their means would leave, lists of what is computed; and its execution.

Text takes no part in the choice: its keys are in every list, and its queries see everything through dense attention.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from svg.kernels.common import target
from svg.kernels.granules import (
    GranuleLists,
    Granules,
    cut_granules,
    granule_attention,
    granule_attention_quantized,
    granule_scores,
    listed_density,
    quantize_granules,
    select_granules,
)
from svg.kernels.granules.values import for_both_halves, longest_first

from ...engine.layout import TokenLayout
from ...engine.peers import Peers, bounds
from ...engine.replay import Steady
from ...engine.state import LayerState
from .. import reuse
from ..dense import dense_attention, key_mask
from ..text import prompt_first
from .config import NearConfig
from .orders import token_orders

Share = TypeVar("Share", float, Tensor)
PROBE_ROWS = 64
SHARE = "share"  # of the granules that this call lists, on the device
PER_GROUP = ("starts", "whole", "counts", "chosen")  # of a row group, in its lists
SCORE_BYTES = 2 << 30  # of the heads whose threshold is found together


class Chosen(NamedTuple):
    """What calls may share.

    Args:
        q_order, k_order: int32 [B, H, V], sorted -> original index of the video's queries and keys.
        lists: what each row group computes, one for every stretch of heads that was planned together.
    """

    q_order: Tensor
    k_order: Tensor
    lists: tuple[GranuleLists, ...]


class ForBranches(NamedTuple):
    """What the first guidance branch of a step leaves to the others.

    Args:
        branch: whose choice it is.
        decided_by: settings, shapes, layout and heads, which must be the same.
        chosen: the choice.
    """

    branch: str
    decided_by: tuple
    chosen: Chosen


@dataclass(frozen=True, kw_only=True)
class NearPlan:
    """What one call computes.

    Args:
        chosen: orders and lists.
        size: keys of a granule.
        stretches: heads that were planned together, and run together.
        layout: where video and text are.
        text_mask: bool [B, text_tokens], True for prompt tokens, or None for all.
        dense_backend: of the text's queries.
        reused: whether an earlier call made all of it.
        made: this call's keys and values in granules, a stretch after another, where planning has made them already.
    """

    chosen: Chosen
    size: int
    stretches: tuple[slice, ...]
    layout: TokenLayout
    text_mask: Tensor | None
    dense_backend: str
    reused: bool = False
    made: tuple[Granules, ...] | None = None
    kind: None = None

    def granules(self, k: Tensor, v: Tensor, heads: slice, gather: bool = True, only: Tensor | None = None) -> Granules:
        """Keys and values of a stretch of heads in granules; arguments as `cut_granules` has them."""
        text, prompt_tokens = text_order(self.layout, self.text_mask, k)
        order = self.chosen.k_order[:, heads]
        return cut_granules(k[:, heads], v[:, heads], order, self.size, text, prompt_tokens, gather=gather, only=only)

    def density(self) -> Tensor:
        """Computed share of what dense attention computes, the means counted as one key each.

        Returns:
            float32 [B, H].
        """
        layout = self.layout
        prompt = None if self.text_mask is None else prompt_lengths(layout, self.text_mask, len(self.text_mask), None)
        share = {"video": layout.video_tokens, "text": layout.text_tokens, "size": self.size}
        parts = [listed_density(lists, prompt, **share) for lists in self.chosen.lists]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def execute(
        self, q: Tensor, k: Tensor, v: Tensor, precision: str = "native", failed: Tensor | None = None
    ) -> Tensor:
        """Attention as planned; arguments and result as `svg.engine.execute.execute` has them."""
        out = torch.empty_like(q)
        for i, (heads, lists) in enumerate(zip(self.stretches, self.chosen.lists)):
            order, rows = self.chosen.q_order[:, heads], out[:, heads]
            if precision == "native":
                granules = self.granules(k, v, heads) if self.made is None else self.made[i]
                granule_attention(q[:, heads], granules, lists, q_order=order, out=rows)
            else:
                text, prompt_tokens = text_order(self.layout, self.text_mask, k)
                granules = quantize_granules(
                    k[:, heads],
                    v[:, heads],
                    self.chosen.k_order[:, heads],
                    size=self.size,
                    text=text,
                    prompt_tokens=prompt_tokens,
                    precision=precision,
                    rows=lists.rows,
                )
                flags = None if failed is None else failed[:, heads]
                granule_attention_quantized(q[:, heads], granules, lists, q_order=order, out=rows, failed=flags)
        if self.layout.text_tokens:
            text = self.layout.text_slice
            seen = key_mask(self.layout, self.text_mask)
            out[:, :, text] = dense_attention(q[:, :, text], k, v, seen, self.dense_backend)
        return out

    def probe_rows(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, generator: Random) -> tuple[Tensor, Tensor]:
        """Neighbouring rows of every head against 16-bit attention over the same keys; as `svg.engine.repair.probe_rows`."""
        rows = self.chosen.lists[0].rows
        groups = math.ceil(self.layout.video_tokens / rows)
        group = int(generator.random() * groups)
        index = self.chosen.q_order[:, :, group * rows : group * rows + min(rows, PROBE_ROWS)]
        exact = torch.empty_like(out)
        for heads, lists in zip(self.stretches, self.chosen.lists):
            part = {name: getattr(lists, name)[:, :, group : group + 1].contiguous() for name in PER_GROUP}
            one = dataclasses.replace(lists, schedule=longest_first(part["counts"]), **part)
            granule_attention(
                q[:, heads], self.granules(k, v, heads), one, q_order=index[:, heads], out=exact[:, heads]
            )
        where = index.long()[..., None].expand(-1, -1, -1, q.shape[-1])
        exact, got = (x.gather(2, where).float() for x in (exact, out))
        norm = torch.linalg.vector_norm
        error = norm(got - exact, dim=(2, 3)) / norm(exact, dim=(2, 3)).clamp_min(1e-30)
        return error, (got * exact).sum() / (norm(got) * norm(exact)).clamp_min(1e-30)

    def repair(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, failed: Tensor) -> None:
        """Compute failed heads again without quantisation, in `out`; as `svg.engine.repair.repair`."""
        if (target.INTERPRETED or not target.use_triton(q)) and not failed.any():
            return
        for heads, lists in zip(self.stretches, self.chosen.lists):
            only = failed[:, heads].contiguous()
            granules = self.granules(k, v, heads, only=only)
            order = self.chosen.q_order[:, heads]
            granule_attention(q[:, heads], granules, lists, q_order=order, out=out[:, heads], only=only)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NearConfig,
    state: LayerState,
    layout: TokenLayout,
    text_mask: Tensor | None = None,
) -> NearPlan:
    """Cut the keys into granules, estimate the error of every mean, and list what has to be exact.

    Args:
        q, k, v: float [B, H, S, D], after QK-norm and RoPE.
        config: the method's settings.
        state: the layer's state; its centroids are where k-means starts, and are replaced.
        layout: where video and text are.
        text_mask: bool [B, text_tokens], True for prompt tokens, or None for all.

    Returns:
        The plan. Its density is within the budget.

    Raises:
        ValueError: the means and the text alone are above the budget.
    """
    config = config.of_layer(state.layer)
    video, share = layout.video_slice, state.cache.pop(SHARE, None)
    kept, made = reuse.still_good(state, config), None
    stretches = _stretches(q, config, layout, state.peers)
    common = {"size": config.granule, "stretches": stretches, "layout": layout, "text_mask": text_mask}
    common["dense_backend"] = config.dense_backend
    of_other = _of_other_branch(state, config, text_mask)
    if of_other is not None:
        return NearPlan(chosen=of_other, reused=True, **common)
    if kept is not None and text_mask is None:
        found = NearPlan(chosen=kept.chosen, reused=True, **common)
    else:
        halves = state.halves and config.share_branches and text_mask is None
        deciding = slice(len(q) // 2, None) if halves else slice(None)  # with the prompt, as pipelines put them
        q_order, k_order = token_orders(q[deciding, :, video], k[deciding, :, video], config, state, layout)
        if halves:
            q_order, k_order = (torch.cat([order, order]) for order in (q_order, k_order))
        found = NearPlan(chosen=Chosen(q_order, k_order, ()), **common)
        gather = config.precision == "native"  # other precisions are gathered where they are quantised
        granules = tuple(found.granules(k, v, heads, gather) for heads in stretches)
        lists = tuple(_select(found, q, part, config, state, deciding, i, share) for i, part in enumerate(granules))
        if halves:
            lists = tuple(map(for_both_halves, lists))
        found = NearPlan(chosen=Chosen(q_order, k_order, lists), **common)
        kept, made = None, granules if gather else None
    # What is remembered must not hold this call's keys and values.
    reuse.remember(state, config, kept, found, found.chosen, q[:, :, video], k[:, :, video])
    if config.share_branches and state.step is not None:
        state.step["near"] = ForBranches(state.branch, _decided_by(state, config), found.chosen)
    return dataclasses.replace(found, made=made)


def steady(
    q: Tensor, config: NearConfig, state: LayerState, layout: TokenLayout, text_mask: Tensor | None
) -> Steady | None:
    """What a captured call needs (see `svg/methods/registry.py`): the budget of the step in a tensor.

    Args:
        q: float [B, H, S, D].
        config: the method's settings in this step.
        state: the layer's state.
        layout: where video and text are.
        text_mask: bool [B, text_tokens], or None.

    Returns:
        Settings with a coarser budget, which sizes the lists; None where centroids are drawn first, or drift is measured.
    """
    config = config.of_layer(state.layer)
    if _of_other_branch(state, config, text_mask) is not None:
        return Steady(_roughly(config, state))
    names = ("k_centroids", "q_centroids") if config.query_order == "clusters" else ("k_centroids",)
    if config.max_drift is not None or any(name not in state.cache for name in names):
        return None
    own = config.head_budgets(state.layer)
    if own is None:
        share = exact_share(config.budget, config, layout)
        state.cache[SHARE] = torch.full((), share, dtype=torch.float64, device=q.device)
    else:
        share = exact_share(torch.tensor(own), config, layout)
        state.cache[SHARE] = torch.as_tensor(share, dtype=torch.float32).to(q.device, non_blocking=True)
    return Steady(_roughly(config, state))


def _roughly(config: NearConfig, state: LayerState) -> NearConfig:
    """A layer's settings with a coarser budget, which all steps of a run have, so that one graph serves them."""
    steps = [config]
    if isinstance(state.widest, NearConfig):
        steps.append(state.widest.of_layer(state.layer))
    return max((step.rounded_up(state.layer) for step in steps), key=lambda step: step.budget)


def _of_other_branch(state: LayerState, config: NearConfig, text_mask: Tensor | None) -> Chosen | None:
    """What another guidance branch chose in this step, where it serves this one too."""
    made = None if state.step is None else state.step.get("near")
    if made is None or text_mask is not None or not config.share_branches:
        return None
    serves = made.branch != state.branch and made.decided_by == _decided_by(state, config)
    return made.chosen if serves else None


def _decided_by(state: LayerState, config: NearConfig) -> tuple:
    # A budget changes with the step, not within one, and captured calls know it roughly.
    return _roughly(config, state), state.signature, None if state.peers is None else state.peers.deal


def _select(
    found: NearPlan,
    q: Tensor,
    granules: Granules,
    config: NearConfig,
    state: LayerState,
    deciding: slice,
    stretch: int,
    share: Tensor | None,
) -> GranuleLists:
    """Lists of a stretch of heads, for the samples that decide; `share` is as `steady` has left it, or None."""
    heads = found.stretches[stretch]
    order = found.chosen.q_order[deciding, heads]
    granules = granules.of_samples(deciding)
    scores = granule_scores(q[deciding, heads], order, granules, rows=config.rows, pool=config.pool)
    options = {"floor": config.floor, "size": config.granule, "rows": config.rows}
    own = config.head_budgets(state.layer)
    if share is not None:
        per_head = share.dim() > 0
        most = exact_share(config.budget, config, found.layout)
        if per_head and len(found.stretches) > 1:  # some heads may have a larger mean than all
            share, most = share[heads], 1.0
        return select_granules(scores, granules.tokens, budget=share, per_head=per_head, most=most, **options)
    if own is None:
        number = exact_share(config.budget, config, found.layout)
        others = None if state.peers is None else state.peers.part(stretch, len(found.stretches))
        return select_granules(scores, granules.tokens, budget=number, others=others, **options)
    budgets = state.head_budgets(config, q.device)
    assert isinstance(budgets, Tensor), "a layer with budgets of its own has one a head"
    shares = exact_share(budgets[heads], config, found.layout)
    most = float(exact_share(torch.tensor(own[heads]), config, found.layout).mean())
    return select_granules(scores, granules.tokens, budget=shares, per_head=True, most=min(1.0, most + 1e-4), **options)


def exact_share(budget: Share, config: NearConfig, layout: TokenLayout) -> Share:
    """Share of the video's granules that a row group may list so that everything computed stays within the budget.

    Args:
        budget: of the whole map, the means and the text counted, in (0, 1]; fp32 [H] where heads differ.
        config: the method's settings.
        layout: where video and text are.

    Returns:
        In (0, 1]; 1 where the budget is 1.

    Raises:
        ValueError: nothing is left once the means and the text are paid for.
    """
    video, total, size = layout.video_tokens, layout.total_tokens, config.granule
    granules, groups = math.ceil(video / size), math.ceil(video / config.rows)
    # Text counts without padding: the worst case, and known without reading the prompts' lengths from the device. A last
    # granule of fewer keys is in every list. The last row group may be short: as if its list were a long one.
    fixed = config.pairs_in_any_case(video, total)
    pairs = granules * size * groups * config.rows
    if isinstance(budget, Tensor):
        share = (budget.double() * total**2 - fixed) / pairs
        return torch.where(budget >= 1, 1.0, share.clamp(1e-6, 1.0)).float()
    if budget == 1:
        return 1.0
    if fixed >= total**2:
        raise ValueError(
            f"budget must be 1 at {total} tokens, where the means and the text alone are as much as dense attention, "
            f"got {budget}: use dense attention for so short a video"
        )
    if budget * total**2 <= fixed:
        raise ValueError(
            f"budget must be above {fixed / total**2:.4f}, the share of the means of {size} keys each and of "
            f"{layout.text_tokens} text tokens, which are always computed, got {budget}: raise it, or take a larger granule"
        )
    return min(1.0, (budget * total**2 - fixed) / pairs)


def _stretches(q: Tensor, config: NearConfig, layout: TokenLayout, peers: Peers | None) -> tuple[slice, ...]:
    """Heads that are planned together: as many as keep their scores small, in as many stretches on every process."""
    groups, granules = math.ceil(layout.video_tokens / config.rows), math.ceil(layout.video_tokens / config.granule)
    at_once = max(1, SCORE_BYTES // (4 * q.shape[0] * groups * granules))
    heads = q.shape[1]
    counts = [heads] if peers is None else [len(hand) for hand in peers.deal]
    parts = min(math.ceil(max(counts) / at_once), min(counts))
    return tuple(slice(*edges) for edges in bounds(heads, parts))


def prompt_lengths(layout: TokenLayout, text_mask: Tensor | None, batch: int, device: torch.device | None) -> Tensor:
    """Prompt tokens of each sample, int64 [B]."""
    if text_mask is None:
        return torch.full((batch,), layout.text_tokens, device=device)
    return text_mask.sum(-1)


def text_order(layout: TokenLayout, text_mask: Tensor | None, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the text's tokens, the prompt's first, int32 [B, L], and the prompts' lengths [B]; None without text."""
    if not layout.text_tokens:
        return None, None
    batch = k.shape[0]
    if text_mask is None:
        words = torch.arange(layout.text_tokens, dtype=torch.int32, device=k.device).expand(batch, -1)
    else:
        words = prompt_first(text_mask)
    return words + layout.text_slice.start, prompt_lengths(layout, text_mask, batch, k.device)
