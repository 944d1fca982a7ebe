"""A cache of Diffusers on top: blocks whose input changed little are skipped, and those that run are sparse."""

import argparse

from diffusers import FirstBlockCacheConfig
from diffusers.utils import export_to_video

import svg
from svg.pipelines import load_pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tiny-wan")
parser.add_argument("--size", nargs=3, type=int, default=(17, 128, 160), metavar=("FRAMES", "HEIGHT", "WIDTH"))
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--threshold", type=float, default=0.05, help="higher: more steps are skipped")
parser.add_argument("--out", default="cache_too.mp4")
args = parser.parse_args()

frames, height, width = args.size
prompt = "a large red circle moving right over a gray and navy checkered background, the camera is still"
pipe = load_pipeline(args.model)
svg.accelerate(pipe)
pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=args.threshold))
video = pipe(prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps).frames[0]
export_to_video(video, args.out, fps=8)

calls = svg.report(pipe)["transformers"]["transformer"]["calls"]
print(svg.summary(pipe))
print(f"{calls['total']} calls of attention ran, {calls['sparse']} of them sparse; the cache left out the others")
