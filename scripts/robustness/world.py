"""A folder with what commands read: tiny models, recordings, videos, pictures, results, and broken ones of each kind."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2"]
PROMPT = "a red ball moves right"

State = dict[str, tuple[int, int, int]]


def builders() -> dict[str, Any]:
    """The tests' tiny random pipelines, a function each."""
    path = Path(__file__).parents[2] / "tests" / "support" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BUILDERS


def save_model(name: str, folder: Path) -> Path:
    """Save a tiny random pipeline, its text part short, and return the folder."""
    torch.manual_seed(0)
    builders()[name]().save_pretrained(folder, safe_serialization=True)
    return folder


def build(place: Path) -> None:
    """Fill an empty folder, which becomes the working folder.

    Args:
        place: an empty folder.
    """
    from svg.cli import main
    from svg.eval.video import write_video

    os.chdir(place)
    save_model("wan", Path("model"))
    save_model("wan_i2v", Path("i2v"))
    rng = np.random.default_rng(0)
    for name, shape in (("a", (5, 32, 48)), ("b", (5, 32, 48)), ("wide", (5, 32, 64)), ("long", (9, 32, 48))):
        write_video(f"{name}.mp4", rng.integers(0, 255, (*shape, 3)).astype(np.uint8), fps=8)
    for folder in ("videos", "others"):
        os.mkdir(folder)
        shutil.copy("a.mp4", folder)
    Image.new("RGB", (48, 32)).save("picture.png")
    _run(main, "record", PROMPT, "--model", "model", *SIZE, "--record-steps", "1", "--out", "q.safetensors")
    _run(main, "adapt", "q.safetensors", "--min-cosine", "0.5", "--out", "layers.json", "--device", "cpu")
    _run(main, "sparge-tune", "q.safetensors", "--out", "thresholds.safetensors", "--device", "cpu")
    common = ("--model", "model", *SIZE, "--lpips", "none", "--device", "cpu")
    _run(main, "generate", PROMPT, *common, "--no-dense", "--out", "run")
    _run(main, "sweep", "--prompt", PROMPT, *common, "--methods", "svg1", "--no-control", "--out", "swept")
    _broken_files()
    _broken_models()


def _run(main: Any, *arguments: str) -> None:
    if (code := main(list(arguments))) != 0:
        raise RuntimeError(f"svg {' '.join(arguments)} must work, got exit code {code}")


def _broken_files() -> None:
    os.mkdir("folder")
    Path("folder/inside").write_text("x")
    os.mkfifo("pipe")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("linked").symlink_to("q.safetensors")
    Path("empty").touch()
    Path("text.txt").write_text("some text\n")
    Path("latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    Path("blank.txt").write_text("# none\n\n")
    Path("code.safetensors").write_bytes(pickle.dumps({"a": 1}))
    whole = Path("q.safetensors").read_bytes()
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("huge-header.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    Path("half.mp4").write_bytes(Path("a.mp4").read_bytes()[:300])
    Path("list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n")
    Path("half.png").write_bytes(Path("picture.png").read_bytes()[:40])
    Path("bomb.png").write_bytes(_bomb())
    Path("deep.json").write_text("[" * 100_000)
    Path("list.json").write_text("[]")
    for number, text in enumerate(("[1e400]", f"[1{'0' * 400}]", "[-1, 0, 3]")):
        Path(f"ratios-{number}.json").write_text(text)
    one = {"precision": "int8", "error": 0.1}
    for name, linears in (
        ("other", {"other": {"x": one}}),
        ("text", "x"),
        ("precision", {"transformer": {"x": {"precision": []}}}),
        ("mixed", {"transformer": {"x": one, "y": {"precision": "fp8"}}}),
    ):
        content = {"format": "svg-linears", "version": 1, "about": {}, "transformers": linears}
        Path(f"linears-{name}.json").write_text(json.dumps(content))
    _recordings_of_wrong_shape()
    _results_of_wrong_shape()


def _recordings_of_wrong_shape() -> None:
    from safetensors.torch import save_file

    good = {"format": "svg-record", "version": "1", "source": "{}"}
    tensors = {f"0.{name}": torch.zeros(1, 2, 18, 16) for name in "qkv"}
    call = dict(step=1, num_steps=2, layer=0, num_layers=3, branch="cond", transformer="transformer", name="0")
    call["layout"] = dict(frames=3, height=2, width=3)
    for name, metadata, content in (
        ("no-calls", {"calls": "[]"}, tensors),
        ("calls-null", {"calls": "null"}, tensors),
        ("calls-text", {"calls": "[1]"}, tensors),
        ("deep", {"calls": "[" * 100_000}, tensors),
        ("no-layout", {"calls": json.dumps([{**call, "layout": None}])}, tensors),
        ("negative", {"calls": json.dumps([{**call, "layer": -1}])}, tensors),
        ("no-tensors", {"calls": json.dumps([{**call, "name": "9"}])}, tensors),
        ("wrong-shape", {"calls": json.dumps([call])}, {key: torch.zeros(1, 2, 7, 16) for key in tensors}),
        ("wrong-dtype", {"calls": json.dumps([call])}, {key: value.to(torch.int32) for key, value in tensors.items()}),
        ("nan", {"calls": json.dumps([call])}, {key: value / 0 for key, value in tensors.items()}),
        ("other-version", {"calls": json.dumps([call]), "version": "9"}, tensors),
    ):
        save_file(content, f"rec-{name}.safetensors", {**good, **metadata})


def _results_of_wrong_shape() -> None:
    """Runs, sweeps and journals that are whole JSON, but not what svg wrote."""
    for kind, file in (("run", "report.json"), ("swept", "sweep.json")):
        good = json.loads(Path(kind, file).read_text())
        texts = {"null": "null", "list": "[]", "text": '"x"', "empty": "", "number": "1", "deep": "[" * 100_000}
        texts |= {f"without-{key}": json.dumps({k: v for k, v in good.items() if k != key}) for key in _NEEDED[kind]}
        texts |= {f"{key}-null": json.dumps({**good, key: None}) for key in _NEEDED[kind]}
        texts |= {f"{key}-list": json.dumps({**good, key: [1, [2]]}) for key in _NEEDED[kind]}
        texts["nan"] = json.dumps({**good, "density": float("nan"), "cells": float("nan")})
        for name, text in texts.items():
            folder = Path(f"{kind}-{name}")
            folder.mkdir()
            (folder / file).write_text(text)
    for name, text in (("null", "null"), ("other", '{"format": "svg-sweep-journal", "version": 99}'), ("half", "{")):
        shutil.copytree("swept", f"journal-{name}")
        Path(f"journal-{name}", "journal", "format.json").write_text(text)
    os.makedirs("journal-is-file")
    Path("journal-is-file/journal").touch()


_NEEDED = {
    "run": ("runs", "generation", "model", "versions", "device"),
    "swept": ("cells", "counts", "command", "versions"),
}


def _bomb() -> bytes:
    """A PNG of 60 000 x 60 000 black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(7501) * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _broken_models() -> None:
    """Models named bad-*, which must be refused before weights are read, and late-*, whose fault is in the weights."""
    index, vae, transformer = "model_index.json", "vae/config.json", "transformer/config.json"
    text, scheduler = "text_encoder/config.json", "scheduler/scheduler_config.json"
    for file in (index, vae, transformer, text):
        short = Path(file).parts[0].removesuffix(".json")
        for name, content in {
            "list": "[]", "null": "null", "empty": "", "half": "{", "number": "3", "deep": "[" * 100_000, "binary": "\x80",
        }.items():  # fmt: skip
            _copy(f"bad-{short}-{name}", file, content)
    for key, value in (
        ("_class_name", "StableDiffusionPipeline"), ("_class_name", None), ("_class_name", ["WanPipeline"]),
        ("transformer", ["diffusers", "FluxTransformer2DModel"]), ("transformer", None), ("transformer", "x"),
        ("transformer", [None, None]), ("transformer", [1, 2]), ("transformer", ["os", "system"]),
        ("vae", ["os", "system"]), ("vae", None), ("vae", ["a", "b", "c"]), ("text_encoder", ["my_module", "Code"]),
    ):  # fmt: skip
        _copy(f"bad-index-{key}-{value}".replace("/", ""), index, _changed(index, key, value))
    for file, key in (
        (transformer, "patch_size"), (transformer, "num_attention_heads"), (transformer, "attention_head_dim"),
        (transformer, "num_layers"), (transformer, "in_channels"), (transformer, "text_dim"),
        (vae, "base_dim"), (vae, "z_dim"), (vae, "dim_mult"), (vae, "scale_factor_spatial"), (vae, "scale_factor_temporal"),
        (text, "d_model"), (text, "num_layers"), (text, "vocab_size"),
    ):  # fmt: skip
        for value in (0, -1, "x", [], {}, 1.5, 10**30):
            _copy(f"bad-{Path(file).parts[0]}-{key}-{value}", file, _changed(file, key, value))
    for number, value in enumerate(
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "no-such"}, "x")
    ):
        _copy(
            f"late-transformer-quantization_config-{number}",
            transformer,
            _changed(transformer, "quantization_config", value),
        )
    _copy("late-text_encoder-attention", text, _changed(text, "_attn_implementation", "kernels-community/flash-attn"))
    for name, file in (
        ("transformer", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        weights = f"{name}/{file}.safetensors"
        for kind, data in (
            ("pickle", pickle.dumps({"a": 1})), ("empty", b""), ("half", Path("model", weights).read_bytes()[:5000]),
        ):  # fmt: skip
            _copy(f"late-{name}-{kind}", weights, data)
        os.remove(_copy(f"bad-{name}-none", weights, b"") / weights)
        os.rename(_copy(f"bad-{name}-bin", weights, b"") / weights, Path(f"bad-{name}-bin", name, "pytorch_model.bin"))
        shutil.rmtree(_copy(f"bad-{name}-gone", weights, b"") / name)
    _copy("late-scheduler-list", scheduler, "[]")
    _copy("late-tokenizer-null", "tokenizer/tokenizer.json", "null")
    _copy("late-tokenizer-config", "tokenizer/tokenizer_config.json", "[" * 100_000)


def _changed(file: str, key: str, value: Any) -> str:
    return json.dumps({**json.loads(Path("model", file).read_text()), key: value})


def _copy(name: str, file: str, content: str | bytes) -> Path:
    """A copy of the model with one file changed."""
    folder = Path(name)
    shutil.copytree("model", folder, copy_function=os.link)
    (folder / file).unlink()
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    return folder


def state_of(place: Path) -> State:
    """Size, time and inode of everything below a folder."""
    found, pending = {}, [str(place)]
    while pending:
        for entry in os.scandir(pending.pop()):
            status = entry.stat(follow_symlinks=False)
            is_folder = entry.is_dir(follow_symlinks=False)
            found[entry.path] = (0, 0, 0) if is_folder else (status.st_size, status.st_mtime_ns, status.st_ino)
            if is_folder:
                pending.append(entry.path)
    return found
