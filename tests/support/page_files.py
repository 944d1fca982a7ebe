"""Files that pages are made of, as `svg` writes them: a sweep, a run, a tuning, recorded inputs."""

FRAMES, HEIGHT, WIDTH, FPS = 9, 64, 96, 8
STEPS, LAYERS, HEADS = 4, 3, 2
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)> & \"quotes\" \u2028 `$HOME`"
PROMPTS = ("a red ball", HOSTILE)
LEVELS = [0.3, 0.6, 1.0]  # of a tuning
SPARSE = (  # name of the video, label, PSNR, density, seconds
    ("a", "svg1 density=0.3", 26, 0.4, 2.0),
    ("b", "svg2 top_p=0.7", 24, 0.3, 1.5),
    ("c", "svg2 top_p=0.9", 31, 0.6, 2.5),
)


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


def trial(family, label, density, psnr, met):
    about = {"family": family, "label": label, "videos": "held-out", "spent": density, "value": psnr, "met": met}
    about["dense_steps"] = 1 if family == "tuned" else 4
    numbers = {
        "density": density,
        "attention_seconds": 1.5,
        "dense_attention_seconds": 2.0,
        "psnr": psnr,
        "lpips": None,
    }
    return {**about, **numbers, "config": {"method": "svg2", "head_top_p": [[0.3, 1.0], [0.6, 0.6]]}}


def tune_json():
    shape = [[[0.1, 0.4, 1.0], [0.2, 0.5, 1.0]], [[0.15, 0.3, 1.0], [0.3, 0.9, 1.0]]]
    return {
        "format": "svg-tune",
        "version": 1,
        "state": "finished",
        "command": "svg tune --min-psnr 30",
        "target": {"kind": "min_psnr", "value": 30.0, "worst": False},
        "method": {"method": "svg2", "top_p": 0.9, "head_top_p": None},
        "model": {"name": "tiny-wan <b>", "fingerprint": "0"},
        "prompts": {"search": ["a"], "held-out": ["b", "c"]},
        "cost": {"plan": 0.0, "per_density": 1.0, "dense": 2.0, "unit": "density"},
        "levels": LEVELS,
        "density": shape,
        "error": [[[0.1, 0.01, 0.0]] * 2] * 2,
        "weight": [[1.0, 2.0], [3.0, 4.0]],
        "tuned": trial("tuned", "svg2 tuned 0.40", 0.4, 31.0, True),
        "uniform": trial("uniform", "svg2 uniform top_p=0.9", 0.5, 30.5, True),
        "uniform_at_equal_cost": {**trial("uniform", "svg2 uniform top_p=0.8", 0.4, 27.0, None)},
        "steps": 16,
        "saved": 0.2,
        "cost_at_target": {"tuned": 0.36, "uniform": 0.48},
        "saved_at_equal_quality": 0.25,
        "winner": "tuned",
        "preset": "tuned.yaml",
        "trials": [trial("tuned", "svg2 tuned 0.40", 0.4, 31.0, None)],
        "notes": [],
    }


def recorded_json():
    rows = [
        {
            "label": label,
            "method": {"method": label.split()[0]},
            "transformer": "transformer",
            "step": step,
            "layer": layer,
            "branch": branch,
            "head": head,
            "density": density,
            "recall": recall,
            "error": round(0.01 * (1 + step + layer + head), 4),
        }
        for label, density, recall in (
            ("svg2 top_p=0.5", 0.3, 0.8),
            ("svg2 top_p=0.9", 0.6, 0.95),
            ("sparge", 0.5, None),
        )
        for step in (2, 5)
        for layer in (0, 3)
        for branch in ("cond", "uncond")
        for head in range(2)
    ]
    source = {"model": "tiny-wan", "generation": {"prompt": "a red ball"}, "dtype": "float32", "versions": {}}
    return {"format": "svg-recorded", "version": 1, "source": source, "command": "svg sweep --recorded", "rows": rows}
