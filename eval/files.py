"""Files that appear whole or not at all, and JSON that stays valid."""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path):
    """Give a temporary name in the same folder and move it to `path` when the block ends without an error.

    Args:
        path: where the finished file is to appear; an existing file is replaced in one step.

    Yields:
        Path to write to; it is removed if the block raises, KeyboardInterrupt included.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def to_json(value):
    """Return `value` with infinities spelled "inf" and "-inf", which JSON has no number for.

    Args:
        value: nested dicts, lists, tuples, strings, numbers, bools and None.

    Returns:
        The same nesting made of what the json module takes.

    Raises:
        ValueError: a number is NaN, which no measurement may be.
    """
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("a report must not hold NaN: some measurement failed")
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def write_json(path, value):
    """Write `value` as indented JSON, atomically; infinities become the strings "inf" and "-inf"."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n")
