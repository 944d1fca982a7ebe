"""Load a Diffusers pipeline from a hub id, a directory or the bundled model, and put it on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from svg.config import MethodConfig
from svg.config.run import DTYPES, OFFLOADS, check_device_name
from svg.documents import shown

from .attach import accelerate
from .model_files import check_configs, locate_model, read_index
from .registry import PIPELINES
from .request import check_flow_shift

_DTYPES: dict[str, torch.dtype] = dict(zip(DTYPES, (torch.bfloat16, torch.float16, torch.float32)))


def load_pipeline(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    offload: str = "none",
    flow_shift: float | None = None,
    vae_tiling: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    config: MethodConfig | None = None,
) -> Any:
    """Load a pipeline of a supported class: safetensors only, no code from the model's files.

    Args:
        model: hub id, directory, or "tiny-wan" (also None) for the bundled model.
        device: "auto" (a GPU if there is one), "cuda", "cuda:<index>" or "cpu".
        dtype: "bf16", "fp16", "fp32" or the torch dtype; None: bf16 on a GPU, fp32 on a CPU. Wan's VAE and image
            encoder stay in fp32.
        offload: what waits in CPU memory: "none", "model" (whole components), "group" (blocks), "sequential" (layers).
        flow_shift: shift of a flow-matching scheduler, > 0 (Wan: 3 at 480p, 5 at 720p); None: the model's own.
        vae_tiling: decode in tiles, for videos whose decoding doesn't fit.
        revision: branch, tag or commit of a hub id; None: its main branch.
        variant: which weights files, such as "fp16"; None: those without a variant.
        config: settings of the first run, or None. Linears that they put in 8 bits are quantised one by one before anything
            is moved, so that the device never holds their 16-bit weights; the pipeline is accelerated with them then.
            Otherwise, and where layers are offloaded one by one, it changes nothing.

    Returns:
        The Diffusers pipeline.

    Raises:
        ValueError: an argument breaks its rule, or the model is not a supported pipeline; or as `accelerate`.
    """
    target = resolve_device(device)
    weights_dtype = _resolve_dtype(dtype, target)
    check_offload(offload, target)
    check_flow_shift(flow_shift)
    if not isinstance(vae_tiling, bool):
        raise TypeError(f"vae_tiling must be true or false, got {shown(vae_tiling)}")
    source = locate_model(model)
    if revision is not None and isinstance(source, Path):
        raise ValueError(f"revision must be left out for a directory, got {shown(revision)}; it is for hub ids")
    for name, text in (("revision", revision), ("variant", variant)):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name} must be text, got {shown(text)}")
        if text is not None and not (text.isprintable() and 0 < len(text) < 256):
            raise ValueError(f"{name} must be a name, got {shown(text)}")
    name = read_index(source, revision)["_class_name"]
    if isinstance(source, Path):
        check_configs(source)
    pipe = _from_pretrained(source, name, weights_dtype, revision=revision, variant=variant)
    if flow_shift is not None:
        _set_flow_shift(pipe, flow_shift)
    if vae_tiling:
        pipe.vae.enable_tiling()
    if config is not None and config.linears != "none" and offload in ("none", "model"):
        accelerate(pipe, config)
    return place(pipe, target, offload)


def resolve_device(device: str) -> torch.device:
    """Turn a device's name into a device that is there.

    Args:
        device: "auto", "cuda", "cuda:<index>" or "cpu".

    Returns:
        The device.

    Raises:
        ValueError: another name, or a GPU that isn't there.
    """
    check_device_name(device)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be present, got {device} with {torch.cuda.device_count()} GPUs visible to torch; "
            f"use device cpu, or install a CUDA build of torch and check the driver"
        )
    return resolved


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or resolved not in _DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    return resolved


def check_offload(offload: str, device: torch.device) -> None:
    """Raise unless a way of offloading is known, and the device has other memory than the CPU's."""
    if not isinstance(offload, str) or offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {shown(offload)}")
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"offload must be none on device cpu, got {shown(offload)}; leave it out or use device cuda")


def _from_pretrained(source: str | Path, name: str, dtype: torch.dtype, **which: str | None) -> Any:
    import diffusers

    dtypes = {"default": dtype, **dict.fromkeys(PIPELINES[name].fp32_components, torch.float32)}
    try:
        return getattr(diffusers, name).from_pretrained(str(source), dtype=dtypes, use_safetensors=True, **which)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the files of strangers make Diffusers and Transformers raise
        raise ValueError(
            f"model must be complete and in safetensors, got {source}: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _set_flow_shift(pipe: Any, flow_shift: float) -> None:
    config = pipe.scheduler.config
    key = "flow_shift" if config.get("use_flow_sigmas") else "shift"
    if key not in config:
        raise ValueError(
            f"flow_shift must be left out for {type(pipe.scheduler).__name__}, which is not a flow-matching scheduler, "
            f"got {flow_shift}"
        )
    pipe.scheduler = type(pipe.scheduler).from_config(config, **{key: flow_shift})


def place(pipe: Any, device: torch.device, offload: str) -> Any:
    """Put a pipeline on a device.

    Args:
        pipe: a Diffusers pipeline in CPU memory.
        device: where it runs.
        offload: as in `load_pipeline`.

    Returns:
        The same pipe.
    """
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        # The VAE stays on the device: it is small beside the transformer.
        pipe.enable_group_offload(
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
            exclude_modules=["vae"],
        )
    return pipe
