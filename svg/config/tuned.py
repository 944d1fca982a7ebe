"""What tuned settings were tuned on, and tables of one budget a head."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..documents import shown


@dataclass(frozen=True, kw_only=True)
class TunedFor:
    """What settings were tuned on; they are refused elsewhere.

    Args:
        model: hub id, directory or name of the model.
        fingerprint: of its weights, or None for a hub id.
        tokens: frames, height and width of the latent video grid, in tokens.
        device: name of the GPU, or "cpu".

    Raises:
        TypeError: a value has the wrong type.
    """

    model: str
    fingerprint: str | None
    tokens: tuple[int, int, int]
    device: str

    def __post_init__(self):
        tokens = tuple(self.tokens) if isinstance(self.tokens, (list, tuple)) else ()
        if len(tokens) != 3 or any(isinstance(n, bool) or not isinstance(n, int) for n in tokens):
            raise TypeError(f"tokens must be three integers (frames, height, width), got {shown(self.tokens)}")
        object.__setattr__(self, "tokens", tokens)
        for name in ("model", "device"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {shown(getattr(self, name))}")


def check_head_table(config: Any) -> None:
    """Check per-head budgets and what they are tuned for; lists become tuples, a mapping becomes TunedFor."""
    table, name = getattr(config, config.head_field), config.head_field
    if isinstance(config.tuned_for, dict):
        object.__setattr__(config, "tuned_for", _tuned_for(config.tuned_for))
    elif not isinstance(config.tuned_for, (TunedFor, type(None))):
        raise TypeError(f"tuned_for must be keys and values, or none, got {shown(config.tuned_for)}")
    if table is None:
        return
    if not isinstance(table, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in table):
        raise TypeError(f"{name} must be [layers][heads], got {shown(table)}")
    if not table or not table[0] or len({len(row) for row in table}) > 1:
        raise ValueError(f"{name} must have the same heads in every layer, got {[len(row) for row in table]}")
    for layer, row in enumerate(table):
        for head, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must hold numbers, got {shown(value)} in layer {layer}, head {head}")
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value} in layer {layer}, head {head}")
    object.__setattr__(config, name, tuple(tuple(float(value) for value in row) for row in table))


def _tuned_for(values: dict[str, Any]) -> TunedFor:
    choices = [field.name for field in fields(TunedFor)]
    if set(values) != set(choices):
        raise ValueError(f"tuned_for must have the keys {', '.join(choices)}, got {', '.join(map(str, values))}")
    return TunedFor(**values)


def check_tuned(
    config: Any, transformer: str, layers: int, heads: int, grid: tuple[int, int, int], device: str
) -> None:
    """Refuse per-head budgets of another shape, and tuned settings on another token grid or device.

    Args:
        config: a method's settings.
        transformer: its name in the pipeline.
        layers, heads: of the transformer.
        grid: frames, height and width of the latent video, in tokens.
        device: name of the GPU, or "cpu".

    Raises:
        ValueError: saying what they are for, and the way out.
    """
    way_out = "run `svg tune` for this one, or take them all the same with tuned_for=null"
    table = getattr(config, config.head_field) if config.head_field else None
    if table is not None and (len(table), len(table[0])) != (layers, heads):
        raise ValueError(
            f"{config.head_field} must be [layers][heads] = [{layers}][{heads}] in {transformer}, "
            f"got [{len(table)}][{len(table[0])}]: it was made for another model"
        )
    tuned = getattr(config, "tuned_for", None)
    if tuned is None:
        return
    if tuned.tokens != grid:
        wanted, got = ("x".join(map(str, n)) for n in (tuned.tokens, grid))
        raise ValueError(
            f"these settings must run on the token grid they were tuned for, {wanted}, got {got}: {way_out}"
        )
    if tuned.device != device:
        raise ValueError(
            f"these settings must run on the device they were tuned for, {tuned.device}, got {device}: {way_out}"
        )
