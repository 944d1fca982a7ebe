"""Which versions are installed, whether they are new enough, and what of this machine stays out of reports."""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

NEEDED = {"torch": (2, 11), "diffusers": (0, 42)}
NEEDED_PYTHON = (3, 11)
SHOWN = ("svg-video", "torch", "triton", "diffusers", "transformers", "accelerate", "lpips", "imageio-ffmpeg", "numpy")


def versions() -> dict[str, str | None]:
    """Installed versions by distribution, None for what is missing; read from metadata, nothing is imported."""
    return {"python": platform.python_version(), **{name: _version(name) for name in SHOWN}}


def version_problems() -> list[str]:
    """One line for each version that is missing or too old, each with the way out."""
    problems = []
    if sys.version_info < NEEDED_PYTHON:
        problems.append(f"python must be {_dotted(NEEDED_PYTHON)} or newer, got {platform.python_version()}")
    for name, needed in NEEDED.items():
        found = _version(name)
        if found is None or _numbers(found) < needed:
            problems.append(
                f"{name} must be {_dotted(needed)} or newer, got {found or 'none'}: "
                f"pip install --upgrade '{name}>={_dotted(needed)}'"
            )
    return problems


def anonymous(text: str) -> str:
    """A failure's text for a report: without the names of this machine, its user, and the folders it has things in."""
    home = str(Path.home())
    places = {
        sys.prefix: "",
        sys.base_prefix: "",
        str(Path(__file__).parents[1]): "",
        tempfile.gettempdir(): "",
        home: "~",
    }
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, places[place])
    text = re.sub(r"\(?\bpid=\d+[^)]*\)?", "", text)  # how Ray says where a worker was
    for name in {platform.node(), Path.home().name} - {"", "root", "localhost"}:
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", "-", text)
    return text


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
