"""`svg doctor`: what is installed, what is missing, and what to do about it."""

from __future__ import annotations

import json
import shutil
from importlib import metadata, resources
from typing import Any

import click

from .. import _FOREIGN
from ..environment import version_problems, versions
from .panels import Command
from .self_test import passed, self_test


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Tell what is installed, what is missing and what to do, and try attention on every device.

    Exit code 1 if something must be done, else 0.

    \b
    Example:
      svg doctor
    """
    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 1 if found["problems"] else 0
    for name, version in found["versions"].items():
        click.echo(f"{name:<16} {version or 'missing'}")
    for device in found["devices"]:
        details = ", ".join(f"{key.replace('_', ' ')} {_plain(device[key])}" for key in device if key != "name")
        click.echo(f"{'device':<16} {device['name']}: {details}")
    for name, result in found["self_test"].items():
        said = result.get("failed") or _said(result)
        click.echo(f"{'self-test':<16} {name}: {said}")
    for net, path in found["lpips"].items():
        click.echo(f"{'LPIPS ' + net:<16} {path or 'missing'}")
    click.echo(f"{'ffmpeg':<16} {found['ffmpeg'] or 'missing'}")
    hub = found["hub"]
    state = f"{'token' if hub['token'] else 'no token'}{', offline' if hub['offline'] else ''}"
    click.echo(f"{'hub':<16} {state}, cache {hub['cache']}")
    click.echo(f"{'free disk':<16} {found['disk_free_gib']} GiB")
    click.echo(f"{'tiny-wan':<16} {'bundled' if found['bundled_model'] else 'missing'}")
    click.echo(f"{'presets':<16} {', '.join(found['presets'])}")
    for kind in ("problems", "hints"):
        for line in found[kind]:
            click.echo(f"{kind[:-1]}: {line}")
    return 1 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """Look at everything a run needs.

    Returns:
        versions, devices (name, compute capability, memory in GiB, driver, dense backends, kernels and how each precision
        runs), lpips (file of each net or None), ffmpeg, bundled_model, presets, hub (cache, whether there is a token,
        whether it is offline), disk_free_gib, self_test, problems (must be solved) and hints (worth doing), each with its
        way out.
    """
    found = {
        "versions": versions(),
        "devices": _devices(),
        "lpips": _lpips(),
        "ffmpeg": _ffmpeg(),
        "bundled_model": _bundled_model(),
        "presets": _presets(),
        "hub": _hub(),
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "self_test": self_test(),
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
                "driver": _driver(),
                "kernels": _kernels(properties.major, properties.minor),
            }
        )
    return devices


def _driver() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _kernels(major: int, minor: int) -> str:
    """Which kernels a GPU of this compute capability gets."""
    if major < 8:
        return "none: compute capability 8.0 is needed"
    eight = "8 bits native (INT8 and FP8)" if (major, minor) >= (8, 9) else "8 bits with P V in 16 (no FP8)"
    four = "4 bits emulated" if major < 10 else "4 bits native"
    return f"{'Gluon for Hopper' if major == 9 else 'Triton'}, {eight}, {four}"


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    return {"cache": str(constants.HF_HUB_CACHE), "token": get_token() is not None, "offline": constants.HF_HUB_OFFLINE}


def _said(result: dict[str, Any]) -> str:
    """A self-test in words."""
    parts = (
        f"{words} {result[name]['error']:.1e} (rounding explains {result[name]['limit']:.1e})"
        for name, words in (("sparse", "sparse against its reference"), ("whole", "whole map against dense"))
    )
    return f"{'passed' if passed(result) else 'FAILED'} in {result['seconds']} s: {', '.join(parts)}"


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
            f"pip uninstall {name} && pip install --force-reinstall ."
        )
    for device, result in found["self_test"].items():
        if "failed" in result:
            problems.append(
                f"the self-test on {device} failed: {result['failed']}; update torch and triton, or report it"
            )
        elif not passed(result):
            problems.append(
                f"the self-test on {device} is further from its reference than rounding explains ({_said(result)}): "
                f"do not trust videos of this installation, and report it"
            )
    if found["ffmpeg"] is None:
        problems.append("no ffmpeg was found: pip install --force-reinstall imageio-ffmpeg")
    return problems


def _hints(found: dict[str, Any]) -> list[str]:
    from svg.eval.lpips_weights import INSTALL_HINT

    hints = []
    if None in found["lpips"].values():
        hints.append(
            f"LPIPS has no weights here: torchvision downloads them when they are first needed; without a network: {INSTALL_HINT}"
        )
    if len(found["devices"]) == 1:
        hints.append("no GPU is visible to torch: everything runs, but sparse attention is not faster on a CPU")
    if found["disk_free_gib"] < 5:
        hints.append(
            f"only {found['disk_free_gib']} GiB are free here: models of the hub take 5 to 80 GiB in {found['hub']['cache']}"
        )
    if not found["hub"]["token"]:
        hints.append("no token of the Hugging Face hub is set: gated models need one, run `hf auth login`")
    if not found["bundled_model"]:
        hints.append("the bundled model tiny-wan is not in this installation: pass --model, or reinstall svg-video")
    return hints


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
