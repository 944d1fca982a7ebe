"""Image to video: the first frame is given, all else is the same line."""

import argparse

from diffusers.utils import export_to_video
from PIL import Image

import svg
from svg.pipelines import load_pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="such as Wan-AI/Wan2.1-I2V-14B-720P-Diffusers")
parser.add_argument("--image", required=True)
parser.add_argument("--prompt", default="a red ball moves right")
parser.add_argument("--size", nargs=3, type=int, default=(81, 720, 1280), metavar=("FRAMES", "HEIGHT", "WIDTH"))
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--out", default="image_to_video.mp4")
args = parser.parse_args()

frames, height, width = args.size
image = Image.open(args.image).convert("RGB").resize((width, height))
pipe = load_pipeline(args.model)
with svg.accelerated(pipe):
    video = pipe(
        image=image, prompt=args.prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps
    ).frames[0]
    print(svg.summary(pipe))
export_to_video(video, args.out, fps=16)
