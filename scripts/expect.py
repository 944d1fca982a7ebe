"""Write docs/expect.md: what a model takes on a GPU, from docs/benchmarks/*.json alone, so that it says what was measured.

python scripts/expect.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "expect.md"
GPUS = {"NVIDIA H200": "nvidia-h200.json"}  # those on which a layer with near was timed
WARMUP_STEPS, WARMUP_LAYERS = 0.2, 0.03  # of near in the 720p presets
DENSE = re.compile(r"stock Diffusers on cuDNN ([\d.]+) ms")


class Model(NamedTuple):
    """A model whose layer `svg bench layers` times.

    Args:
        name: for people.
        key: of its layer in the results.
        layers: of its transformer; all are taken to last as long as the timed one.
        forwards: of the preset's run.
        weights: of the transformer, in units of 10^9.
    """

    name: str
    key: str
    layers: int
    forwards: int
    weights: float


MODELS = (
    Model("Wan 14B, 81 x 720 x 1280, 50 steps", "wan14b_720p", 40, 100, 14.3),
    Model("HunyuanVideo, 129 x 720 x 1280, 50 steps", "hunyuan_720p", 60, 50, 13.0),
)
WAYS = {  # the layer in a sparse step, and in a dense one; attention of the last three is in 8 bits
    "near": ("bf16/speedup", "bf16/speedup_fused_only"),
    "near in 8 bits": ("speedup_attention_only", "bf16/speedup_fused_only"),
    "and feed-forward in FP8": ("fp8/speedup_feed_forward", "bf16/speedup_fused_only"),
    "and all linears in INT8": ("speedup", "bf16/speedup_fused_only"),
}
WARM = "warmup_steps=0.2,warmup_layers=0.0"
FAST = "precision=int8-fp8,warmup_precision=int8-fp8,linears=all,linear_precision=int8-rows"
SHARED = "refresh=2,first_iterations=8"
SHORT, LONG = ("9,216 tokens, near", (33, 256, 256)), ("46,656 tokens, near", (65, 384, 384))
QUALITY = {  # of near: settings by what the page calls them
    (*SHORT, "0.25"): f"budget=0.25,{WARM}",
    (*SHORT, "0.25, attention in 8 bits"): f"budget=0.25,precision=int8-fp8,{WARM}",
    (*SHORT, "0.25, attention and all linears in 8 bits"): f"budget=0.25,precision=int8-fp8,linears=all,linear_precision=int8-rows,{WARM}",
    (*SHORT, '"fast": 0.25, half the dense steps, all in 8 bits'): f"budget=0.25,{FAST},warmup_steps=0.1,warmup_layers=0.0,{SHARED}",
    (*SHORT, "0.15"): f"budget=0.15,{WARM}",
    (*LONG, "0.25"): f"budget=0.25,granule=32,{WARM}",
    (*LONG, '"fast"'): f"budget=0.25,granule=32,{FAST},warmup_steps=0.125,warmup_layers=0.0,{SHARED}",
    (*LONG, "0.15"): f"budget=0.15,granule=32,{WARM}",
    (*LONG, "0.10"): f"budget=0.1,granule=32,{WARM}",
}  # fmt: skip


def page() -> str:
    """The page's text."""
    return "\n".join([*_head(), *_minutes(), "", *_quality(), "", *_whole_run(), ""])


def _head() -> list[str]:
    return [
        "# What to expect",
        "",
        "Made by `python scripts/expect.py` from the files in [benchmarks/](benchmarks); [Benchmarks](benchmarks.md) has their commands.",
        "",
        "## Minutes and memory",
        "",
        f"Minutes in the transformer: a measured layer's time (random weights, attention at .25) times layers and forwards, {WARMUP_STEPS:.0%} of the steps and "
        f"{WARMUP_LAYERS:.0%} of the layers dense; text encoder and VAE come on top. GiB are of the transformer's weights in 16 bits.",
        "",
        "| model | GPU | stock Diffusers, cuDNN | " + " | ".join(WAYS) + " | weights |",
        "|---|---|---|" + "---|" * (len(WAYS) + 1),
    ]


def _minutes() -> list[str]:
    rows = []
    for model in MODELS:
        for gpu, file in GPUS.items():
            found = _read(file)
            stock = float(DENSE.match(found[f"layer/{model.key}/bf16/speedup"]["baseline"])[1])
            minutes = stock * model.layers * model.forwards / 60_000
            speedups = [_speedup(found, model, *way) for way in WAYS.values()]
            cells = [f"{minutes:.1f}", *(f"{minutes / speedup:.1f} ({speedup:.1f}x)" for speedup in speedups)]
            rows.append(f"| {model.name} | {gpu} | {' | '.join(cells)} | {model.weights * 2e9 / 2**30:.0f} |")
    return rows


def _speedup(found: dict, model: Model, sparse: str, dense: str) -> float:
    """How many times as fast as stock Diffusers a run is whose first steps and layers are dense."""
    share = (1 - WARMUP_STEPS) * (1 - WARMUP_LAYERS)
    values = (found[f"layer/{model.key}/{way}"]["value"] for way in (sparse, dense))
    return 1 / sum(part / value for part, value in zip((share, 1 - share), values))


def _quality() -> list[str]:
    rows = [
        "## Distance from the dense video",
        "",
        "The bundled model, PSNR on raw frames; what a larger model's videos lose has not been measured. Above 40 dB nothing was seen, at 36 specks at edges.",
        "",
        "| | mean, dB | worst prompt | prompts |",
        "|---|---|---|---|",
    ]
    # After a warm-up of a fifth the schedule that is not today's was the same; ones before it are left out.
    measured = [
        row for row in _read("near-quality.json")["rows"] if "schedule" not in row or "first sparse" in row["schedule"]
    ]
    measured.sort(key=lambda row: "schedule" not in row)
    for (tokens, size, name), config in QUALITY.items():
        found = {r["prompt"]: r for r in measured if tuple(r["size"]) == size and r["config"] == f"near,{config}"}
        psnr = [row["psnr"] for row in found.values()]
        rows.append(f"| {tokens} {name} | {statistics.mean(psnr):.1f} | {min(psnr):.1f} | {len(psnr)} |")
    return rows


def _whole_run() -> list[str]:
    run = _read("wan-1.3b-720p.json")
    frames, height, width = run["size"]
    rows = [
        "## A whole run",
        "",
        f"{run['model']}, {frames} x {height} x {width}, {run['steps']} steps, {run['device']}: no dense steps, the VAE's part of so few is large.",
        "",
        "| | seconds | transformer | VAE | peak GiB |",
        "|---|---|---|---|---|",
    ]
    for name, one in run.items():
        if isinstance(one, dict) and "peak_gib" in one:
            cells = (one[key] for key in ("seconds", "transformer_seconds", "vae_seconds", "peak_gib"))
            rows.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return rows


def _read(file: str) -> dict:
    return json.loads((BENCHMARKS / file).read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
