"""`svg sparge-tune`: SpargeAttn's thresholds of every head, found on recorded q, k, v, layer by layer, resumable."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svg.eval.files import atomic_path, check_outputs
from svg.pipelines.fingerprint import file_sha256

from ..config import SpargeConfig
from ..methods.sparge.thresholds_file import Thresholds, read_about, read_layers, save_thresholds
from . import sparge_fit
from .record import RecordedCall, Recording, open_recording
from .sparge_fit import MIN_SPARSITY, Call, Sampling

Key = tuple[str, int]  # transformer, layer


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far outputs may move.

    Args:
        l1: relative L1 of the output by the selection, in (0, 1).
        l2: relative L1 by selection and filter of P V together, in [l1, 1).

    Raises:
        ValueError: a value is outside its range.
    """

    l1: float = 0.07
    l2: float = 0.08

    def __post_init__(self):
        if not 0 < self.l1 < 1:
            raise ValueError(f"l1 must be in (0, 1), got {self.l1}: 0.07 is the paper's for Wan and HunyuanVideo")
        if not self.l1 <= self.l2 < 1:
            raise ValueError(
                f"l2 must be in [l1, 1) = [{self.l1}, 1), got {self.l2}: it counts the selection's error too"
            )


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """What was found for one layer.

    Args:
        thresholds: of its heads.
        density: of each head, mean over the calls.
        pv_share: share of the selected P V that each head's filter leaves.
        seconds: how long it took.
    """

    thresholds: Thresholds
    density: list[float]
    pv_share: list[float]
    seconds: float


def tune(
    paths: list[str | Path],
    out: str | Path,
    config: SpargeConfig,
    bounds: Bounds,
    sampling: Sampling,
    device: torch.device,
    *,
    force: bool = False,
    on_call: Callable[[Key, int, int], None] = lambda key, done, total: None,
    on_layer: Callable[[Key, LayerFit], None] = lambda key, fit: None,
) -> dict[Key, LayerFit]:
    """Find the thresholds of every layer in some recordings, and write the file after each layer.

    Args:
        paths: files of `svg record`, of one model; each may hold other layers, steps or prompts.
        out: the file; layers that it has are not looked for again.
        config: order and attention_sink are used.
        bounds: how far outputs may move.
        sampling: how much of each head is looked at.
        device: where to compute.
        force: start over, whatever the file holds.
        on_call: told the layer, and how many of how many looks at recorded calls are done.
        on_layer: told what was found for a layer.

    Returns:
        What was found now, without the layers that the file had.

    Raises:
        ValueError: no such recording, recordings of two models, a file made with other settings, or one that has a layer of
            theirs from other recordings.
    """
    recordings = [open_recording(path) for path in paths]
    groups = _by_layer(recordings)
    about = _about(recordings, config, bounds, sampling)
    out = Path(out)
    check_outputs({"out": out}, paths)
    layers = _earlier(out, about) if out.exists() and not force else {}
    about["layers"] = read_about(out)["layers"] if layers else {}
    marks = {recording.path: file_sha256(recording.path) for recording in recordings}
    sources = {key: sorted({marks[recording.path] for recording, _ in calls}) for key, calls in groups.items()}
    _check_sources(out, about["layers"], sources)
    todo = {key: calls for key, calls in groups.items() if key not in layers}
    total = 2 * sum(map(len, todo.values()))
    found: dict[Key, LayerFit] = {}
    done = 0
    for key, calls in todo.items():

        def looked(key=key):
            nonlocal done
            done += 1
            on_call(key, done, total)

        fit = fit_layer(calls, config, bounds, sampling, device, looked)
        found[key], layers[key] = fit, fit.thresholds
        found_with = {"density": fit.density, "pv_share": fit.pv_share, "recordings": sources[key]}
        about["layers"][f"{key[0]}.{key[1]}"] = found_with
        with atomic_path(out) as partial:
            save_thresholds(partial, layers, about)
        on_layer(key, fit)
    return found


def fit_layer(
    calls: list[tuple[Recording, RecordedCall]],
    config: SpargeConfig,
    bounds: Bounds,
    sampling: Sampling,
    device: torch.device,
    looked: Callable[[], None],
) -> LayerFit:
    """Thresholds of one layer: first simthresh and cdf, then pv_threshold; every bound holds in every call.

    Args:
        calls: recorded calls of the layer.
        config, bounds, sampling, device: as `tune` takes them.
        looked: called after each look at a call, two a call.

    Returns:
        What was found.
    """
    start = time.perf_counter()
    curves = defaultdict(list)
    for call in _prepared(calls, config, sampling, device, looked):
        for head in range(call.q.shape[0]):
            curves[head].append(sparge_fit.selection_curves(call, head, sampling))
    chosen = [sparge_fit.fit_selection(curves[head], bounds.l1) for head in sorted(curves)]
    sparse = [head for head, (_, _, density) in enumerate(chosen) if 1 - density >= MIN_SPARSITY]
    curves.clear()
    for call in _prepared(calls, config, sampling, device, looked):
        for head in sparse:
            curves[head].append(sparge_fit.filter_curves(call, head, sampling, *chosen[head][:2]))
    heads, density, shares = [sparge_fit.dense_head()] * len(chosen), [1.0] * len(chosen), [1.0] * len(chosen)
    for head in sparse:
        limit, shares[head] = sparge_fit.fit_filter(curves[head], bounds.l2)
        simthresh, cdf, density[head] = chosen[head]
        heads[head] = (simthresh, cdf, limit)
    seconds = time.perf_counter() - start
    return LayerFit(thresholds=sparge_fit.as_thresholds(heads), density=density, pv_share=shares, seconds=seconds)


def _prepared(calls, config, sampling, device, looked) -> Iterator[Call]:
    for recording, call in calls:
        q, k, v, text_mask = recording.tensors(call, device)
        yield from sparge_fit.prepare(q, k, v, call.layout, text_mask, config, sampling)
        looked()


def _by_layer(recordings: list[Recording]) -> dict[Key, list[tuple[Recording, RecordedCall]]]:
    groups = defaultdict(list)
    for recording in recordings:
        for call in recording.calls:
            groups[call.transformer, call.layer].append((recording, call))
    return dict(sorted(groups.items()))


def _about(recordings: list[Recording], config: SpargeConfig, bounds: Bounds, sampling: Sampling) -> dict[str, Any]:
    """Everything that decides the thresholds but the recorded tensors themselves."""
    models = {recording.source.get("model"): recording.path for recording in recordings}
    if len(models) > 1:
        found = ", ".join(f"{path} of {model}" for model, path in sorted(models.items(), key=str))
        raise ValueError(f"recordings must be of one model, got {found}")
    return {
        "model": next(iter(models)),
        "order": config.order,
        "attention_sink": config.attention_sink,
        **dataclasses.asdict(bounds),
        **dataclasses.asdict(sampling),
    }


def _check_sources(out: Path, known: dict[str, Any], sources: dict[Key, list[str]]) -> None:
    """Refuse to keep a layer's thresholds that were found on other recordings than the given ones."""
    for (name, layer), marks in sources.items():
        before = known.get(f"{name}.{layer}")
        if before is not None and (not isinstance(before, dict) or before.get("recordings") != marks):
            raise ValueError(
                f"recordings must be those that {out} has {name} {layer} of, got others: give another --out, or --force to "
                "start over"
            )


def _earlier(out: Path, about: dict[str, Any]) -> dict[Key, Thresholds]:
    """The layers that the file has, found with the same settings."""
    before = read_about(out)
    for name, value in about.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name} must be {before.get(name)!r} as in {out}, got {value!r}: give another --out, or --force to start over"
            )
    return read_layers(out)
