"""HunyuanVideo: text and video share one sequence, and svg keeps all of the text's attention."""

import argparse

from diffusers.utils import export_to_video

import svg
from svg.pipelines import GenerationRequest, generate, load_pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="hunyuanvideo-community/HunyuanVideo")
parser.add_argument("--prompt", default="a cat walks on the grass, realistic")
parser.add_argument("--size", nargs=3, type=int, default=(129, 720, 1280), metavar=("FRAMES", "HEIGHT", "WIDTH"))
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--offload", default="none", help="none, model, group or sequential")
parser.add_argument("--out", default="hunyuan.mp4")
args = parser.parse_args()

frames, height, width = args.size
pipe = load_pipeline(args.model, offload=args.offload, vae_tiling=True)
svg.accelerate(pipe, "quality")
request = GenerationRequest(
    prompt=args.prompt, height=height, width=width, num_frames=frames, steps=args.steps, guidance=6.0
)
result = generate(pipe, request)  # checks the request first, and keeps the raw frames and where the time went
export_to_video(result.frames, args.out, fps=15)
print(f"{result.seconds:.1f} s, {result.attention_seconds:.1f} s of them in attention")
