"""Seconds of a first sparse and dense forward on a clean kernel cache, and from the cache that it leaves, each in a process of its own.

    python scripts/bench/first_call.py --out first-call.json                                  (one GPU, under two minutes)
    python scripts/bench/first_call.py --device cpu --layers 1 --heads 2 --size 17x128x128       (a toy on a CPU: nothing is compiled)

The model is Wan 1.3B's shape with few layers and random weights; every layer launches the same kernels. "first" is the host's time until
a forward of each kind is done, "again" that of the same two in the same process: the difference is what compiling, or reading the cache, takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

PRESET = "wan2.1-t2v-1.3b-480p"
STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="81x480x832", help="frames x height x width")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument(
        "--set", action="append", default=[], help="a setting of near beside the preset's, such as precision=int8-fp8"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # in the process that is timed
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(forwards(args)))
        return
    with tempfile.TemporaryDirectory() as cache:
        result = {name: timed(cache) for name in ("clean", "cached")}
    result["command"] = " ".join(["python", "scripts/bench/first_call.py", *sys.argv[1:]])
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def timed(cache: str) -> dict[str, float]:
    """What a new process with a kernel cache measures, and what the cache holds then."""
    command = [sys.executable, __file__, "--inside", *sys.argv[1:]]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_CACHE_DIR": cache}, check=True, stdout=subprocess.PIPE, text=True
    )
    files = [path for path in Path(cache).rglob("*") if path.is_file()]
    kernels = sum(path.suffix == ".cubin" for path in files)
    return {
        **json.loads(run.stdout.splitlines()[-1]),
        "kernels": kernels,
        "mib": sum(path.stat().st_size for path in files) / 2**20,
    }


def forwards(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a dense and a sparse forward, both branches, the first time and again."""
    import torch
    import yaml
    from diffusers import WanTransformer3DModel

    import svg
    from svg.configs import load_preset

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=args.heads,
        attention_head_dim=128,
        ffn_dim=512 * args.heads,
        num_layers=args.layers,
        text_dim=64,
    )
    dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
    transformer = transformer.to(args.device, dtype).eval()
    settings = {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in args.set)}
    config = replace(load_preset(PRESET).config("near"), warmup_layers=0.0, warmup_steps=1 / STEPS, **settings)
    svg.accelerate(transformer, config)
    frames, height, width = map(int, args.size.split("x"))
    latents = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device=args.device, dtype=dtype)
    text = torch.randn(1, 512, 64, device=args.device, dtype=dtype)

    @torch.no_grad()
    def both() -> float:
        started = time.perf_counter()
        for step in (0, 1):  # dense, sparse
            for branch in ("cond", "uncond"):
                with svg.at_step(transformer, step, STEPS, branch):
                    transformer(latents, torch.tensor([900.0], device=args.device), text)
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return {"first": both(), "again": both()}


if __name__ == "__main__":
    main()
