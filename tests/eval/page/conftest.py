"""A small sweep and a run as `svg` writes them, with videos whose every frame looks different, and a browser."""

import numpy as np
import pytest
from chromium import BOTH_LOADED, Chromium

from svg.eval.files import write_json
from svg.eval.page import build_page
from svg.eval.video import write_video

FRAMES, HEIGHT, WIDTH, FPS = 9, 64, 96, 8
STEPS, LAYERS, HEADS = 4, 3, 2
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)> & \"quotes\" \u2028 `$HOME`"
PROMPTS = ("a red ball", HOSTILE)
SPARSE = (  # name of the video, label, PSNR, density, seconds
    ("a", "svg1 density=0.3", 26, 0.4, 2.0),
    ("b", "svg2 top_p=0.7", 24, 0.3, 1.5),
    ("c", "svg2 top_p=0.9", 31, 0.6, 2.5),
)


def clip(shift):
    """A bright bar on stripes; it moves by 8 pixels a frame, so two different frames never look alike."""
    frames = np.full((FRAMES, HEIGHT, WIDTH, 3), 60, np.uint8)
    frames[:, :, ::16] = 90
    for index in range(FRAMES):
        frames[index, 8:56, 4 + 8 * index : 16 + 8 * index] = (230, 60 + shift, 40)
    return frames


def quality(level):
    wave = [level + 0.1 * index for index in range(FRAMES)]
    return {
        "frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "psnr": {"mean": level, "pooled": level, "identical_frames": 0, "per_frame": wave},
        "ssim": {"mean": level / 50, "per_frame": [value / 50 for value in wave]},
        "lpips": {"net": "alex", "mean": 1 / level, "per_frame": [1 / value for value in wave]},
        "temporal_psnr": {"mean": level + 2, "pooled": level, "identical_frames": 0, "per_frame": wave[1:]},
    }


def table(low, first=0):
    """A map whose values all differ, for the steps from `first` on."""
    steps = range(first, STEPS)
    values = [
        [[round(low + 0.01 * (s + layer + h), 4) for h in range(HEADS)] for layer in range(LAYERS)] for s in steps
    ]
    return {"steps": list(steps), "layers": list(range(LAYERS)), "heads": HEADS, "values": values}


def transformers(method, density):
    part = {"calls": {}, "transformer_seconds": 2.0, "attention_seconds": {"total": 1.0, "dense": 0.4, "sparse": 0.6}}
    if method["method"] != "dense":
        kinds = table(0.2, first=1) if method["method"] == "svg1" else None
        part |= {"density": {"map": table(density)}, "head_kinds_map": kinds}
    return {"transformer": part}


def cell(name, role, method, prompt, seed, level=None, density=1.0, seconds=3.0, video=None):
    stages = {"transformer": 0.7 * seconds, "attention": 0.4 * seconds, "vae": 0.2 * seconds}
    group = f"{PROMPTS.index(prompt)}{seed}"
    return {
        "id": f"{name}-{group}",
        "role": role,
        "status": "finished",
        "label": name,
        "model": {"name": "tiny-wan", "preset": "tiny-wan", "fingerprint": "0"},
        "method": method,
        "generation": {
            "prompt": prompt,
            "negative_prompt": None,
            "num_frames": FRAMES,
            "height": HEIGHT,
            "width": WIDTH,
            "steps": STEPS,
            "guidance": 4.0,
            "true_cfg": None,
            "seed": seed,
            "image": None,
            "fps": FPS,
        },
        "run": {"device": "cpu", "dtype": "fp32", "offload": "none"},
        "reference": None if role == "dense" else f"dense-{group}",
        "control": None if role == "control" else f"control-{group}",
        "reproduce": f"svg generate --method {method['method']} --seed {seed} -- '{prompt}'",
        "error": None,
        "video": video,
        "frames": None,
        "quality": None if level is None else quality(level),
        "seconds": {"end_to_end": seconds, **stages},
        "speedup": None,
        "density": {"all_calls": density, "sparse_calls": density - 0.1 if role == "accelerated" else None},
        "transformers": transformers(method, density),
        "pipeline": "WanPipeline",
        "device": {"type": "cpu", "threads": 2},
        "versions": {},
    }


def failed_cell():
    item = cell("svg2 top_p=0.2", "accelerated", {"method": "svg2", "top_p": 0.2}, PROMPTS[0], 0)
    kept = ("id", "role", "label", "model", "method", "generation", "run", "reference", "control", "reproduce")
    error = {"type": "FloatingPointError", "message": "q held NaN in layer 3", "traceback": ""}
    return {**{key: item[key] for key in kept}, "status": "failed", "error": error}


def sweep_content():
    cells = []
    for number, (prompt, seed) in enumerate((prompt, seed) for prompt in PROMPTS for seed in (0, 1)):
        near = 0.1 * number
        cells += [
            cell("dense", "dense", {"method": "dense"}, prompt, seed, video=f"videos/d{number}.mp4"),
            cell("control", "control", {"method": "dense"}, prompt, seed, 33 + near, seconds=4),
        ]
        for name, label, level, density, seconds in SPARSE:
            method, video = {"method": label[:4]}, f"videos/{name}{number}.mp4"
            cells.append(cell(label, "accelerated", method, prompt, seed, level + near, density, seconds, video))
    cells.append(failed_cell())
    counts = {"total": len(cells), "finished": len(cells) - 1, "failed": 1, "pending": 0}
    return {
        "format": "svg-sweep",
        "version": 1,
        "state": "finished",
        "command": "svg sweep grid.yaml --out sweep",
        "versions": {"svg-video": "0.1.0", "torch": "2.14"},
        "counts": counts,
        "lpips": "alex",
        "cells": cells,
        "notes": ["a note with <b>markup</b>"],
    }


def run_content():
    dense, control, sparse = sweep_content()["cells"][:3]
    runs = {
        name: {
            "config": {"dense_backend": "auto", "density": 0.3, **item["method"]},
            "seconds": item["seconds"],
            "transformers": item["transformers"],
        }
        for name, item in (("dense", dense), ("accelerated", sparse), ("control", control))
    }
    return {
        "command": "svg generate -- 'a red ball'",
        "model": {"name": "tiny-wan", "dtype": "float32"},
        "generation": sparse["generation"],
        "device": {"type": "cpu", "threads": 2},
        "versions": {"torch": "2.14"},
        "runs": runs,
        "density": sparse["density"],
        "quality": {"accelerated": sparse["quality"], "control": control["quality"]},
        "notes": [],
    }


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a sweep #1")  # a space and a hash: names that break careless links
    (folder / "videos").mkdir()
    for number in range(4):
        for shift, name in enumerate("dabc"):
            write_video(folder / "videos" / f"{name}{number}.mp4", clip(40 * shift), FPS)
    write_json(folder / "sweep.json", sweep_content())
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for shift, name in enumerate(("dense", "accelerated")):
        write_video(folder / f"{name}.mp4", clip(40 * shift), FPS)
    write_json(folder / "report.json", run_content())
    return folder


@pytest.fixture(scope="session")
def browser():
    with Chromium() as chromium:
        yield chromium


def opened(browser, folder):
    browser.open(build_page(folder))
    browser.wait(BOTH_LOADED)
    yield browser
    assert browser.errors == []


@pytest.fixture
def sweep(browser, sweep_folder):
    yield from opened(browser, sweep_folder)


@pytest.fixture
def run(browser, run_folder):
    yield from opened(browser, run_folder)
