"""The folder of a `svg sweep`, finished or still running."""

from .cells import cell, check_blocks, page_data

VERSION = 1
_BLOCKS = {"cells": list, "counts": dict, "notes": list, "versions": dict, "command": str, "state": str}


def load_sweep(sweep, folder):
    """Read a sweep.json, see docs/sweep-format.md.

    Args:
        sweep: its content.
        folder: what the paths in it are relative to.

    Returns:
        dict of `page_data`.

    Raises:
        ValueError: another format version.
    """
    if sweep.get("format") != "svg-sweep" or sweep.get("version") != VERSION:
        found = f"{sweep.get('format')!r} version {sweep.get('version')!r}"
        raise ValueError(f"sweep.json must be 'svg-sweep' version {VERSION}, got {found}: use the svg that wrote it")
    check_blocks(sweep, _BLOCKS)
    return page_data(
        kind="sweep",
        title=_title(sweep),
        cells=[load_cell(item, folder) for item in sweep["cells"]],
        notes=[*_counts(sweep), *sweep["notes"]],
        state=sweep["state"],
        command=sweep["command"],
        versions=sweep["versions"],
    )


def _title(sweep):
    models = dict.fromkeys(item["model"]["name"] for item in sweep["cells"])
    return f"Sweep of {', '.join(models)}"


def _counts(sweep):
    counts = sweep["counts"]
    if counts["failed"]:
        yield f"{counts['failed']} of {counts['total']} cells failed: the table says why"
    if counts["pending"]:
        yield f"{counts['pending']} of {counts['total']} cells are still to come: build the page again to see them"


def load_cell(item, folder):
    """One cell of a sweep.json.

    Args:
        item: its entry.
        folder: what the paths in it are relative to.

    Returns:
        dict of `svg.eval.page.cells.cell`.
    """
    peer, finished = item["run"].get("peer"), item["status"] == "finished"
    method = item["method"] if peer is None else {"method": peer}
    error = item.get("error")
    return cell(
        folder=folder,
        **{key: item[key] for key in ("id", "role", "status", "label", "reference", "control")},
        command=item["reproduce"],
        error=f"{error['type']}: {error['message']}" if error else None,
        seconds=item["seconds"] if finished else None,
        density=item["density"] if finished else None,
        method=method,
        generation=item["generation"],
        quality=item["quality"] if finished else None,
        video=item["video"] if finished else None,
        transformers=item["transformers"] if finished else None,
        device=item["device"] if finished else {"type": item["run"]["device"]},
        model=item["model"]["name"],
        dtype=item["run"]["dtype"],
    )
