"""What the page shows, in one form for runs and sweeps."""

import base64
import os
from pathlib import Path
from urllib.parse import quote

from ..names import METRICS
from .remarks import remarks

_MISSING = 255  # byte of a layer that has no value in a step; 0 .. 254 stand for 0 .. 1
_DIGITS = 4
_MAIN_SETTINGS = ("density", "top_p", "budget", "topk", "cdf")  # in the label of a method that has them
_CPU_NOTE = "on a CPU sparse attention runs the plain-torch reference: no speed-up is expected"


def check_blocks(content, blocks):
    """Raise TypeError unless blocks of a file are of their kind: {name: dict, list or str}."""
    for name, kind in blocks.items():
        if not isinstance(content[name], kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got a {type(content[name]).__name__}")


def page_data(*, kind, title, cells, notes, state="finished", command=None, versions=None):
    """Everything the page needs.

    Args:
        kind: "run", "sweep" or "recorded".
        title: heading of the page.
        cells: of `cell`, dense first.
        notes: texts, shown as they are.
        state: "finished" or "running".
        command: what made the whole folder, or None.
        versions: of Python and libraries.

    Returns:
        dict that json takes, infinities spelled "inf".
    """
    notes = list(notes)
    on_cpu = any(item["device_type"] == "cpu" and item["role"] == "accelerated" for item in cells)
    if on_cpu and not any("CPU" in note for note in notes):
        notes.append(_CPU_NOTE)
    notes += remarks(cells, _MAIN_SETTINGS)
    devices = sorted({item["device"] for item in cells if item["status"] == "finished" and item["device"]})
    if len(devices) > 1:
        notes.append(f"times were taken on different devices and cannot be compared: {'; '.join(devices)}")
    return {
        "kind": kind,
        "title": title,
        "cells": cells,
        "notes": notes,
        "state": state,
        "command": command,
        "versions": versions or {},
    }


def cell(*, folder, method, generation, quality, video, transformers, device, model, dtype, **rest):
    """One video and how it came about.

    Args:
        folder: what `video` is relative to.
        method: the method's settings, or None.
        generation: prompt, size, steps, seed, fps.
        quality: result of svg.eval.compare.compare, or None.
        video: relative path inside the folder, or None; a file that isn't there counts as None.
        transformers: {name: summary of its calls}, or None.
        device: {"type", "name" or "threads"}; the type alone for a cell that has not run.
        model, dtype: names.
        rest: id, role, status, label, reference, control, command, error, seconds, density: taken as they are.

    Returns:
        dict for `page_data`.

    Raises:
        ValueError: the video's path leads out of the folder.
    """
    size = f"{generation['num_frames']} x {generation['height']} x {generation['width']}"
    return {
        **rest,
        "method": _method_name(method or {"method": "dense"}),
        "settings": method or {},
        "group": ", ".join(filter(None, (model, size, f"{generation['steps']} steps", dtype))),
        "model": model,
        "size": size,
        "steps": generation["steps"],
        "device": device_name(device),
        "device_type": (device or {}).get("type"),
        "dtype": dtype,
        "prompt": generation["prompt"],
        "seed": generation["seed"],
        "fps": generation["fps"],
        "frames": (quality or {}).get("frames") or generation["num_frames"],
        "video": _link(folder, video),
        "attention": _attention(transformers),
        "quality": {name: _value((quality or {}).get(name), "mean") for name in METRICS},
        "per_frame": {name: _rounded(_value((quality or {}).get(name), "per_frame")) for name in METRICS},
        "lpips_net": _value((quality or {}).get("lpips"), "net"),
        "maps": [_maps(name, part) for name, part in (transformers or {}).items() if _has_map(part)],
    }


def _link(folder, video):
    if video is None:
        return None
    place = Path(os.path.realpath(folder / video))
    if Path(video).is_absolute() or ".." in Path(video).parts or Path(os.path.realpath(folder)) not in place.parents:
        raise ValueError(f"a video must be in the folder of its page, got {video!r}: copy it there")
    return quote(video) if place.is_file() else None


def device_name(device):
    """A device as text, its name or "CPU, 2 threads"; None where only its type is known."""
    if not device or not ("name" in device or "threads" in device):
        return None
    if "name" in device:
        return device["name"]
    return f"{device['type'].upper()}, {device['threads']} thread{'s' if device['threads'] != 1 else ''}"


def method_label(method):
    """A method with its main setting, such as "svg2 top_p=0.9"."""
    if _is_tuned(method):
        return _method_name(method)
    settings = [f"{name}={method[name]:g}" for name in _MAIN_SETTINGS if method.get(name) is not None]
    return " ".join([method["method"], *settings])


def _method_name(method):
    """The method; with per-head budgets it is another one to compare with."""
    return f"{method['method']} tuned" if _is_tuned(method) else method["method"]


def _is_tuned(method):
    return any((key.startswith("head_") or key == "thresholds") and value is not None for key, value in method.items())


def _value(part, key):
    return part.get(key) if isinstance(part, dict) else None


def _rounded(values):
    if values is None:
        return None
    return [round(value, _DIGITS) if isinstance(value, float) else value for value in values]


def _attention(transformers):
    """Seconds of attention in dense and in sparse calls, over all transformers; None where they were not timed."""
    parts = [part["attention_seconds"] for part in (transformers or {}).values()]
    if not parts or None in parts:
        return None
    return {kind: sum(part[kind] for part in parts) for kind in ("dense", "sparse")}


def _has_map(part):
    return bool(_value(part.get("density"), "map"))


def _maps(name, part):
    density, kinds = part["density"]["map"], part.get("head_kinds_map")
    return {
        "transformer": name,
        **{key: density[key] for key in ("steps", "layers", "heads")},
        "density": _pack(density, density),
        "temporal": _pack(kinds, density) if kinds else None,
    }


def _pack(table, frame):
    """Base64 of one byte per step, layer and head, for the steps and layers of `frame`: a hundredth of its JSON."""
    rows = {}
    for step, layers in zip(table["steps"], table["values"]):
        for layer, heads in zip(table["layers"], layers):
            rows[step, layer] = heads
    missing = [None] * frame["heads"]
    values = (
        value for step in frame["steps"] for layer in frame["layers"] for value in rows.get((step, layer)) or missing
    )
    # A head of near that lists all there is computes the means besides: more than 1, and shown as 1.
    packed = (_MISSING if value is None else round(min(value, 1) * 254) for value in values)
    return base64.b64encode(bytes(packed)).decode()
