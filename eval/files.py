"""Files that appear whole or not at all, and JSON that stays valid."""

import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

_NUMBERS = re.compile(r'\[\n(?:\s+(?:-?[\d.e+-]+|null|"-?inf"),?\n)+\s+\]')


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
    """Write `value` as indented JSON, atomically, lists of numbers on one line; infinities become "inf" and "-inf"."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False)
    text = _NUMBERS.sub(lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n")


@contextmanager
def result_folder(out, names, force=False):
    """Give a hidden temporary folder whose files appear in `out` together, when the block ends without an error.

    The temporary folder is made in the nearest existing folder above `out`, so a place that cannot be written to is
    found out before any work is done, and an error or an interrupt leaves nothing behind.

    Args:
        out: the folder to fill; it may exist, other files in it are left alone.
        names: every file name a run may write, in the order of appearance; the last one marks a complete run.
        force: replace the results of an earlier run.

    Yields:
        Path of the temporary folder.

    Raises:
        ValueError: `out` is not a folder, holds results and force is off, or cannot be written to.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}: choose another name")
    found = [name for name in names if (out / name).exists()]
    if found and not force:
        raise ValueError(
            f"out must hold no earlier results, got {out} with {', '.join(found)}: "
            "choose another folder or pass --force"
        )
    partial = _make_partial(out)
    try:
        yield partial
        _publish(partial, out, names)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_partial(out):
    anchor = next(folder for folder in (out, *out.parents) if folder.exists())
    partial = anchor / f".{out.name}.{os.getpid()}.part"
    try:
        partial.mkdir()
    except OSError as error:
        raise ValueError(f"out must be writable, got {out} ({error.strerror}): choose another folder") from error
    return partial


def _publish(partial, out, names):
    out.mkdir(parents=True, exist_ok=True)
    (out / names[-1]).unlink(missing_ok=True)  # an interrupted replacement must not look complete
    for name in names:
        if (partial / name).exists():
            (partial / name).replace(out / name)
        else:
            (out / name).unlink(missing_ok=True)
