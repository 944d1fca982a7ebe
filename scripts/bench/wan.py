"""Time a full-size Wan 2.1 1.3B end to end: random weights, saved to disk in hub format and loaded like a hub model.

Random weights say nothing about quality and have no sparsity to find, so densities are forced; what is measured is time, memory and
that every part runs at full size, after a short run that compiles. `near` is that of the 720p preset, "near fast" what the word "fast"
changes of it; of the others no step or layer is dense, so their speed-ups are upper bounds. Steps of dense attention are all alike:
`--dense-steps` runs fewer of them, and their time is scaled. `--layers` and a small size make a rehearsal on a CPU.

    python scripts/bench/wan.py --size 81x720x1280 --out wan-1.3b-720p.json [--methods dense,svg2]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.resources
import json
import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

import svg
from svg.configs import load_preset
from svg.pipelines import GenerationRequest, generate, load_pipeline
from svg.pipelines.choose import settings_of

PROMPT = "a cat walks on the grass"
TEXT_DIM = 4096


def save_random_wan(folder: Path, layers: int, vae_dim: int, device: str) -> None:
    """Write a WanPipeline of Wan 2.1 1.3B's shape with random bf16 weights; only the text encoder is small."""
    tokenizer = AutoTokenizer.from_pretrained(importlib.resources.files("svg.pipelines") / "tiny-wan" / "tokenizer")
    torch.manual_seed(0)
    with torch.device(device):
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=64, num_heads=4, d_ff=128, num_layers=1)
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, text_dim=TEXT_DIM, ffn_dim=8960, num_layers=layers
        )
        vae = AutoencoderKLWan(base_dim=vae_dim)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer=transformer)
    pipe.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)


def configs(density: float) -> dict:
    always = {"warmup_steps": 0.0, "warmup_layers": 0.0, "fused": True}
    svg2 = {**always, "budget": density, "top_p": 1.0, "min_k_ratio": 0.0, "selection": "tiles", "first_iterations": 10}
    near = dataclasses.replace(load_preset("wan2.1-t2v-720p").config("near"), budget=density, fused=True)
    return {
        "dense": svg.DenseConfig(),
        "near": near,
        "near 8 bits": dataclasses.replace(near, precision="int8-fp8", linears="all"),
        "near fast": dataclasses.replace(near, **settings_of("fast", "auto")),
        "dense, fused": svg.DenseConfig(fused=True),
        "svg1": svg.SVG1Config(density=density, **always),
        "svg2": svg.SVG2Config(**svg2),
        "svg2 int8-fp8": svg.SVG2Config(precision="int8-fp8", **svg2),
        "sparge int8-fp8": svg.SpargeConfig(topk=density, precision="int8-fp8", **always),
        "sage2": svg.Sage2Config(**always),
    }


def measure(pipe, config, request) -> dict:
    cuda = pipe.transformer.device.type == "cuda"
    svg.accelerate(pipe, config)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    result = generate(pipe, request)
    svg.restore(pipe)
    density = result.report["transformers"]["transformer"]["density"]["sparse_calls"]
    row = {key: getattr(result, key) for key in ("seconds", "transformer_seconds", "attention_seconds", "vae_seconds")}
    return row | {"density": density, "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="81x480x832", help="frames x height x width")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dense-steps", type=int, help="of the dense runs, scaled to --steps [default: all]")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--methods", help="some of them, with commas [default: all]")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vae-dim", type=int, default=96)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    frames, height, width = map(int, args.size.split("x"))
    known = configs(args.density)
    chosen = args.methods.split(",") if args.methods else list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"--methods must be among {', '.join(known)}, got {name!r}")
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        save_random_wan(Path(folder), args.layers, args.vae_dim, device)
        pipe = load_pipeline(folder, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    request = GenerationRequest(
        prompt=PROMPT, height=height, width=width, num_frames=frames, steps=args.steps, guidance=5.0
    )
    result = {
        "model": "Wan 2.1 1.3B architecture, random weights", "size": [frames, height, width], "steps": args.steps,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }  # fmt: skip
    for name in chosen:
        # A dense step and three sparse ones compile all: calls that choose first, again, or not have kernels of their own.
        measure(pipe, known[name], dataclasses.replace(request, steps=4))
        steps = args.dense_steps if name.startswith("dense") and args.dense_steps else args.steps
        row = measure(pipe, known[name], dataclasses.replace(request, steps=steps))
        scaled = {key: row[key] * args.steps / steps for key in ("transformer_seconds", "attention_seconds")}
        more = scaled["transformer_seconds"] - row["transformer_seconds"]
        result[name] = row | scaled | {"seconds": row["seconds"] + more, "steps_run": steps}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result[name]), flush=True)


if __name__ == "__main__":
    main()
