"""What `svg generate` is to do: a preset, changed by flags, resolved and validated before anything heavy runs."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from svg.configs import Preset, load_preset, preset_names
from svg.eval.page import PAGE
from svg.pipelines.caches import cache_file, parse_cache
from svg.pipelines.fingerprint import fingerprint
from svg.pipelines.model_files import BUNDLED, locate_model
from svg.pipelines.request import GenerationRequest, check_flow_shift

from ..config import METHODS, MethodConfig, config_from_dict
from ..documents import shown

RESULTS = ("dense.mp4", "accelerated.mp4", "side_by_side.mp4", PAGE, "report.json")
_SIZE = ("height", "width", "frames")
_GENERATION = (*_SIZE, "steps", "guidance", "fps", "flow_shift")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One `svg generate`, fully resolved.

    Args:
        model: hub id, directory or "tiny-wan".
        preset: name or YAML file of the preset the settings started from, or None.
        config: the method's settings.
        request: what to generate.
        image_path: where the request's image came from, or None.
        out: folder of the results.
        force: replace earlier results in it.
        device, dtype, offload, flow_shift, vae_tiling: as `svg.pipelines.load_pipeline` takes them.
        dense: run the dense baseline, which quality and speed-up are measured against.
        control: run dense once more on another backend, for the noise floor.
        lpips: "alex", "vgg" or "none".
        loras: file, folder or hub id of each LoRA, and its scale.
        revision, variant: of the model's files, as `svg.pipelines.load_pipeline` takes them.
        compiled: compile the transformers' repeated blocks.
        cache: a step cache for the accelerated run, as `svg.pipelines.caches.parse_cache` takes it, or None.
        last_image_path: where the request's last image came from, or None.
        yes: run billions of weights on a CPU all the same.
        peer: another way than svg's, of a sweep's cell: a name of `svg.pipelines.peers`.
        gpus: processes that make the video together, each on a GPU of its own.
        split: what they share, "sequence" or "branches".
    """

    model: str
    preset: str | None
    config: MethodConfig
    request: GenerationRequest
    image_path: str | None
    out: Path
    force: bool
    device: str
    dtype: str | None
    offload: str
    flow_shift: float | None
    vae_tiling: bool
    dense: bool
    control: bool
    lpips: str
    loras: tuple[tuple[str, float], ...] = ()
    revision: str | None = None
    variant: str | None = None
    compiled: bool = False
    cache: str | None = None
    last_image_path: str | None = None
    yes: bool = False
    peer: str | None = None
    gpus: int = 1
    split: str = "sequence"

    @property
    def loading(self) -> dict[str, Any]:
        """How the model is loaded, whatever the device: keywords of `svg.pipelines.load_pipeline`."""
        names = ("dtype", "offload", "flow_shift", "vae_tiling", "revision", "variant")
        return {name: getattr(self, name) for name in names}


def resolve(
    *,
    preset: str | None,
    model: str | None,
    method: str | None,
    settings: dict[str, Any],
    level: str | None = None,
    generation: dict[str, Any],
    **rest: Any,
) -> Job:
    """Put a preset and flags together: a flag that is given wins.

    Args:
        preset: a preset's name or YAML file; None: the only preset of the model, if there is just one.
        model: hub id or directory; None: the preset's, or the bundled model.
        method: one of METHODS; None: near, or svg2 where the preset has no near.
        settings: fields of the method's config, those that are given.
        level: one of near's LEVELS, whose settings take the preset's place; None: the preset's.
        generation: prompt, negative_prompt, true_cfg, seed, image (a path) and the preset's generation keys; None means
            not given.
        rest: the other fields of Job.

    Returns:
        The job.

    Raises:
        ValueError: unknown names, values outside their range, flags that exclude each other, or sizes missing.
        TypeError: a value has the wrong type.
        OSError: the image cannot be read.
    """
    if method == "dense" and not rest["dense"]:
        raise ValueError("--no-dense must come with a sparse method, got --method dense: leave one of them out")
    if rest.get("gpus", 1) > 1 and rest["device"] not in ("auto", "cuda", "cpu"):
        raise ValueError(
            f"--device must be auto, cuda or cpu with --gpus, got {rest['device']}: each process has its own"
        )
    if model is not None:
        locate_model(model)  # a folder that is missing is said before anything that a folder could be asked for
    if rest.get("split") == "branches" and rest["gpus"] != 2:
        raise ValueError(f"--split branches must come with --gpus 2, one for each branch, got {rest['gpus']}")
    chosen = _preset(preset, model)
    if method is None:
        method = "near" if chosen is None or "near" in chosen.methods else "svg2"
    if level is not None and method != "near":
        raise ValueError(f"--level must come with --method near, got {method}: leave one of them out")
    given = {key: value for key, value in generation.items() if value is not None}
    values = {**_defaults(chosen), **given}
    missing = [key for key in _SIZE if key not in values]
    if missing:
        flags = ", ".join(f"--{key}" for key in missing)
        raise ValueError(
            f"{flags} must be given for a model without a preset, or --preset one of {', '.join(preset_names())}"
        )
    flow_shift = values.pop("flow_shift", None)
    check_flow_shift(flow_shift)
    image_path, last_image_path = values.pop("image", None), values.pop("last_image", None)
    if model is None:
        model = chosen.model if chosen else BUNDLED
    locate_model(model)
    if rest.get("cache") is not None:
        parse_cache(rest["cache"])
    config = _config(chosen, method, settings, _of_level(level, rest["device"]))
    if rest.get("split") == "branches":
        config = config.for_branches_apart()
    _check_model(config, model)
    return Job(
        model=model,
        preset=(preset or chosen.name) if chosen else None,
        config=config,
        request=_request(values, image_path, last_image_path),
        image_path=image_path,
        last_image_path=last_image_path,
        flow_shift=flow_shift,
        **{**rest, "out": Path(rest["out"])},
    )


def inputs_of(job: Job) -> list[str | Path]:
    """Files and folders that a job reads: none of them may be written to."""
    settings = (getattr(job.config, name, None) for name in ("thresholds", "layers", "linears_file"))
    files = [job.image_path, job.last_image_path, job.preset, *settings, *(source for source, _ in job.loras)]
    files += [] if job.cache is None else [cache_file(job.cache)]
    model = locate_model(job.model)
    return [path for path in (*files, model if isinstance(model, Path) else None) if path is not None]


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE texts as settings.

    Args:
        assignments: such as "block_size=32"; values are JSON numbers, true, false or null, or text.

    Returns:
        Value by name; whether a method has them is for its config to say.

    Raises:
        ValueError: one has no "=", or a value that is nested too deeply or has too many digits.
    """
    settings = {}
    for text in assignments:
        name, sign, value = text.partition("=")
        if not (name and sign):
            raise ValueError(f"--set must be NAME=VALUE, got {text!r}")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value  # text needs no quotes
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--set must have a value that can be read, got {shown(text)}") from error
    return settings


def parse_loras(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Read LoRA options.

    Args:
        texts: such as "style.safetensors" or "style.safetensors=0.7".

    Returns:
        Source and scale of each; the scale is 1 where none is given.
    """
    found = []
    for text in texts:
        source, sign, scale = text.rpartition("=")
        try:
            found.append((source, float(scale)) if sign else (text, 1.0))
        except ValueError:
            found.append((text, 1.0))  # a path with "=" in it
    return tuple(found)


def read_image(path: str, name: str = "image") -> Image.Image:
    """Read a picture as RGB.

    Args:
        path: its file.
        name: the argument that asks for it.

    Returns:
        The picture.

    Raises:
        ValueError: it is no plain file, no picture, or one of more pixels than PIL takes for harmless.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{name} must be a picture's file, got {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Warning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise ValueError(f"{name} must be a whole picture of at most {limit} pixels, got {path}: {error}") from error


def _preset(name: str | None, model: str | None) -> Preset | None:
    if name is not None:
        return load_preset(name)
    matching = [preset for preset in map(load_preset, preset_names()) if preset.model == (model or BUNDLED)]
    if len(matching) > 1:
        raise ValueError(f"--preset must say which one for {model}: {', '.join(preset.name for preset in matching)}")
    return matching[0] if matching else None


def _defaults(preset: Preset | None) -> dict[str, Any]:
    if preset is None:
        return {}
    return {key: getattr(preset.generation, key) for key in _GENERATION}


def _of_level(level: str | None, device: str) -> dict[str, Any]:
    if level is None:
        return {}
    from svg.pipelines.choose import settings_of  # needs torch, which asks what the device computes in

    return settings_of(level, device)


def _config(preset: Preset | None, method: str, settings: dict[str, Any], level: dict[str, Any]) -> MethodConfig:
    if "method" in settings:
        raise ValueError(
            f"--set must name a setting of method {method}, got method={shown(settings['method'])}: use --method"
        )
    base = (preset.config(method).to_dict() if preset else {"method": method}) | level
    rivals = METHODS[method].rivals if method in METHODS else ()
    if any(settings.get(name) is not None for name in rivals):
        base = {name: value for name, value in base.items() if name not in rivals}
    if any(settings.get(name) is not None for name in ("warmup_steps", "warmup_noise")):
        base.pop("few_steps_noise", None)  # a warm-up that is asked for holds for any number of steps
    return config_from_dict({**base, **settings})


def _check_model(config: MethodConfig, model: str) -> None:
    """Refuse tuned settings for another model; token grid and device are checked when attention first runs."""
    tuned = getattr(config, "tuned_for", None)
    if tuned is None:
        return
    found = fingerprint(model)
    if (tuned.fingerprint, tuned.model if found is None else None) != (found, model if found is None else None):
        raise ValueError(
            f"these settings must run on the weights they were tuned for, {tuned.model} ({tuned.fingerprint}), got {model} "
            f"({found}): run `svg tune` for this model, or take them all the same with --set tuned_for=null"
        )


def _request(values: dict[str, Any], image_path: str | None, last_image_path: str | None) -> GenerationRequest:
    first = None if image_path is None else read_image(image_path)
    last = None if last_image_path is None else read_image(last_image_path, "last_image")
    values = dict(values)
    return GenerationRequest(num_frames=values.pop("frames"), image=first, last_image=last, **values)
