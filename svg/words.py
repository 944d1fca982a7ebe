"""Words that the terminal, summaries and pages share."""

from __future__ import annotations


def speed(factor: float | None) -> str:
    """How much faster than dense something is, or slower, as report pages say it too.

    Args:
        factor: dense seconds over its own, > 0; None where it is not known.

    Returns:
        Such as "3.10x faster", "2.27x slower" or "-".
    """
    if factor is None:
        return "-"
    return f"{factor:.2f}x faster" if factor >= 1 else f"{1 / factor:.2f}x slower"
