"""Make the pictures of docs/ from what `svg generate` wrote.

svg generate "..." --out run-svg2 && svg generate "..." --method svg1 --out run-svg1
python scripts/tiny/pictures.py --svg2 run-svg2 --svg1 run-svg1
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from svg.eval.video import read_video

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARGIN, CAPTION = 6, 20


def film_strip(frames: np.ndarray, picks: int) -> np.ndarray:
    chosen = frames[np.linspace(0, len(frames) - 1, picks).round().astype(int)]
    gap = np.full((frames.shape[1], 3, 3), 255, np.uint8)
    return np.concatenate([part for frame in chosen for part in (frame, gap)][:-1], 1)


def draw_side_by_side(run: Path, out: Path) -> None:
    """Frames of the dense video over those of the accelerated one, each strip named with what report.json measured."""
    report = json.loads((run / "report.json").read_text())
    method = report["method"]["method"]
    rows = [("dense attention", "dense.mp4"), (f"{method}{_measured(report)}", "accelerated.mp4")]
    strips = [(label, film_strip(read_video(run / name)[0], 6)) for label, name in rows]
    h, w = strips[0][1].shape[:2]
    picture = Image.new("RGB", (w + 2 * MARGIN, len(strips) * (h + CAPTION) + CAPTION + MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    for i, (label, strip) in enumerate(strips):
        top = i * (h + CAPTION)
        pen.text((MARGIN, top + 4), label, fill="black")
        picture.paste(Image.fromarray(strip), (MARGIN, top + CAPTION))
    prompt = report["generation"]["prompt"]
    pen.text((MARGIN, picture.height - CAPTION), textwrap.shorten(prompt, 150), fill=(90, 90, 90))
    picture.save(out)


def _measured(report: dict) -> str:
    psnr = report["quality"]["accelerated"]["psnr"]["mean"]
    return f": density {report['density']['all_calls']:.2f}, PSNR {psnr:.1f} dB"


def draw_head_kinds(run: Path, out: Path) -> None:
    """Share of SVG1's decisions that were spatial and temporal, a bar a layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    report = json.loads((run / "report.json").read_text())
    kinds = report["runs"]["accelerated"]["transformers"]["transformer"]["head_kinds"]
    layers = sorted(kinds, key=int)
    spatial = [kinds[layer]["spatial"] for layer in layers]
    figure, axes = plt.subplots(figsize=(6, 2.6))
    axes.bar(layers, spatial, color="#3b6fb6", label="spatial")
    axes.bar(layers, [1 - s for s in spatial], bottom=spatial, color="#e0a03b", label="temporal")
    axes.set(xlabel="layer", ylabel="share of heads and steps", title="tiny-wan: head kinds found by SVG1", ylim=(0, 1))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--svg2", type=Path, help="folder of a run; writes docs/tiny-wan.png")
    parser.add_argument("--svg1", type=Path, help="folder of an SVG1 run; writes docs/head-kinds.png")
    args = parser.parse_args()
    if args.svg2:
        draw_side_by_side(args.svg2, DOCS / "tiny-wan.png")
    if args.svg1:
        draw_head_kinds(args.svg1, DOCS / "head-kinds.png")


if __name__ == "__main__":
    main()
