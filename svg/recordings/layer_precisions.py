"""`svg adapt`: a precision for every layer, the fastest whose output is close enough on recorded q, k, v."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svg.eval.files import check_outputs, write_json
from svg.kernels.quantize.precision import default_precision

from ..config import METHODS, Sage2Config, config_from_dict
from ..methods.dense import key_mask
from ..methods.sage.layers_file import layers_content
from ..methods.sage.precision import quantised, safer
from .record import RecordedCall, open_recording
from .sweep import dense_rows


def adapt(
    recording: str | Path,
    method: str,
    settings: dict[str, Any],
    min_cosine: float,
    device: torch.device,
    out: str | Path,
) -> dict[str, Any]:
    """Measure every precision of a method on a recording, choose one a layer, and write the file.

    Args:
        recording: a file of `svg record`; every layer must be in it.
        method: "sage2", "sage2++" or "sage3".
        settings: fields of its config.
        min_cosine: least cosine similarity to unquantised attention, over all heads of a layer, in every recorded call.
        device: where to compute; precisions that it has no units for are emulated.
        out: the file to write.

    Returns:
        What was written.

    Raises:
        ValueError: no such recording, an unknown method or setting, min_cosine outside (0, 1], no precision is needed, or
            `out` is the recording or cannot be written to.
        TypeError: a setting has the wrong type.
        OSError: the file cannot be written.
    """
    choices = {name: one for name, one in METHODS.items() if issubclass(one, Sage2Config)}
    if method not in choices:
        raise ValueError(f"method must be one of {', '.join(choices)}, got {method!r}")
    if "layers" in settings:
        raise ValueError(f"layers must be left out, got {settings['layers']!r}: `svg adapt` makes such a file")
    config = config_from_dict({**settings, "method": method})
    assert isinstance(config, Sage2Config)
    if not 0 < min_cosine <= 1:
        raise ValueError(f"min_cosine must be in (0, 1], got {min_cosine}")
    opened = open_recording(recording)
    check_outputs({"out": out}, [recording])
    measured: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for call in opened.calls:
        measured[call.transformer][call.layer].append(cosines(config, call, *opened.tensors(call, device)))
    _check_complete(opened.calls)
    content = layers_content(
        {
            name: {layer: choose(calls, min_cosine) for layer, calls in layers.items()}
            for name, layers in measured.items()
        },
        {"method": method, "settings": settings, "min_cosine": min_cosine, "source": opened.source},
    )
    write_json(out, content)
    return content


def cosines(
    config: Sage2Config, call: RecordedCall, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None
) -> dict[str, float]:
    """Cosine similarity to unquantised attention of every precision that may be chosen, fastest first.

    Args:
        config: the method's settings.
        call: which call it is.
        q, k, v: float [B, H, S, D].
        text_mask: bool [B, text_tokens], or None.
    """
    visible = key_mask(call.layout, text_mask)
    exact, _ = dense_rows(q, k, v, visible)
    precision = default_precision(q.device) if config.precision == "auto" else config.precision
    found = {}
    while precision != "native":
        out = quantised(precision, config, q, k, v, visible)(None)
        found[precision] = torch.nn.functional.cosine_similarity(out.float().flatten(), exact.flatten(), dim=0).item()
        precision = safer(precision)
    return found


def choose(calls: list[dict[str, float]], min_cosine: float) -> dict[str, Any]:
    """The fastest precision that is close enough in every call.

    Args:
        calls: of `cosines`.
        min_cosine: least cosine similarity.

    Returns:
        {"precision": its name or "native", "cosine": {name: least of the calls}}.
    """
    least = {name: min(call[name] for call in calls) for name in calls[0]}
    return {
        "precision": next((name for name, value in least.items() if value >= min_cosine), "native"),
        "cosine": least,
    }


def _check_complete(calls: list[RecordedCall]) -> None:
    for name in {call.transformer for call in calls}:
        own = [call for call in calls if call.transformer == name]
        missing = sorted(set(range(own[0].num_layers)) - {call.layer for call in own})
        if missing:
            raise ValueError(
                f"the recording must hold every layer, {name} lacks {missing}: record it without --record-layers"
            )
