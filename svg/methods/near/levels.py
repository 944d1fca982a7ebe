"""The words for how much `near` may change a video: settings that are put over its defaults, or over a preset's."""

from __future__ import annotations

from typing import Any

from ...documents import shown

LEVELS = ("quality", "balanced", "fast")
_FAST = {"warmup_steps": 0.1, "warmup_layers": 0.0, "residual": 0.0, "refresh": 2, "first_iterations": 8}
_IN_8_BITS = {"precision": "int8-fp8", "warmup_precision": "int8-fp8", "linears": "all"}


def level_settings(level: str, fp8: bool) -> dict[str, Any]:
    """What a word changes.

    Args:
        level: "quality" (two fifths of the attention), "balanced" (nothing: a quarter), or "fast": a quarter after half as
            many dense steps, in all layers, each choice for two steps; where the device has FP8, all attention and the sparse
            steps' linears are in 8 bits.
        fp8: whether the device computes in FP8, which 8 bits are faster with.

    Returns:
        Fields of NearConfig.

    Raises:
        ValueError: another word.

    Example:
        svg.NearConfig(**level_settings("fast", fp8=True))
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {shown(level)}")
    if level == "quality":
        return {"budget": 0.4}
    if level == "balanced":
        return {}
    return _FAST | (_IN_8_BITS if fp8 else {})
