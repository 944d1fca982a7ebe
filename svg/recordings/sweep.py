"""Methods measured on recorded q, k, v: recall, output error and density per head, in seconds, nothing generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svg.eval.files import write_json
from svg.kernels.block_sparse.op import block_sparse_attention
from svg.kernels.clustering.permute import gather_tokens

from ..attend import attend
from ..config import MethodConfig
from ..engine.plan import Plan
from ..engine.records import ObservedAttention
from ..engine.state import RunState
from ..methods.dense import key_mask
from .record import RecordedCall, open_recording

VERSION = 1
_SCORE_BYTES = 256 << 20


def sweep_recorded(
    path: str | Path, methods: list[tuple[str, MethodConfig]], device: torch.device, out: Path, command: str
) -> dict[str, Any]:
    """Measure methods on a recording and write recorded.json.

    Args:
        path: a file of `svg record`.
        methods: (label, config) each; their warm-up is switched off, so that every recorded call is sparse.
        device: where to compute.
        out: folder to write to.
        command: what the file says it came from.

    Returns:
        recorded.json.

    Raises:
        ValueError: no such recording, or a method cannot run on it.
        OSError: the folder cannot be written to.
    """
    recording = open_recording(path)
    measures = {label: Measure(label, config) for label, config in methods}
    rows = []
    for call in recording.calls:
        q, k, v, text_mask = recording.tensors(call, device)
        exact, lse = dense_rows(q, k, v, key_mask(call.layout, text_mask))
        for measure in measures.values():
            rows += measure(call, q, k, v, text_mask, exact, lse)
    result = {
        "format": "svg-recorded",
        "version": VERSION,
        "source": recording.source,
        "command": command,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "recorded.json", result)
    return result


class Measure:
    """One method on the calls of a recording, in the order of the run: its caches go on from call to call.

    Args:
        label: the method's short name.
        config: its settings.
    """

    def __init__(self, label: str, config: MethodConfig):
        self._label = label
        self._config = dataclasses.replace(config, warmup_steps=0.0, warmup_layers=0.0)
        self._states: dict[str, RunState] = {}

    def __call__(
        self,
        call: RecordedCall,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_mask: Tensor | None,
        exact: Tensor,
        lse: Tensor,
    ) -> Iterator[dict[str, Any]]:
        """Measure one call.

        Args:
            call: which it is.
            q, k, v: float [B, H, S, D].
            text_mask: bool [B, text_tokens], or None.
            exact: float32 [B, H, S, D], dense attention's output.
            lse: float32 [B, H, S], natural log-sum-exp of dense attention's scores.

        Returns:
            One row a head.
        """
        state = self._state(call)
        state.begin_forward(call.step, call.num_steps, call.branch, call.layout)
        seen: list[ObservedAttention] = []
        state.observer = seen.append
        attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), state, call.layer, text_mask)
        state.end_run()
        (observed,) = seen
        density = state.records[-1].density.float().mean(0).tolist()  # [H]
        error = relative_error(observed.out, exact)
        # Without a plan nothing was skipped.
        kept = recall(observed.plan, q, k, v, lse) if isinstance(observed.plan, Plan) else [1.0] * q.shape[1]
        common = {"label": self._label, "method": self._config.to_dict(), "transformer": call.transformer}
        common |= {"step": call.step, "layer": call.layer, "branch": call.branch}
        for head, values in enumerate(zip(density, kept, error)):
            yield {**common, "head": head, **dict(zip(("density", "recall", "error"), values))}

    def _state(self, call: RecordedCall) -> RunState:
        if call.transformer not in self._states:
            self._states[call.transformer] = RunState(self._config, call.num_layers, call.transformer)
        return self._states[call.transformer]


def dense_rows(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dense attention in fp32, with the log-sum-exp of each row.

    Args:
        q, k, v: float [B, H, S, D].
        visible: bool [B, S], keys that are seen, or None for all.

    Returns:
        out: float32 [B, H, S, D].
        lse: float32 [B, H, S], natural logarithm.
    """
    batch, heads, tokens, dim = q.shape
    rows = max(1, _SCORE_BYTES // (4 * batch * heads * tokens))
    k, v = k.float(), v.float()
    outs, sums = [], []
    for part in q.split(rows, dim=2):
        scores = (part.float() * dim**-0.5) @ k.mT  # [B, H, rows, S]
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None, :], -torch.inf)
        sums.append(scores.logsumexp(-1))
        outs.append((scores - sums[-1][..., None]).exp() @ v)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def recall(plan: Plan, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> list[float]:
    """Share of dense attention's mass that a plan computes, mean over the query rows and the batch.

    Args:
        plan: the plan of the call.
        q, k, v: float [B, H, S, D] in original order.
        lse: float32 [B, H, S], of dense attention.

    Returns:
        One share a head.
    """
    if plan.k_permutation is not None:
        k, v = gather_tokens(k, plan.k_permutation), gather_tokens(v, plan.k_permutation)
    _, kept = block_sparse_attention(
        q.float(),
        k.float(),
        v.float(),
        plan.block_map,
        plan.q_sizes,
        plan.k_sizes,
        map_index=plan.map_index,
        q_permutation=plan.q_permutation,
        sm_scale=plan.sm_scale,
        return_lse=True,
    )
    return (kept - lse).exp().mean((0, 2)).tolist()


def relative_error(out: Tensor, exact: Tensor) -> list[float]:
    """||out - exact|| / ||exact|| of each head, over batch, rows and channels.

    Args:
        out: float [B, H, S, D].
        exact: float32 [B, H, S, D].

    Returns:
        One number a head.
    """
    difference = (out.float() - exact).square().sum((0, 2, 3))
    return (difference / exact.square().sum((0, 2, 3))).sqrt().tolist()
