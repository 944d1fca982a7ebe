"""Text and JSON from strangers: plain files of bounded length, and words for everything else."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20
_SHOWN = 100


def read_text(path: str | Path, most: int) -> str:
    """Read a text file, whatever lies at its place.

    Args:
        path: the file.
        most: bytes it may have.

    Returns:
        Its text.

    Raises:
        ValueError: it is no plain file (a folder, a pipe, a device), longer than `most`, or not UTF-8.
        OSError: it is not there or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would wait for one
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} must be a plain file, got a folder, a pipe or a device")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(most + 1)
    finally:
        os.close(descriptor)
    if len(data) > most:
        raise ValueError(f"{path} must have at most {most} bytes, got more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got {error.reason} at byte {error.start}") from error


def read_json(path: str | Path, most: int = 256 * MEBIBYTE) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        most: bytes it may have.

    Returns:
        Its content.

    Raises:
        ValueError: as `read_text`, not JSON, NaN or infinity in it, or nested too deeply.
        OSError: it is not there or cannot be read.
    """
    text = read_text(path, most)
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(text: str) -> Any:
    """Parse JSON.

    Args:
        text: the JSON.

    Returns:
        Its content.

    Raises:
        ValueError: it is not JSON (a JSONDecodeError), holds NaN, infinity or a number of thousands of digits, or is nested
            too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("JSON must not be nested as deeply as this") from error
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) or "digits" not in str(error):
            raise
        raise ValueError("JSON must not hold a number of as many digits as this") from error


def shown(value: Any) -> str:
    """A value in an error message: its text, cut short."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _refuse(name: str) -> None:
    raise ValueError(f"JSON must not hold {name}")


def read_header(path: str | Path, kind: str, form: tuple[str, str], remedy: str) -> dict[str, str]:
    """Metadata of a safetensors file of ours, which needs no tensor of it.

    Args:
        path: the file.
        kind: what it must be, such as "a recording".
        form: format and version that its metadata must name.
        remedy: how to make such a file.

    Returns:
        The metadata.

    Raises:
        ValueError: no such file, no whole safetensors file, or one of another format or version.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise ValueError(f"{kind} must be a file, got {path}, which is not there; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{kind} must be a whole safetensors file, got {path} ({error}): {remedy}") from error
    found = metadata.get("format"), metadata.get("version")
    if found != form:
        raise ValueError(
            f"{path} must be {kind} ({form[0]}, version {form[1]}), got {found[0]}, version {found[1]}: {remedy}"
        )
    return metadata
