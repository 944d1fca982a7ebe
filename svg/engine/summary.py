"""A run's records as one plain dict: densities, head kinds and time, ready for JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .records import AttentionRecord
from .state import RunState


def summarize(state: RunState) -> dict[str, Any]:
    """Aggregate the records of a run; reads the device once per kind of record.

    Args:
        state: the state after a run, or during one.

    Returns:
        name, config (as a dict), calls {total, dense, sparse, reused (sparse ones that took an earlier call's clustering)};
        steps {total, dense (those in which every call was)};
        density: all_calls and sparse_calls (means; None where there is no such call), per_step and per_layer (lists of
        {step or layer, all_calls, sparse_calls}), per_branch {branch: {all_calls, sparse_calls}}, per_head
        {layer: one mean a head over the sparse calls}, map {steps, layers, heads, values: [step][layer][head], means
        over the branches and the batch, 4 digits; None for a layer that was not called};
        head_kinds {layer: {spatial, temporal}} shares over the calls, or None for methods without kinds;
        head_kinds_map as density.map, with the temporal share of the sparse calls (None for a layer that ran dense);
        attention_seconds {total, dense, sparse}, or None when calls were not timed;
        quantised, or None where no call was: precisions {name: {calls, emulated}}, safer {layer: steps towards a safer
        precision that it took}, guard (None where it was off) {head_calls, recomputed, probed_calls, least_cosine (of
        probed rows, before heads were computed again), per_layer {layer: recomputed}}.

    Raises:
        FloatingPointError: q, k or v of the last forward held NaN or infinity.
    """
    state.end_run()
    records = state.records
    density = _read([record.density for record in records])
    means = [values.mean().item() for values in density]
    sparse = [record for record in records if not record.dense]
    return {
        "name": state.name,
        "config": state.config.to_dict(),
        "calls": {
            "total": len(records),
            "dense": len(records) - len(sparse),
            "sparse": len(sparse),
            "reused": sum(record.reused for record in records),
        },
        "steps": _steps(records),
        "density": {
            **_density(zip(records, means)),
            "per_step": _table("step", records, means),
            "per_layer": _table("layer", records, means),
            "per_branch": {
                str(branch): _density(rows) for branch, rows in _group(records, means, lambda r: r.branch).items()
            },
            "per_head": _per_head(records, density),
            "map": _map(records, density),
        },
        "head_kinds": _head_kinds(sparse),
        "head_kinds_map": _kinds_map(records),
        "attention_seconds": _seconds(records),
        "quantised": _quantized(records, state.safer),
    }


def _steps(records: list[AttentionRecord]) -> dict[str, int]:
    every, sparse = ({record.step for record in rows} for rows in (records, [r for r in records if not r.dense]))
    return {"total": len(every), "dense": len(every - sparse)}


def _read(tensors: list[Tensor]) -> list[Tensor]:
    """CPU copies in float64, one transfer for all tensors of a device."""
    out: list[Tensor] = list(tensors)
    by_device = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_device[tensor.device].append(index)
    for indices in by_device.values():
        flat = torch.cat([tensors[i].flatten() for i in indices]).cpu().double()
        for i, part in zip(indices, flat.split([tensors[i].numel() for i in indices])):
            out[i] = part.view(tensors[i].shape)
    return out


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _density(rows: Iterable[tuple[AttentionRecord, float]]) -> dict[str, float | None]:
    rows = list(rows)
    return {
        "all_calls": _mean(mean for _, mean in rows),
        "sparse_calls": _mean(mean for record, mean in rows if not record.dense),
    }


def _group(
    records: list[AttentionRecord], values: list, key: Callable[[AttentionRecord], Any]
) -> dict[Any, list[tuple]]:
    groups = defaultdict(list)
    for record, value in zip(records, values):
        groups[key(record)].append((record, value))
    return dict(groups)


def _table(name: str, records: list[AttentionRecord], means: list[float]) -> list[dict[str, Any]]:
    groups = _group(records, means, lambda record: getattr(record, name))
    return [{name: index, **_density(groups[index])} for index in sorted(groups)]


def _per_head(records: list[AttentionRecord], density: list[Tensor]) -> dict[str, list[float]]:
    groups = _group(records, density, lambda record: record.layer)
    table = {}
    for layer in sorted(groups):
        rows = [values for record, values in groups[layer] if not record.dense]
        if rows:
            table[str(layer)] = torch.cat(rows).mean(0).tolist()  # [calls * B, H] -> [H]
    return table


def _head_kinds(sparse: list[AttentionRecord]) -> dict[str, dict[str, float]] | None:
    records = [record for record in sparse if record.kind is not None]
    if not records:
        return None
    groups = _group(
        records, _read([record.kind for record in records if record.kind is not None]), lambda record: record.layer
    )
    shares = {}
    for layer in sorted(groups):
        temporal = torch.cat([kind.flatten() for _, kind in groups[layer]]).mean().item()
        shares[str(layer)] = {"spatial": 1 - temporal, "temporal": temporal}
    return shares


def _map(records: list[AttentionRecord], values: list[Tensor]) -> dict[str, Any] | None:
    """Values [B, H] of calls as one table over all steps, layers and heads."""
    if not values:
        return None
    cells = _group(records, values, lambda record: (record.step, record.layer))
    steps, layers = (sorted({index[axis] for index in cells}) for axis in (0, 1))
    return {
        "steps": steps,
        "layers": layers,
        "heads": values[0].shape[1],
        "values": [[_head_means(cells.get((step, layer))) for layer in layers] for step in steps],
    }


def _head_means(rows: list[tuple[AttentionRecord, Tensor]] | None) -> list[float] | None:
    if rows is None:
        return None
    means = torch.cat([values for _, values in rows]).mean(0)  # [calls * B, H] -> [H]
    return [round(value, 4) for value in means.tolist()]


def _kinds_map(records: list[AttentionRecord]) -> dict[str, Any] | None:
    sparse = [record for record in records if record.kind is not None and not record.dense]
    return _map(sparse, _read([record.kind for record in sparse if record.kind is not None]))


def _seconds(records: list[AttentionRecord]) -> dict[str, float] | None:
    timed = [(record.dense, record.timer.seconds()) for record in records if record.timer is not None]
    if not timed:
        return None
    dense = sum(seconds for is_dense, seconds in timed if is_dense)
    sparse = sum(seconds for is_dense, seconds in timed if not is_dense)
    return {"total": dense + sparse, "dense": dense, "sparse": sparse}


def _quantized(records: list[AttentionRecord], safer: dict[int, int]) -> dict[str, Any] | None:
    quantised = [record for record in records if record.precision is not None]
    if not quantised:
        return None
    groups = _group(quantised, quantised, lambda record: record.precision)
    return {
        "precisions": {
            name: {"calls": len(rows), "emulated": any(record.emulated for record, _ in rows)}
            for name, rows in groups.items()
        },
        "safer": {str(layer): count for layer, count in sorted(safer.items())},
        "guard": _guard([record for record in quantised if record.guarded is not None]),
    }


def _guard(records: list[AttentionRecord]) -> dict[str, Any] | None:
    if not records:
        return None
    outcomes = [record.guarded for record in records if record.guarded is not None]
    failed = [values != 0 for values in _read([outcome.failed for outcome in outcomes])]
    cosines = _read([outcome.cosine for outcome in outcomes if outcome.cosine is not None])
    per_layer = {
        str(layer): sum(int(values.sum()) for _, values in rows)
        for layer, rows in sorted(_group(records, failed, lambda record: record.layer).items())
    }
    return {
        "head_calls": sum(values.numel() for values in failed),
        "recomputed": sum(per_layer.values()),
        "probed_calls": len(cosines),
        "least_cosine": min((cosine.item() for cosine in cosines), default=None),
        "per_layer": {layer: count for layer, count in per_layer.items() if count},
    }
