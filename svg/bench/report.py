"""Results of `svg bench` as JSON, one file a GPU, and as the page docs/benchmarks.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FIELDS = ("value", "unit", "shape", "density", "inputs", "baseline", "versions", "command", "date")
PAGE_START, PAGE_END = "<!-- svg bench: begin -->", "<!-- svg bench: end -->"

# key -> (at least or at most, goal on one H100)
GOALS = {
    "block_sparse/bf16/S75600/density0.25/tflops": (">=", 560),
    "block_sparse/bf16/S75600/density0.10/tflops": (">=", 520),
    "block_sparse/bf16/S75600/density0.50/tflops": (">=", 570),
    "block_sparse/bf16/S119056/density0.25/tflops": (">=", 560),
    "kmeans/S75600/K1000/ms_per_iteration": ("<=", 0.40),
    "kmeans/S75600/K300/ms_per_iteration": ("<=", 0.20),
    "permute/copy_bandwidth_fraction": (">=", 0.80),
    "svg2/bf16/S75600/density0.25/speedup_vs_cudnn": (">=", 3.0),
    "svg1/bf16/S75600/density0.25/speedup_vs_cudnn": (">=", 3.3),
    "svg2/bf16/S75600/density0.25/overhead_share": ("<=", 0.20),
    "near/bf16/S75600/density0.25/speedup_vs_cudnn": (">=", 3.3),
    "near/bf16/S75600/density0.25/reused/speedup_vs_cudnn": (">=", 3.8),
    "near/bf16/S75600/density0.25/error_vs_svg2": ("<=", 0.333),
    "near/int8_fp8/S75600/density0.25/speedup_vs_cudnn": (">=", 4.5),
    "near/int8_fp8/S75600/density0.25/reused/speedup_vs_cudnn": (">=", 5.2),
    "dense/int8_fp8/S75600/tops": (">=", 860),
    "dense/int8_fp8/S75600/tops_with_quantisation": (">=", 830),
    "dense/int8_fp8/d64/S45106/tops_with_quantisation": (">=", 565),
    "block_sparse/int8_fp8/S75600/density0.25/tops_with_quantisation": (">=", 730),
    "block_sparse/int8_fp8/S75600/density0.10/tops_with_quantisation": (">=", 600),
    "block_sparse/int8_fp8/S75600/density0.50/tops_with_quantisation": (">=", 770),
    "svg2/int8_fp8/S75600/density0.25/speedup_vs_cudnn": (">=", 4.2),
    "sparge/int8_fp8/S75600/topk0.25/speedup_vs_cudnn": (">=", 4.5),
    "training/int8/S32768/speedup_vs_flash": (">=", 1.4),
    "scale/svg2/bf16/clusters/memory_exponent": ("<=", 1.05),
    "norm_rope/tb_per_s": (">=", 2.2),
    "layer/wan14b_720p/bf16/speedup": (">=", 2.6),
    "layer/hunyuan_720p/bf16/speedup": (">=", 3.2),
    "layer/wan14b_720p/speedup": (">=", 3.2),
    "layer/hunyuan_720p/speedup": (">=", 4.2),
    **{
        f"linear/{precision}/M75600/wan14b/{name}/speedup": (">=", 1.55)
        for precision in ("fp8", "int8-rows")
        for name in ("qkv", "out", "up", "down")
    },
}


def gpu_slug(name: str) -> str:
    """A GPU's name as a file name, such as nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(folder: Path, gpu: str, results: dict[str, dict[str, Any]]) -> list[Path]:
    """Write a GPU's results beside earlier ones of other keys, and the page of all GPUs.

    Args:
        folder: docs folder; results go to its benchmarks/<gpu>.json, the page is its benchmarks.md, of which only the
            part between the two markers is replaced.
        gpu: the GPU's name.
        results: key -> the FIELDS of a result.

    Returns:
        The files written.

    Raises:
        ValueError: a result lacks a field or has another one.
    """
    for key, entry in results.items():
        if set(entry) != set(FIELDS):
            raise ValueError(f"result {key} must have the fields {', '.join(FIELDS)}, got {', '.join(entry)}")
    path = folder / "benchmarks" / f"{gpu_slug(gpu)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(earlier | results, indent=1) + "\n")
    page = folder / "benchmarks.md"
    page.write_text(_replace(page.read_text() if page.exists() else "# Benchmarks\n", render(path.parent)))
    return [path, page]


def render(folder: Path) -> str:
    """Markdown tables of every GPU's results; JSON files of another form are left out.

    Args:
        folder: where the JSON files are.

    Returns:
        Markdown.
    """
    parts = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if isinstance(results, dict) and all(isinstance(e, dict) and set(e) == set(FIELDS) for e in results.values()):
            parts.append(_section(path.stem, results))
    return "\n".join(parts)


def goal(key: str, value: float) -> str:
    """What issue-level goal a key has and whether the value reaches it, such as ">= 560: yes"; "" without one."""
    if key not in GOALS:
        return ""
    relation, bound = GOALS[key]
    reached = value >= bound if relation == ">=" else value <= bound
    return f"{relation} {bound:g}: {'yes' if reached else 'no'}"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _section(name: str, results: dict[str, dict[str, Any]]) -> str:
    lines = [f"## {name}", ""]
    for stamp in sorted({_stamp(entry) for entry in results.values()}):
        lines.append(f"- {stamp}")
    lines += [
        "",
        "| key | value | goal on an H100 | shape | density | inputs | baseline |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, entry in results.items():
        density = "" if entry["density"] is None else number(entry["density"])
        cells = (
            f"`{key}`", f"{number(entry['value'])} {entry['unit']}", goal(key, entry["value"]), entry["shape"], density,
            entry["inputs"] or "", entry["baseline"] or "",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _stamp(entry: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items() if version)
    return f"{entry['date']}, `{entry['command']}`: {versions}"


def _replace(page: str, tables: str) -> str:
    block = f"{PAGE_START}\n{tables}{PAGE_END}\n"
    before, start, rest = page.partition(PAGE_START)
    if not start:
        return f"{page.rstrip()}\n\n{block}"
    return before + block + rest.partition(PAGE_END)[2].lstrip("\n")
