"""The folder of one `svg generate`."""

from .cells import cell, check_blocks, method_label, page_data

_BLOCKS = dict.fromkeys(("generation", "model", "device", "versions", "runs", "quality"), dict)
_BLOCKS |= {"command": str, "notes": list}


def load_run(report, folder):
    """Read a report.json.

    Args:
        report: its content.
        folder: where it and the videos lie.

    Returns:
        dict of `page_data`: dense, accelerated and control as cells, those that were run.
    """
    check_blocks(report, _BLOCKS)
    cells = [_cell(name, report, folder) for name in ("dense", "accelerated", "control") if name in report["runs"]]
    return page_data(
        kind="run",
        title=report["generation"]["prompt"],
        cells=cells,
        notes=report["notes"],
        command=report["command"],
        versions=report["versions"],
    )


def _cell(name, report, folder):
    run, compared = report["runs"][name], "dense" in report["runs"]
    return cell(
        folder=folder,
        id=name,
        role=name,
        status="finished",
        label=_label(name, run),
        reference="dense" if compared and name != "dense" else None,
        control="control" if "control" in report["runs"] and name != "control" else None,
        command=report["command"],
        error=None,
        seconds=run["seconds"],
        density=report["density"] if name == "accelerated" else {"all_calls": 1.0, "sparse_calls": None},
        method=run["config"],
        generation=report["generation"],
        quality=report["quality"].get(name),
        video=f"{name}.mp4",
        transformers=run["transformers"],
        device=report["device"],
        model=report["model"]["name"],
        dtype=report["model"]["dtype"],
    )


def _label(name, run):
    if name == "accelerated":
        return method_label(run["config"])
    return f"{name} ({run['config']['dense_backend']})"
