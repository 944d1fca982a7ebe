"""Fine-tune tiny-wan in bf16 and with INT8 attention, and linears, from the same weights, data and noise; compare the losses.

The whole transformer is trained on fresh scenes of world.py with one kind of object, which shifts the captions and
clips it was trained on. Both runs see the same numbers in the same order, so that every difference is INT8's.

    python scripts/tiny/finetune.py --out finetune.json                                  (one GPU, under a minute)
    python scripts/tiny/finetune.py --linears all --out finetune.json                    (the blocks' linears in INT8 too)
    python scripts/tiny/finetune.py --size 9x32x48 --clips 4 --batch 2 --steps 4         (a toy on a CPU)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from train import FLOW_SHIFT, PromptEncoder, encode_moments, run_whole_clips
from transformers import AutoTokenizer, UMT5EncoderModel
from world import SHAPES, captions, render, sample_scenes

import svg
from svg.config.base import LINEARS
from svg.kernels.training.op import PRODUCTS

BAR = 0.01  # of the final loss, relative
SHARE = 4  # the final loss is the mean over the last 1 / SHARE of the steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[2] / "pipelines" / "tiny-wan")
    parser.add_argument("--size", default="17x128x160", help="frames x height x width")
    parser.add_argument("--shape", choices=SHAPES, default="ring", help="which object the scenes show")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--gradients", choices=PRODUCTS, default="int8", help="as in svg.training_attention")
    parser.add_argument("--linears", choices=LINEARS, default="none", help="which run in INT8, as in svg.int8_training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where to write both curves (JSON)")
    args = parser.parse_args()
    latents, texts = data(args)
    curves, seconds = {}, {}
    for name in ("bf16", "int8"):
        started = time.time()
        curves[name] = finetune(args, latents, texts, name)
        seconds[name] = time.time() - started
    show(curves)
    final = {name: sum(curve[-last(curve) :]) / last(curve) for name, curve in curves.items()}
    difference = abs(final["int8"] / final["bf16"] - 1)
    print(f"final loss: bf16 {final['bf16']:.5f}, int8 {final['int8']:.5f}, {difference:.3%} apart (bar {BAR:.0%})")
    print(f"seconds: bf16 {seconds['bf16']:.1f}, int8 {seconds['int8']:.1f}, compilation included")
    print(json.dumps({"final": final, "difference": difference, "bar": BAR, "seconds": seconds}))
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items()}
        result = {"settings": settings, "curves": curves, "final": final, "difference": difference, "seconds": seconds}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if difference <= BAR else f"the final losses are {difference:.3%} apart, more than {BAR:.0%}")


def last(curve: list[float]) -> int:
    return max(1, len(curve) // SHARE)


def show(curves: dict[str, list[float]]) -> None:
    """Both curves, averaged over ten stretches."""
    steps = len(curves["bf16"])
    print("steps            bf16      int8   difference")
    for i in range(min(10, steps)):
        part = slice(i * steps // 10, (i + 1) * steps // 10) if steps >= 10 else slice(i, i + 1)
        bf16, int8 = (sum(curves[name][part]) / (part.stop - part.start) for name in ("bf16", "int8"))
        print(f"{part.start:>4} - {part.stop - 1:<4}  {bf16:9.5f} {int8:9.5f}   {int8 / bf16 - 1:+.3%}")


@torch.no_grad()
def data(args) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised latents [N, 16, T, H, W] of fresh scenes, and their encoded captions [N, 512, D]."""
    frames, height, width = (int(n) for n in args.size.split("x"))
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae").to(args.device).eval()
    run_whole_clips(vae)
    tokenizer = AutoTokenizer.from_pretrained(args.model / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(args.model / "text_encoder").to(args.device).float().eval()
    generator = torch.Generator().manual_seed(args.seed)
    scenes = sample_scenes(args.clips, generator)
    scenes.shape.fill_(SHAPES.index(args.shape))
    moments = []
    for first in range(0, args.clips, args.batch):
        part = scenes[torch.arange(first, min(first + args.batch, args.clips))].to(args.device)
        video = render(part, frames, height, width).contiguous(memory_format=torch.channels_last_3d)
        moments.append(encode_moments(vae.float(), video)[0])
    mean, std = (torch.tensor(vae.config[key], device=args.device) for key in ("latents_mean", "latents_std"))
    latents = (torch.cat(moments) - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    ids = tokenizer(captions(scenes), padding=True, return_tensors="pt")["input_ids"].to(args.device)
    return latents, PromptEncoder(encoder, tokenizer.pad_token_id)(ids)


def finetune(args, latents: torch.Tensor, texts: torch.Tensor, kind: str) -> list[float]:
    """Losses of every step of a run in "bf16" or "int8"."""
    torch.manual_seed(args.seed)
    transformer = WanTransformer3DModel.from_pretrained(args.model, subfolder="transformer").float().to(args.device)
    transformer.train()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=args.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same numbers on every device
    losses = []
    in_int8 = kind == "int8"
    with svg.int8_training(transformer, args.gradients, args.linears) if in_int8 else contextlib.nullcontext():
        for _ in range(args.steps):
            index = torch.randint(len(latents), (args.batch,), generator=generator)
            loss = flow_loss(transformer, latents[index], texts[index], generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def flow_loss(transformer, latents: torch.Tensor, texts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rectified flow: x = (1 - s) data + s noise, target noise - data, s drawn with the scheduler's shift."""
    u = torch.rand(len(latents), generator=generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    sigma = (FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)).to(latents.device)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = transformer(noisy, sigma * 1000, texts, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - latents)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="svg.training_attention computes its plain PyTorch reference")
    main()
