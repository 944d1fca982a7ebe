"""Puts data, style and scripts into one HTML file that asks the network for nothing."""

import base64
import hashlib
import html
import json
import os
from importlib import resources
from pathlib import Path

from svg.documents import read_json

from ..files import atomic_path
from .measured import load_recorded, load_rows, load_tune
from .run import load_run
from .sweep import load_sweep

PAGE = "report.html"
SCRIPTS = ("core", "families", "chart", "pareto", "table", "player", "heatmap", "bars", "recorded", "tune", "main")
FOLDERS = (("sweep.json", load_sweep), ("report.json", load_run), ("recorded.json", load_recorded))
EXTRAS = (("recorded", load_rows), ("tune", load_tune))  # <name>.json beside them, shown in parts of their own


def build_page(folder):
    """Write the report page of a run or a sweep into its folder.

    Args:
        folder: what `svg generate`, `svg sweep` or `svg tune` wrote; the page plays the videos in it.

    Returns:
        Path of the page, folder/report.html; an earlier page is replaced.

    Raises:
        ValueError: the folder holds no report.json, sweep.json or recorded.json, or a damaged one.
        FileNotFoundError: there is no such folder.
    """
    path = Path(folder) / PAGE
    text = render(load_page_data(folder))
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def load_page_data(folder):
    """Read a result folder into the one form that page and plots share.

    Args:
        folder: of a run (report.json), a sweep (sweep.json, and tune.json after `svg tune`), or recorded inputs
            (recorded.json).

    Returns:
        dict, see `svg.eval.page.cells.page_data`; with "recorded" and "tune", see `svg.eval.page.measured`, if there.

    Raises:
        ValueError, FileNotFoundError: as build_page.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # which a name that is too long is not either
        raise FileNotFoundError(f"no folder at {folder}")
    there = [(folder / name, load) for name, load in FOLDERS if (folder / name).is_file()]
    if not there:
        names = "report.json (svg generate), sweep.json (svg sweep, svg tune) or recorded.json (svg sweep --recorded)"
        raise ValueError(f"folder must hold {names}, got {folder}")
    data = _load(*there[0])
    for name, load in EXTRAS:
        path = folder / f"{name}.json"
        data[name] = _load(path, load) if path.is_file() else None
    if data["tune"]:
        data["title"] = data["tune"].pop("title")
    return data


def _load(path, load):
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} must be JSON as svg wrote it, got: {error}. Run the command again") from error
    try:
        return load(content, path.parent)
    except (KeyError, TypeError, AttributeError, LookupError, StopIteration, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} must be as this version of svg writes it, got {reason}. Run it again") from error


def render(data):
    """The page as text.

    Args:
        data: see load_page_data. Its texts are not trusted: a prompt may hold any character.

    Returns:
        HTML whose content security policy allows only the scripts that ship with this package.
    """
    scripts = [_asset(f"{name}.js") for name in SCRIPTS]
    fields = {
        "title": html.escape(data["title"]),
        "policy": _policy(scripts),
        "style": _asset("page.css"),
        "data": _embed(data),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    parts = _asset("page.html").split("@@")  # text, name, text, name, ..., text
    return "".join(fields[part] if index % 2 else part for index, part in enumerate(parts))


def _embed(data):
    """JSON that cannot end its script element, whatever a text in it says."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts):
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return f"default-src 'none'; img-src data:; media-src 'self' file:; style-src 'unsafe-inline'; script-src {allowed}"


def _asset(name):
    return (resources.files("svg.eval.page") / name).read_text(encoding="utf-8")
