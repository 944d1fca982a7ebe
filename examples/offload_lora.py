"""A LoRA on an accelerated pipeline whose components wait in CPU memory."""

import argparse

from diffusers.utils import export_to_video

import svg
from svg.pipelines import load_pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-14B-Diffusers")
parser.add_argument("--lora", required=True, help="folder or hub id of the LoRA")
parser.add_argument("--prompt", default="a red ball moves right")
parser.add_argument("--size", nargs=3, type=int, default=(81, 480, 832), metavar=("FRAMES", "HEIGHT", "WIDTH"))
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--offload", default="model", help="none, model, group or sequential")
parser.add_argument("--out", default="offload_lora.mp4")
args = parser.parse_args()

frames, height, width = args.size
pipe = load_pipeline(args.model, offload=args.offload)
pipe.load_lora_weights(args.lora, adapter_name="style")
pipe.set_adapters(["style"], [0.8])
svg.accelerate(pipe)
video = pipe(args.prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps).frames[0]
export_to_video(video, args.out, fps=16)
print(svg.summary(pipe))
