"""Measure tiny-wan on captions and clips it never saw: reconstruction, captioned colour, captioned direction.

Colour and direction are read off the pixels of the front object. The same reading is done on rendered ground truth (it should pass
nearly always) and on videos paired with another prompt's caption (it should mostly fail), so that the reader sees what it is worth.

    python scripts/tiny/check.py --model pipelines/tiny-wan --out check.json --sheet docs/tiny-wan.png
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image
from train import CACHE_BATCH, CLIPS, LONG, SCENE_SEED, SHORT
from world import BACKGROUND_COLOURS, COLOURS, DIRECTIONS, SIZES, captions, render, sample_scenes

HELD_OUT_SEED = 424242
BARS = {"reconstruction_psnr": 31.0, "colour": 0.85, "direction": 0.80}
_AREA = (3.14, 2.96, 1.75, 2.56, 2.35)  # of each shape at radius 1


def held_out_scenes(count: int, seed: int):
    """Scenes whose captions occur nowhere in the clips that training from `seed` can have seen."""
    seen = set()
    for shape, clips in CLIPS.items():
        generator = torch.Generator().manual_seed(seed + SCENE_SEED[shape])
        for _ in range(0, clips, CACHE_BATCH[shape]):
            seen.update(captions(sample_scenes(CACHE_BATCH[shape], generator)))
    pool = sample_scenes(4 * count, torch.Generator().manual_seed(HELD_OUT_SEED))
    fresh = [i for i, c in enumerate(captions(pool)) if c not in seen][:count]
    return pool[torch.tensor(fresh)]


def reconstruction_psnr(vae, scenes, shape, device) -> float:
    """Mean over clips of the PSNR of decode(encode(x)), both in [-1, 1], on the pipeline's own chunked path."""
    values = []
    for i in range(len(scenes)):
        video = render(scenes[i : i + 1].to(device), *shape)
        with torch.no_grad():
            output = vae.decode(vae.encode(video).latent_dist.mode()).sample
        values.append(10 * math.log10(4 / (output - video).square().mean().item()))
    return sum(values) / len(values)


def _prototypes(background: torch.Tensor, device) -> torch.Tensor:
    """RGB in [0, 1] of every object colour at three shades, then of mixes of the scene's two background colours."""
    objects = torch.tensor(list(COLOURS.values()), device=device) / 255.0
    shades = torch.stack([objects * s for s in (1.0, 0.85, 0.7)], 1).flatten(0, 1)
    first, second = (torch.tensor(list(BACKGROUND_COLOURS.values()), device=device) / 255.0)[background]
    mixes = torch.stack([torch.lerp(first, second, s) * d for s in (0.0, 0.25, 0.5, 0.75, 1.0) for d in (1.0, 0.7)])
    return torch.cat([shades, mixes])


def read_object(video: torch.Tensor, scene) -> dict:
    """Is the front object's colour there, and does it move as its caption says? `video` float [F, H, W, 3] in [0, 1]."""
    frames, height, width, _ = video.shape
    colour, direction = int(scene.colour[0, 0]), int(scene.direction[0, 0])
    prototypes = _prototypes(scene.background[0].cpu(), video.device)
    distance = torch.stack([(video - p).square().sum(-1) for p in prototypes])  # [P, F, H, W]
    nearest, label = distance.min(0)
    mask = (label >= 3 * colour) & (label < 3 * colour + 3) & (nearest < 0.06)
    count = mask.sum((1, 2)).float()
    radius = list(SIZES.values())[int(scene.size[0, 0])] * min(height, width)
    needed = 0.35 * _AREA[int(scene.shape[0, 0])] * radius**2
    present = count > needed
    shown = present.float().mean().item() >= 0.7
    if present.sum() < 3:
        return {"colour": shown, "direction": False}
    rows = torch.arange(height, device=video.device).view(1, -1, 1)
    columns = torch.arange(width, device=video.device).view(1, 1, -1)
    y = (mask * rows).sum((1, 2))[present] / count[present] / height
    x = (mask * columns).sum((1, 2))[present] / count[present] / width
    t = torch.arange(frames, device=video.device)[present].float() / (frames - 1)
    t = t - t.mean()
    dx, dy = ((t * v).sum().item() / t.square().sum().item() for v in (x, y))  # frame sides per clip
    moved = max(((dx * ux + dy * uy), i) for i, (ux, uy) in enumerate(DIRECTIONS.values()))
    return {"colour": shown, "direction": moved[0] > 0.1 and moved[1] == direction}


def pass_rates(videos, scenes) -> dict:
    read = [read_object(v, scenes[i : i + 1]) for i, v in enumerate(videos)]
    return {key: sum(r[key] for r in read) / len(read) for key in ("colour", "direction")}


def generate(pipe, prompts, shape, steps, guidance, batch, seed) -> tuple[list[torch.Tensor], float]:
    frames, height, width = shape
    videos, started = [], time.time()
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        generators = [torch.Generator("cpu").manual_seed(seed + i + j) for j in range(len(part))]
        videos += list(pipe(part, height=height, width=width, num_frames=frames, num_inference_steps=steps,
                            guidance_scale=guidance, generator=generators, output_type="pt").frames)  # fmt: skip
    return [v.permute(0, 2, 3, 1).float() for v in videos], time.time() - started


def contact_sheet(videos, columns: int, picks: int = 3) -> Image.Image:
    """Rows of clips; each clip shows its first, middle and last frame side by side."""
    tiles = []
    for video in videos:
        chosen = video[torch.linspace(0, len(video) - 1, picks).long()].cpu()
        tile = torch.cat(list(chosen), 1)
        tiles.append(torch.nn.functional.pad(tile, (0, 0, 2, 2, 2, 2), value=1.0))
    rows = [torch.cat(tiles[i : i + columns], 1) for i in range(0, len(tiles) - columns + 1, columns)]
    return Image.fromarray((torch.cat(rows) * 255).round().clamp(0, 255).byte().numpy())


def check(args) -> dict:
    device = args.device
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(args.model, vae=vae, torch_dtype=getattr(torch, args.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.prompts, args.train_seed)
    prompts = captions(scenes)
    result: dict = {"bars": BARS, "prompts": len(prompts), "steps": args.steps, "guidance": args.guidance}
    for name, shape, count, batch in (("short", SHORT, args.prompts, args.batch), ("long", LONG, args.long_prompts, 2)):
        if not count:
            continue
        some = scenes[torch.arange(count)]
        truth = [render(some[i : i + 1].to(device), *shape)[0].permute(1, 2, 3, 0) / 2 + 0.5 for i in range(count)]
        videos, seconds = generate(pipe, prompts[:count], shape, args.steps, args.guidance, batch, args.seed)
        result[name] = {
            "shape": list(shape),
            "reconstruction_psnr": reconstruction_psnr(vae, some[torch.arange(min(count, 16))], shape, device),
            "generated": pass_rates(videos, some),
            "control_ground_truth": pass_rates(truth, some),
            "control_other_caption": pass_rates(videos[1:] + videos[:1], some),
            "seconds_per_video": seconds / count,
        }
        if args.sheet:
            suffix = "" if name == "short" else "-long"
            path = args.sheet.with_name(args.sheet.stem + suffix + args.sheet.suffix)
            contact_sheet(videos[:12], columns=2).save(path)
            path.with_suffix(".txt").write_text("\n".join(prompts[:12]) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pipelines/tiny-wan")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--long-prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG of the first videos; the long ones get the suffix -long")
    args = parser.parse_args()
    result = check(args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    short = result["short"]
    measured = {"reconstruction_psnr": short["reconstruction_psnr"], **short["generated"]}
    failed = [f"{k} {measured[k]:.3f} < {bar}" for k, bar in BARS.items() if measured[k] < bar]
    raise SystemExit("below the bars: " + ", ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
