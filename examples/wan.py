"""Text to video with Wan: one line to accelerate, one to see what it was worth."""

import argparse

from diffusers.utils import export_to_video

import svg
from svg.pipelines import load_pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="tiny-wan", help="such as Wan-AI/Wan2.1-T2V-14B-Diffusers")
parser.add_argument("--size", nargs=3, type=int, default=(17, 128, 160), metavar=("FRAMES", "HEIGHT", "WIDTH"))
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--setting", default="balanced", help="quality, balanced, fast, a method or a preset")
parser.add_argument("--out", default="wan.mp4")
args = parser.parse_args()

frames, height, width = args.size
prompt = "a large red circle moving right over a gray and navy checkered background, the camera is still"
pipe = load_pipeline(args.model)
svg.accelerate(pipe, args.setting)
video = pipe(prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps).frames[0]
export_to_video(video, args.out, fps=8)
print(svg.summary(pipe))
