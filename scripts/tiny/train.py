"""Train tiny-wan, the bundled text-to-video pipeline, on the procedural world of world.py (one CUDA GPU).

Stages, each resumable from `--work`: `vae` (AutoencoderKLWan); the WanTransformer3DModel and the UMT5 text encoder together, `small` on
17 x 64 x 80 clips (which word moves what where is learned on many cheap clips), `dit` on 17 x 128 x 160 clips, `long` on a mix with
33 x 256 x 256 clips; `export` (a Diffusers directory in bf16).

    python scripts/tiny/train.py --work work/tiny --out pipelines/tiny-wan
    python scripts/tiny/train.py --work work/more --start-from pipelines/tiny-wan --stages dit,long,export
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from autoencoder import LATENT_CHANNELS, build_vae, compile_norms, decode_clip, encode_moments, run_whole_clips
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from muon import make_optimizers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from world import captions, render, sample_scenes

SHORT = (17, 128, 160)  # frames, height, width: 5 x 16 x 20 = 1,600 video tokens
LONG = (33, 256, 256)  # 9 x 32 x 32 = 9,216 video tokens
SMALL = (17, 64, 80)  # 5 x 8 x 10 = 400 video tokens
# Training clips of a size come from `seed` + SCENE_SEED[size], CACHE_BATCH[size] scenes at a time.
SCENE_SEED = {SHORT: 1000, LONG: 1001, SMALL: 1002}
CLIPS = {SHORT: 16384, LONG: 1024, SMALL: 65536}  # at most: check.py takes no caption of theirs
CACHE_BATCH = {SHORT: 32, LONG: 4, SMALL: 128}
CHAIN = ("start", "small", "dit", "long")  # a stage begins with the weights of the nearest one before it that there is
STAGE_RATE = {"small": 1.0, "dit": 0.7, "long": 0.4}
TEXT_TOKENS = 512  # WanPipeline pads prompts with zero vectors up to here
FLOW_SHIFT = 3.0


# --- models -----------------------------------------------------------------------------------------------------------


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=6, attention_head_dim=64, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=128, freq_dim=128, ffn_dim=1024, num_layers=7, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=256,
    )  # fmt: skip


def build_text(corpus: list[str]) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """A Unigram vocabulary of the world's words plus letters (an unknown word is spelled, not lost), and a small UMT5."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for sentence in corpus for word in sentence.replace(",", "").split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -6.0), (",", -2.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in words] + [
        (c, -8.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789.'-"
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(fast), d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=2, dropout_rate=0.0,
                   pad_token_id=0, eos_token_id=1)
    )  # fmt: skip
    return fast, encoder


# --- state on disk ----------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict, **meta) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}  # clones: some weights are tied
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, {k: json.dumps(v) for k, v in meta.items()})
    os.replace(temporary, path)


def flatten_state(modules: dict, optimizers: list) -> dict:
    state = {f"{name}/{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            state |= {f"opt{i}/{index}/{k}": v for k, v in slots.items() if torch.is_tensor(v)}
    return state


def restore_state(path: Path, modules: dict, optimizers: list) -> int:
    """Load a checkpoint of `flatten_state` in place; returns the step it was written at (0 if there is none)."""
    if not path.exists():
        return 0
    state = load_file(path)
    for name, module in modules.items():
        module.load_state_dict({k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}/")})
    for i, optimizer in enumerate(optimizers):
        slots: dict = {}
        for key, value in state.items():
            if key.startswith(f"opt{i}/"):
                _, index, slot = key.split("/")
                slots.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return int(state["step"])


def log(stage: str, progress: Progress, **values) -> None:
    text = " ".join(f"{k} {v:.4f}" for k, v in values.items())
    print(f"[{stage}] step {progress.step} {time.time() - progress.started:.0f}s {text}", flush=True)


class Progress:
    """How far a stage is: by steps, or by the clock where `--<stage>-seconds` would cut it short, so that the rate always decays fully."""

    def __init__(self, first: int, steps: int, max_seconds: float):
        self.step, self.steps, self.max_seconds, self.started = first, steps, max_seconds, time.time()

    @property
    def share(self) -> float:
        return max(self.step / self.steps, (time.time() - self.started) / self.max_seconds)

    def rate(self, warmup: int) -> float:
        """Learning-rate factor: linear warm-up over `warmup` steps, then cosine to 2 %."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.share)))
        return min(1.0, (self.step + 1) / warmup) * cosine


def set_rate(optimizers: list, factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["base_lr"] * factor
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


@torch.no_grad()
def update_average(average, model, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), [p.to(a.dtype) for a, p in zip(average.parameters(), model.parameters())],
                         1 - decay)  # fmt: skip


# --- stage 1: autoencoder ---------------------------------------------------------------------------------------------


def random_clips(batch: int, generator: torch.Generator, frames: int, size: int, device: str) -> torch.Tensor:
    """Square windows of scenes drawn for both canvas sizes, [B, 3, frames, size, size]."""
    clips = []
    for (_, height, width), share in ((SHORT, batch // 2), (LONG, batch - batch // 2)):
        scenes = sample_scenes(share, generator)
        offset = (
            torch.rand(share, 2, generator=generator) * torch.tensor([height - size + 1, width - size + 1])
        ).long()
        clips.append(render(scenes.to(device), frames, height, width, (size, size), offset.to(device)))
    return torch.cat(clips).contiguous(memory_format=torch.channels_last_3d)


def train_vae(work: Path, steps: int, batch: int, seed: int, device: str, max_seconds: float) -> None:
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 3
    compile_norms()
    vae = build_vae().to(device)
    run_whole_clips(vae)
    average = copy.deepcopy(vae)
    rate = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True, capturable=True
    )
    optimizer.param_groups[0]["base_lr"] = 2e-3
    checkpoint = work / "vae.safetensors"
    first = restore_state(checkpoint, {"vae": vae, "average": average}, [optimizer])
    generator = torch.Generator().manual_seed(seed + first)
    video = random_clips(batch, generator, SHORT[0], 96, device)
    losses = torch.zeros(3, device=device)

    def train_step():
        with torch.autocast("cuda", torch.bfloat16):
            mean, logvar = encode_moments(vae, video)
            mean, logvar = mean.float(), logvar.float().clamp(-30, 20)
            z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            output = decode_clip(vae, z).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = F.mse_loss(output, video)
        loss = F.l1_loss(output, video) + 4 * mse + 2e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        update_average(average, vae, 0.99)
        losses.copy_(torch.stack([loss.detach(), mse.detach(), kl.detach()]))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step()
    progress = Progress(first, steps, max_seconds)
    while progress.share < 1:
        set_rate([optimizer], progress.rate(warmup=100))
        video.copy_(random_clips(batch, generator, SHORT[0], 96, device))
        graph.replay()
        progress.step += 1
        if progress.step % 250 == 0 or progress.share >= 1:
            loss, mse, kl = losses.tolist()
            log("vae", progress, loss=loss, psnr=10 * math.log10(4 / mse), kl=kl)
    modules = flatten_state({"vae": vae, "average": average}, [optimizer])
    save_tensors(checkpoint, modules | {"step": torch.tensor(progress.step)})


def load_trained_vae(work: Path, device: str) -> AutoencoderKLWan:
    vae = build_vae()
    state = load_file(work / "vae.safetensors")
    vae.load_state_dict({k[len("average/") :]: v for k, v in state.items() if k.startswith("average/")})
    return vae.to(device).eval().requires_grad_(False)


# --- stage 2: text encoder and transformer ----------------------------------------------------------------------------


@torch.no_grad()
def cache_latents(vae, clips: int, shape: tuple, batch: int, seed: int, device: str):
    """Encode `clips` fresh scenes; returns bf16 latent means [N, 16, T, H, W] and their captions."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that check.py can tell which captions were seen
    latents, texts = [], []
    for _ in range(0, clips, batch):
        scenes = sample_scenes(batch, generator)
        video = render(scenes.to(device), *shape).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cuda", torch.bfloat16):
            latents.append(encode_moments(vae, video)[0].to(torch.bfloat16))
        texts += captions(scenes)
    return torch.cat(latents), texts


def cached_latents(cache: dict, vae, work: Path, clips: int, shape: tuple, seed: int, device: str):
    """`cache_latents`, normalised by the statistics of the first pool (kept in latents.json), once for all stages of a run."""
    if (clips, shape, seed) not in cache:
        started = time.time()
        latents, texts = cache_latents(vae, clips, shape, CACHE_BATCH[shape], seed, device)
        statistics = work / "latents.json"
        if not statistics.exists():
            mean, std = latents.float().mean((0, 2, 3, 4)), latents.float().std((0, 2, 3, 4))
            statistics.write_text(json.dumps({"latents_mean": mean.tolist(), "latents_std": std.tolist()}))
        saved = json.loads(statistics.read_text())
        mean, std = (
            torch.tensor(saved[k], device=device).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std")
        )
        cache[clips, shape, seed] = latents.sub_(mean).div_(std), texts
        print(f"{clips} clips of {shape} encoded in {time.time() - started:.0f}s", flush=True)
    return cache[clips, shape, seed]


class PromptEncoder(torch.nn.Module):
    """UMT5 on short prompts, zero-padded as WanPipeline pads them."""

    def __init__(self, encoder: UMT5EncoderModel, padding_id: int):
        super().__init__()
        self.encoder, self.padding_id = encoder, padding_id

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [B, L] -> [B, 512, D]
        mask = ids != self.padding_id
        hidden = self.encoder(ids, mask).last_hidden_state * mask[..., None]
        return F.pad(hidden, (0, 0, 0, TEXT_TOKENS - ids.shape[1]))


def flow_loss(transformer, prompts, latents, ids, generator) -> torch.Tensor:
    """Rectified flow: x = (1 - s) data + s noise, target noise - data, s drawn with the scheduler's shift."""
    b, device = len(latents), latents.device
    u = torch.rand(b, generator=generator, device=device)
    sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    level = sigma.view(b, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    with torch.autocast("cuda", torch.bfloat16):
        text = prompts(ids)
        velocity = transformer(noisy, sigma * 1000, text, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - latents)


def train_transformer(work: Path, stage: str, steps: int, max_seconds: float, cache: dict, args) -> None:
    device, seed = args.device, args.seed
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    vae = load_trained_vae(work, device)
    run_whole_clips(vae)
    small = (SMALL, args.small_clips, args.small_batch)
    short = (SHORT, args.clips, args.batch)
    plans = {"small": [small], "dit": [short], "long": [short, (LONG, args.long_clips, args.long_batch)]}[stage]
    generator = torch.Generator(device).manual_seed(seed)
    tokenizer, encoder = build_text(captions(sample_scenes(4000, torch.Generator().manual_seed(seed))))
    transformer, prompts = build_transformer().to(device), PromptEncoder(encoder, tokenizer.pad_token_id).to(device)
    average = copy.deepcopy(torch.nn.ModuleList([transformer, prompts])).requires_grad_(False)
    optimizers = make_optimizers(transformer, prompts)
    modules = {"transformer": transformer, "prompts": prompts, "average": average}
    checkpoint = work / f"{stage}.safetensors"
    first = restore_state(checkpoint, modules, optimizers)
    before = [work / f"{s}.safetensors" for s in CHAIN[: CHAIN.index(stage)]]
    before = [path for path in before if path.exists()]
    if before and not first:
        restore_state(before[-1], modules, optimizers)

    pools = []
    for shape, clips, batch in plans:
        latents, texts = cached_latents(cache, vae, work, clips, shape, seed + SCENE_SEED[shape], device)
        ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"].to(device)
        pools.append((latents, ids, batch))
    empty = tokenizer([""], return_tensors="pt")["input_ids"].to(device)
    del vae
    torch.cuda.empty_cache()
    torch._dynamo.reset()  # an earlier stage's sizes count towards the limit of recompilations
    transformer.compile_repeated_blocks(dynamic=False)

    progress, losses = Progress(first, steps, max_seconds), []
    while progress.share < 1:
        set_rate(optimizers, progress.rate(warmup=100) * STAGE_RATE[stage])
        latents, ids, batch = pools[progress.step % len(pools)]
        index = torch.randint(len(latents), (batch,), generator=generator, device=device)
        dropped = F.pad(empty, (0, ids.shape[1] - empty.shape[1]), value=tokenizer.pad_token_id)
        chosen = torch.where(torch.rand(batch, 1, generator=generator, device=device) < 0.1, dropped, ids[index])
        loss = flow_loss(transformer, prompts, latents[index].float(), chosen, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for m in (transformer, prompts) for p in m.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        update_average(
            average, torch.nn.ModuleList([transformer, prompts]), min(0.998, progress.step / (progress.step + 9))
        )
        losses.append(loss.detach())
        if progress.step % 200 == 0 or progress.share >= 1:
            log(stage, progress, loss=torch.stack(losses).mean().item())
            losses.clear()
    save_tensors(checkpoint, flatten_state(modules, optimizers) | {"step": torch.tensor(progress.step)})


def start_from(work: Path, source: Path) -> None:
    """Write the checkpoints `vae` and `start` from an exported pipeline, so that training goes on where that one ended."""
    vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae")
    transformer = WanTransformer3DModel.from_pretrained(source, subfolder="transformer")
    encoder = UMT5EncoderModel.from_pretrained(source / "text_encoder")
    prompts = PromptEncoder(encoder, padding_id=0)
    step = {"step": torch.tensor(0)}
    save_tensors(work / "vae.safetensors", flatten_state({"vae": vae, "average": vae}, []) | step)
    average = torch.nn.ModuleList([transformer, prompts])
    modules = {"transformer": transformer, "prompts": prompts, "average": average}
    save_tensors(work / "start.safetensors", flatten_state(modules, []) | step)
    statistics = {key: vae.config[key] for key in ("latents_mean", "latents_std")}
    (work / "latents.json").write_text(json.dumps(statistics))


# --- export -----------------------------------------------------------------------------------------------------------


def export(work: Path, out: Path, seed: int) -> None:
    stage = next(s for s in reversed(CHAIN) if (work / f"{s}.safetensors").exists())
    tokenizer, encoder = build_text(captions(sample_scenes(4000, torch.Generator().manual_seed(seed))))
    transformer, prompts = build_transformer(), PromptEncoder(encoder, tokenizer.pad_token_id)
    state = load_file(work / f"{stage}.safetensors")
    average = {k[len("average/") :]: v for k, v in state.items() if k.startswith("average/")}
    torch.nn.ModuleList([transformer, prompts]).load_state_dict(average)
    vae = load_trained_vae(work, "cpu")
    vae.register_to_config(**json.loads((work / "latents.json").read_text()))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    pipe = WanPipeline(tokenizer, encoder, vae, scheduler, transformer=transformer)
    pipe.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {size / 2**20:.1f} MiB, from stage {stage}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, default=Path("pipelines/tiny-wan"), help="folder of the exported pipeline")
    parser.add_argument("--start-from", type=Path, help="an exported pipeline whose weights training goes on from")
    parser.add_argument("--stages", default="vae,small,dit,long,export")
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--small-steps", type=int, default=4000)
    parser.add_argument("--dit-steps", type=int, default=3000)
    parser.add_argument("--long-steps", type=int, default=1000)
    parser.add_argument("--small-clips", type=int, default=CLIPS[SMALL])
    parser.add_argument("--clips", type=int, default=CLIPS[SHORT], help="cached clips of the short size")
    parser.add_argument("--long-clips", type=int, default=CLIPS[LONG])
    parser.add_argument("--small-batch", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--long-batch", type=int, default=6)
    for stage in ("vae", *CHAIN[1:]):
        parser.add_argument(f"--{stage}-seconds", type=float, default=1e9, help="end the stage by the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.start_from:
        start_from(args.work, args.start_from)
    cache: dict = {}
    for stage in args.stages.split(","):
        started = time.time()
        if stage == "vae":
            train_vae(args.work, args.vae_steps, args.vae_batch, args.seed, args.device, args.vae_seconds)
        elif stage in CHAIN[1:]:
            steps, seconds = (getattr(args, f"{stage}_{unit}") for unit in ("steps", "seconds"))
            train_transformer(args.work, stage, steps, seconds, cache, args)
        elif stage == "export":
            export(args.work, args.out, args.seed)
        else:
            raise SystemExit(f"--stages takes vae, small, dit, long, export; got {stage!r}")
        print(f"[{stage}] took {time.time() - started:.0f}s", flush=True)


if __name__ == "__main__":
    main()
