"""What is installed, what is missing, and what to do about it."""

from __future__ import annotations

from importlib import metadata, resources
from typing import Any

from .. import _FOREIGN
from ..environment import version_problems, versions


def examine() -> dict[str, Any]:
    """Look at everything a run needs.

    Returns:
        versions, devices (name, compute capability, memory in GiB, dense backends, kernels), lpips (file of each net or
        None), ffmpeg, bundled_model, presets, problems (must be solved) and hints (worth doing), each with its way out.
    """
    found = {
        "versions": versions(),
        "devices": _devices(),
        "lpips": _lpips(),
        "ffmpeg": _ffmpeg(),
        "bundled_model": _bundled_model(),
        "presets": _presets(),
    }
    return {**found, "problems": _problems(found), "hints": _hints(found)}


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [{"name": "CPU", "threads": torch.get_num_threads(), "kernels": "plain torch"}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "dense_backends": _dense_backends(index),
                "kernels": "Triton",
            }
        )
    return devices


def _dense_backends(index: int) -> list[str]:
    """Every backend that a small bf16 attention really runs on."""
    import torch

    from ..methods.dense import DENSE_BACKENDS, dense_attention

    x = torch.zeros(1, 1, 64, 64, device=f"cuda:{index}", dtype=torch.bfloat16)
    backends = []
    for backend in DENSE_BACKENDS[1:]:
        try:
            dense_attention(x, x, x, backend=backend)
        except ValueError:
            continue
        backends.append(backend)
    return backends


def _lpips() -> dict[str, str | None]:
    from svg.eval.lpips_weights import BACKBONES, where_weights_are

    return {net: str(path) if (path := where_weights_are(net)) else None for net in BACKBONES}


def _ffmpeg() -> str | None:
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_version()
    except RuntimeError:
        return None


def _bundled_model() -> bool:
    return (resources.files("svg.pipelines") / "tiny-wan" / "model_index.json").is_file()


def _presets() -> list[str]:
    from svg.configs import preset_names

    return preset_names()


def _problems(found: dict[str, Any]) -> list[str]:
    problems = version_problems()
    for name in _FOREIGN:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        problems.append(
            f"{name} installs a module called `svg` too and one hides the other: "
            f"pip uninstall {name} && pip install --force-reinstall svg-video"
        )
    if found["ffmpeg"] is None:
        problems.append("no ffmpeg was found: pip install --force-reinstall imageio-ffmpeg")
    return problems


def _hints(found: dict[str, Any]) -> list[str]:
    from svg.eval.lpips_weights import INSTALL_HINT

    hints = []
    if None in found["lpips"].values():
        hints.append(f"LPIPS cannot be measured without its published weights: {INSTALL_HINT}")
    if len(found["devices"]) == 1:
        hints.append("no GPU is visible to torch: everything runs, but sparse attention is not faster on a CPU")
    if not found["bundled_model"]:
        hints.append("the bundled model tiny-wan is not in this installation: pass --model, or reinstall svg-video")
    return hints
