"""Several budgets of one method against dense, with PSNR, from Python; `svg sweep` does it for grids, and resumes."""

import argparse

from svg.eval.compare import compare
from svg.generate.run_job import to_uint8
from svg.pipelines import GenerationRequest, accelerate, generate, load_pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tiny-wan")
parser.add_argument("--size", nargs=3, type=int, default=(17, 128, 160), metavar=("FRAMES", "HEIGHT", "WIDTH"))
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--budgets", nargs="+", type=float, default=(0.4, 0.25, 0.15))
args = parser.parse_args()

frames, height, width = args.size
prompt = "a large red circle moving right over a gray and navy checkered background, the camera is still"
request = GenerationRequest(prompt=prompt, height=height, width=width, num_frames=frames, steps=args.steps)
pipe = load_pipeline(args.model)

accelerate(pipe, "dense")
dense = generate(pipe, request)
print(f"{'dense':<12} {dense.transformer_seconds:7.2f} s")
for budget in args.budgets:
    accelerate(pipe, {"method": "near", "budget": budget})
    result = generate(pipe, request)
    quality = compare(to_uint8(dense.frames, "dense"), to_uint8(result.frames, "near"), "none")
    print(f"near {budget:<7} {result.transformer_seconds:7.2f} s  {quality['psnr']['mean']:.1f} dB")
