"""What a machine without ffmpeg or LPIPS left undone, done from the frames it kept: videos and numbers, no generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svg.eval.compare import compare
from svg.eval.files import to_json, write_json
from svg.eval.page.sweep import load_sweep
from svg.eval.video import ffmpeg_is_there, write_video

from ..documents import read_json
from .cell import VERSION
from .journal import Journal
from .run import NO_FFMPEG, now, read_frames


def finish(out: str | Path, lpips: str | None, device: Any) -> dict[str, Any]:
    """Write missing videos, take missing LPIPS and VMAF where raw frames were kept, and write sweep.json anew.

    Args:
        out: folder of a sweep.
        lpips: "alex", "vgg" or "none"; None: what the sweep was asked for.
        device: where to measure.

    Returns:
        sweep.json.

    Raises:
        ValueError: there is no sweep, or no ffmpeg.
        JournalError: the folder is in use, or its journal has another version.
    """
    out = Path(out)
    if not (out / "sweep.json").is_file():
        raise ValueError(f"--out must be the folder of a sweep, got {out} without sweep.json")
    if not ffmpeg_is_there():
        raise ValueError("ffmpeg is missing: pip install imageio-ffmpeg")
    try:
        summary = read_json(out / "sweep.json")
        load_sweep(summary, out)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{out / 'sweep.json'} must be as svg wrote it: {error}; run the sweep again") from error
    summary["lpips"] = lpips or summary["lpips"]
    journal = Journal(out, VERSION)
    with journal.locked():
        (out / "videos").mkdir(exist_ok=True)
        records, _ = journal.read()
        for entry in summary["cells"]:
            record = records.get(entry["id"], {"status": "pending"})
            if record["status"] != "finished" or record["frames"] is None:
                continue
            reference = records.get(entry["reference"], {"frames": None})
            changed = {**_video(out, entry, record), **_quality(out, record, reference, summary["lpips"], device)}
            if changed:
                record = {**record, **changed}
                journal.write(entry["id"], record, [record["video"], record["frames"]])
                entry.update(changed)
        summary["notes"] = [note for note in summary["notes"] if note != NO_FFMPEG]
        write_json(out / "sweep.json", {**summary, "updated": now()})
    return summary


def _video(out: Path, entry: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    if record["video"] is not None:
        return {}
    path = f"videos/{entry['id']}.mp4"
    write_video(out / path, *read_frames(out / record["frames"]))
    return {"video": path}


def _quality(out: Path, record: dict[str, Any], reference: dict[str, Any], lpips: str, device: Any) -> dict[str, Any]:
    """All metrics again where one is missing or of another network, and both videos' frames are there."""
    quality = record["quality"]
    if quality is None or reference["frames"] is None:
        return {}
    other = lpips != "none" and (quality["lpips"]["mean"] is None or quality["lpips"]["net"] != lpips)
    if not other and quality["vmaf"]["mean"] is not None:
        return {}
    before, after = (read_frames(out / path)[0] for path in (reference["frames"], record["frames"]))
    return {"quality": to_json(compare(before, after, lpips, device))}
