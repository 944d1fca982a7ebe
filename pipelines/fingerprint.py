"""Which weights a model's directory holds, without reading gigabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .model_files import locate_model

_SAMPLE = 2**20


def fingerprint(model: str) -> str | None:
    """Tell one state of a model's directory from another, without reading gigabytes.

    Args:
        model: hub id, directory or "tiny-wan".

    Returns:
        16 hexadecimal digits over every JSON file and over name, size, first and last MiB of every weights file; None for
        a hub id, whose revision is the hub's business.

    Raises:
        ValueError: there is no such model.
    """
    folder = locate_model(model)
    if not isinstance(folder, Path):
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".safetensors"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
