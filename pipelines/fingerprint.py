"""Which weights a model's directory holds."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

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
    found, pending = [], [(folder, (os.path.realpath(folder),))]
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
