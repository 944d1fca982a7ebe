"""What tuned settings were tuned on, and tables of one budget a head."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


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
            raise TypeError(f"tokens must be three integers (frames, height, width), got {self.tokens!r}")
        object.__setattr__(self, "tokens", tokens)
        for name in ("model", "device"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {getattr(self, name)!r}")


def check_head_table(config: Any) -> None:
    """Check per-head budgets and what they are tuned for; lists become tuples, a mapping becomes TunedFor."""
    table, name = getattr(config, config.head_field), config.head_field
    if isinstance(config.tuned_for, dict):
        object.__setattr__(config, "tuned_for", _tuned_for(config.tuned_for))
    elif not isinstance(config.tuned_for, (TunedFor, type(None))):
        raise TypeError(f"tuned_for must be keys and values, or none, got {config.tuned_for!r}")
    if table is None:
        return
    if not isinstance(table, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in table):
        raise TypeError(f"{name} must be [layers][heads], got {table!r}")
    if not table or not table[0] or len({len(row) for row in table}) > 1:
        raise ValueError(f"{name} must have the same heads in every layer, got {[len(row) for row in table]}")
    for layer, row in enumerate(table):
        for head, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must hold numbers, got {value!r} in layer {layer}, head {head}")
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value} in layer {layer}, head {head}")
    object.__setattr__(config, name, tuple(tuple(float(value) for value in row) for row in table))


def _tuned_for(values: dict[str, Any]) -> TunedFor:
    choices = [field.name for field in fields(TunedFor)]
    if set(values) != set(choices):
        raise ValueError(f"tuned_for must have the keys {', '.join(choices)}, got {', '.join(map(str, values))}")
    return TunedFor(**values)
