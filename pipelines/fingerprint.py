"""Which weights a model's directory holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from svg.config import MethodConfig

from .model_files import locate_model


def fingerprint(model: str) -> str | None:
    """Tell one state of a model's directory from another: every file is read whole, linked folders too.

    Within a process a file is read once, unless its size, times or inode change.

    Args:
        model: hub id, directory or "tiny-wan".

    Returns:
        16 hexadecimal digits over name and content of every file but hidden ones; None for a hub id, whose revision is the
        hub's business.

    Raises:
        ValueError: there is no such model.
    """
    folder = locate_model(model)
    if not isinstance(folder, Path):
        return None
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def check_weights(pipe: Any, config: MethodConfig) -> None:
    """Refuse tuned settings for a pipeline that was loaded from other weights, where the pipeline knows from which.

    Args:
        pipe: a Diffusers pipeline; a transformer by itself, or a pipeline put together by hand, does not know.
        config: a method's settings.

    Raises:
        ValueError: the settings were tuned for another model.
    """
    tuned = getattr(config, "tuned_for", None)
    settings = getattr(pipe, "config", None)
    source = str(settings.get("_name_or_path") or "") if isinstance(settings, Mapping) else ""
    if tuned is None or not source:
        return
    found = fingerprint(source) if os.path.isdir(source) else None
    same = tuned.model == source if found is None else tuned.fingerprint == found
    if not same and not (found is not None and tuned.fingerprint is None):  # a hub id's files may lie anywhere
        raise ValueError(
            f"config must be tuned for this pipeline's weights, {source} ({found}), got settings tuned for {tuned.model} "
            f"({tuned.fingerprint}): run `svg tune` for this model, or take them all the same with tuned_for=None"
        )


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a whole file; it is read again only where its size, times or inode changed.

    Raises:
        OSError: it cannot be read.
    """
    path = os.path.realpath(path)
    status = os.stat(path)
    return _sha256(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: str, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    """Files below a folder, by links too, none twice on its way down and no hidden ones."""
    found: list[Path] = []
    pending: list[tuple[Path, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
    while pending:
        place, above = pending.pop()
        for path in place.iterdir():
            real = os.path.realpath(path)
            if path.name.startswith("."):
                continue
            if path.is_dir() and real not in above:
                pending.append((path, (*above, real)))
            elif path.is_file():
                found.append(path)
    return sorted(found)
