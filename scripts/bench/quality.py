"""Quality against density of several methods on one model: every video against dense attention from the same seed.

    python scripts/bench/quality.py --size 33x256x256 --prompts 2 --out curve.json \
        --configs "dense,dense_backend=math" "svg1,density=0.3" "svg2,top_p=0.9,num_q_clusters=48,num_k_clusters=128"

Prompts are held-out captions of scripts/tiny/world.py unless `--prompt` is given. The first config named plain `dense` is the reference.
Rows are written as they are measured; a file that is there is continued, without the dense runs whose frames `--keep` has.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import yaml

import svg
from svg.config import config_from_dict
from svg.eval.compare import compare
from svg.pipelines import GenerationRequest, generate, load_pipeline


def parse_config(text: str) -> dict:
    method, *pairs = text.split(",")
    return {"method": method, **{k: yaml.safe_load(v) for k, v in (pair.split("=", 1) for pair in pairs)}}


def to_uint8(frames: np.ndarray) -> np.ndarray:
    return (frames * 255).round().clip(0, 255).astype(np.uint8)


def prompts_of(args) -> list[str]:
    if args.prompt:
        return args.prompt
    sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
    from check import held_out_scenes
    from world import captions

    return captions(held_out_scenes(args.prompts, 0))


def measure(pipe, settings: dict, request: GenerationRequest):
    svg.accelerate(pipe, config_from_dict(settings))
    result = generate(pipe, request)
    svg.restore(pipe)
    row = {"seconds": result.seconds, "transformer_seconds": result.transformer_seconds}
    summary = result.report["transformers"]["transformer"]
    row |= {"attention_seconds": result.attention_seconds, "head_kinds": summary["head_kinds"]}
    row |= {f"density_{calls}": summary["density"][calls] for calls in ("all_calls", "sparse_calls")}
    return to_uint8(result.frames), row


def dense(pipe, request: GenerationRequest, keep: Path | None):
    """Frames and row of the reference: those of an earlier process, where it kept them."""
    kept = None if keep is None else keep / f"dense-{request.seed}.npz"
    if kept is not None and kept.exists():
        with np.load(kept) as found:
            return found["frames"], json.loads(str(found["row"]))
    frames, row = measure(pipe, {"method": "dense"}, request)
    if kept is not None:
        keep.mkdir(parents=True, exist_ok=True)
        np.savez(kept, frames=frames, row=json.dumps(row))
    return frames, row


def summarise_row(row: dict) -> str:
    names = ("psnr", "ssim", "lpips", "density_all_calls", "density_sparse_calls", "seconds", "attention_seconds")
    return f"{row['config']}: " + " ".join(f"{k} {row[k]:.4g}" for k in names if row[k] is not None)


def save(path: Path, result: dict) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="default: the bundled tiny-wan")
    parser.add_argument("--size", default="33x256x256", help="frames x height x width")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--flow-shift", type=float, default=None, help="default: the model's")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--lpips", default="alex", choices=("alex", "vgg", "none"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--keep", type=Path, help="folder for the dense frames, one prompt, size and model a seed")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    frames, height, width = map(int, args.size.split("x"))
    pipe = load_pipeline(args.model, device=args.device, dtype=args.dtype, flow_shift=args.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    device = pipe.transformer.device
    result = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    result |= {
        "command": " ".join(["python", "scripts/bench/quality.py", *sys.argv[1:]]), "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "size": [frames, height, width], "steps": args.steps, "guidance": args.guidance,
        "flow_shift": args.flow_shift, "dtype": str(pipe.transformer.dtype),
    }  # fmt: skip
    for number, prompt in enumerate(prompts_of(args)):
        request = GenerationRequest(
            prompt=prompt, height=height, width=width, num_frames=frames, steps=args.steps, guidance=args.guidance,
            seed=args.seed + number,
        )  # fmt: skip
        done = {row["config"] for row in result["rows"] if row["prompt"] == prompt}
        if done >= {"dense", *args.configs}:
            continue
        reference, dense_row = dense(pipe, request, args.keep)
        for text in ["dense", *args.configs]:
            if text in done:
                continue
            output, row = (reference, dense_row) if text == "dense" else measure(pipe, parse_config(text), request)
            quality = compare(reference, output, args.lpips, device)
            row |= {name: quality[name]["mean"] for name in ("psnr", "ssim", "lpips")}
            row = {"config": text, "prompt": prompt, "seed": request.seed, **row}
            if row["psnr"] == float("inf"):
                row["psnr"] = None  # identical
            result["rows"].append(row)
            save(args.out, result)
            print(summarise_row(row), flush=True)


if __name__ == "__main__":
    main()
