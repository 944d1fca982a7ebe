"""The grid of a sweep: models x methods x budgets x caches x prompts x seeds, from YAML or flags, as a list of cells."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from svg.eval.names import LPIPS_NETS
from svg.pipelines.caches import cache_file, parse_cache
from svg.pipelines.fingerprint import fingerprint
from svg.pipelines.model_files import BUNDLED, locate_model
from svg.pipelines.peers import find_peer

from ..config import METHODS, DenseConfig, MethodConfig, config_from_dict
from ..config.run import DTYPES, OFFLOADS
from ..documents import shown
from ..generate.job import Job, resolve
from .cell import Cell, cell_of
from .grid_file import GridError, Mapping, read_mapping

SIZE_KEYS = ("height", "width", "frames", "steps", "guidance", "true_cfg", "flow_shift", "fps")
RUN_KEYS = ("device", "dtype", "offload", "vae_tiling", "lpips")
KEYS = (
    "models",
    "prompts",
    "seeds",
    "budgets",
    "methods",
    "caches",
    "peers",
    "control",
    "negative_prompt",
    *SIZE_KEYS,
    *RUN_KEYS,
)
_DEFAULTS = {"models": [BUNDLED], "seeds": [0], "methods": ["svg1", "svg2"], "caches": [None], "control": True}
_RUN_DEFAULTS = {"device": "auto", "dtype": None, "offload": "none", "vae_tiling": False, "lpips": "alex"}
_CHOICES = {
    "dtype": (None, *DTYPES),
    "offload": OFFLOADS,
    "vae_tiling": (False, True),
    "lpips": LPIPS_NETS,
    "control": (False, True),
}

MOST_METHODS, MOST_CELLS = 1000, 20_000


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to sweep, validated, methods and budgets multiplied out.

    Args:
        models: {"model", "preset"} each.
        prompts: {"prompt", and optionally "negative_prompt", "image", "last_image"} each.
        seeds: seeds of the noise.
        methods: (settings of one method, where they stand) each.
        caches: step caches as `svg generate --cache` takes them, and None for none; each beside every method.
        size: height, width, frames, steps and so on that override the presets'.
        run: device, dtype, offload, vae_tiling, lpips.
        control: whether every group gets a control cell.
        peers: other people's ways, by name (`svg.pipelines.peers`), each a cell of every group.
    """

    models: list[Mapping]
    prompts: list[dict[str, Any]]
    seeds: list[int]
    methods: list[tuple[dict[str, Any], Mapping]]
    caches: list[str | None]
    size: dict[str, Any]
    run: dict[str, Any]
    control: bool
    peers: tuple[str, ...] = ()


def read_grid(path: str | Path | None, flags: dict[str, Any], prompts_needed: bool = True) -> Grid:
    """Put a YAML file and flags together: a flag that is given wins.

    Args:
        path: YAML file with any of KEYS, or None.
        flags: the same keys; None means not given.
        prompts_needed: whether there must be a prompt.

    Returns:
        The grid.

    Raises:
        GridError: an unknown key, a wrong type or an impossible value, with its line and the file's name.
    """
    try:
        content = Mapping() if path is None else read_mapping(path)
        content.check("a grid", list(KEYS))
        for key, value in flags.items():
            if value is not None:
                content[key] = value
                content.lines.pop(key, None)
        return _grid(content, prompts_needed)
    except GridError as error:
        if path is None:
            raise
        raise GridError(f"{path}: {error}") from error


def cells_of(grid: Grid, device: str, dtype: str | None = None) -> list[Cell]:
    """Multiply a grid out.

    Args:
        grid: the grid.
        device: "cpu" or "cuda".
        dtype: overrides the grid's; None: the grid's, or what suits the device.

    Returns:
        Cells in a fixed order: model, prompt, seed; then dense, control, methods. No id is there twice.

    Raises:
        ValueError: sizes are missing, or a preset, model or setting is not there.
    """
    count = (
        len(grid.models)
        * len(grid.prompts)
        * len(grid.seeds)
        * (len(grid.methods) * len(grid.caches) + len(grid.peers) + 1 + grid.control)
    )
    if count > MOST_CELLS:
        raise GridError(f"a grid must have at most {MOST_CELLS} cells, got {count}: sweep it in parts")
    dtype = dtype or grid.run["dtype"] or ("bf16" if device == "cuda" else "fp32")
    cells: dict[str, Cell] = {}
    for model in grid.models:
        mark = fingerprint(model["model"] or BUNDLED)
        jobs = jobs_of(grid, model)
        labels = _labels(jobs)
        for prompt, seed in itertools.product(grid.prompts, grid.seeds):
            for cell in _group(grid, jobs, labels, prompt, seed, {"mark": mark, "device": device, "dtype": dtype}):
                cells.setdefault(cell.id, cell)
    return list(cells.values())


def inputs_of(grid: Grid) -> list[str | Path]:
    """Files and folders that a grid's cells read: none of them may be written to."""
    models = [locate_model(model["model"]) for model in grid.models]
    values = [
        *models,
        *(model.get("preset") for model in grid.models),
        *(prompt.get(name) for prompt in grid.prompts for name in ("image", "last_image")),
    ]
    values += [settings.get(name) for settings, _ in grid.methods for name in ("thresholds", "layers")]
    values += [config_from_dict(settings).linears_file for settings, _ in grid.methods]
    values += [cache_file(cache) for cache in grid.caches if cache is not None]
    return [value for value in values if isinstance(value, (str, Path))]


def method_configs(grid: Grid) -> list[tuple[str, MethodConfig]]:
    """The methods of a grid's first model alone, for recorded inputs.

    Args:
        grid: the grid.

    Returns:
        (label, config) each.
    """
    jobs = jobs_of(dataclasses.replace(grid, caches=[None]), grid.models[0])
    return list(zip(_labels(jobs), (job.config for job in jobs)))


def _group(
    grid: Grid, jobs: list[Job], labels: list[str], prompt: dict[str, Any], seed: int, common: dict[str, Any]
) -> Iterator[Cell]:
    values = {"negative_prompt": None, "image": None, "last_image": None, **prompt}
    image_path, last_image_path = values.pop("image"), values.pop("last_image")

    def cell(job: Job, role: str, label: str, reference: Cell | None = None) -> Cell:
        request = dataclasses.replace(job.request, seed=seed, **values)
        job = dataclasses.replace(job, request=request, image_path=image_path, last_image_path=last_image_path)
        return cell_of(job, role=role, label=label, reference=reference, **common)

    base = dataclasses.replace(jobs[0], config=DenseConfig(), cache=None)
    dense = cell(base, "dense", "dense")
    control = cell(base, "control", "control", dense) if grid.control else None
    changed = ((job, label) for job, label in zip(jobs, labels) if job.config != DenseConfig() or job.cache)
    rest = [cell(job, "accelerated", label, dense) for job, label in changed]
    rest += [cell(dataclasses.replace(base, peer=peer), "accelerated", f"peer {peer}", dense) for peer in grid.peers]
    mark = None if control is None else control.id
    for found in (dense, control, *rest):
        if found is not None:
            yield dataclasses.replace(found, control=mark)


def jobs_of(grid: Grid, model: Mapping, device: str = "cpu") -> list[Job]:
    """One job a method and cache.

    Args:
        grid: the grid.
        model: an entry of its models.
        device: where the jobs are to run.

    Returns:
        The jobs, each with a prompt to be replaced.

    Raises:
        GridError: a preset, a model or a setting is not there, or sizes are missing.
    """
    jobs = [_job(grid, model, settings, where, device) for settings, where in grid.methods]
    return [dataclasses.replace(job, cache=cache) for job in jobs for cache in grid.caches]


def _job(grid: Grid, model: Mapping, settings: dict[str, Any], where: Mapping, device: str) -> Job:
    settings = dict(settings)
    method = settings.pop("method")
    rest = {key: value for key, value in grid.run.items() if key != "device"}
    try:
        return resolve(
            preset=model.get("preset"),
            model=model["model"],
            method=method,
            settings=settings,
            generation={"prompt": "-", **grid.size},
            out=Path("svg-out"),
            force=False,
            device=device,
            dense=True,
            control=False,
            **rest,
        )
    except (ValueError, TypeError) as error:
        key = next((key for key in settings if key in str(error)), None)
        raise GridError(f"{where.where(key)}{error}") from error


def _labels(jobs: list[Job]) -> list[str]:
    """The method, those settings that differ among the configs of one method, and the cache."""
    labels, values = [], defaultdict(set)
    for job in jobs:
        for field in fields(job.config):
            values[job.config.method, field.name].add(getattr(job.config, field.name))
    for job in jobs:
        config = job.config
        varying = [f.name for f in fields(config) if len(values[config.method, f.name]) > 1]
        given = [name for name in varying if getattr(config, name) is not None]
        cache = [] if job.cache is None else [f"cache={job.cache}"]
        labels.append(" ".join([config.method, *(f"{name}={getattr(config, name)}" for name in given), *cache]))
    return labels


def _grid(content: Mapping, prompts_needed: bool) -> Grid:
    values = {**_DEFAULTS, "prompts": [], "budgets": None, **_RUN_DEFAULTS, **content}
    for key, choices in _CHOICES.items():
        if not any(values[key] is choice or values[key] == choice for choice in choices):
            names = ", ".join(map(json.dumps, choices))
            raise GridError(f"{content.where(key)}{key} must be one of {names}, got {shown(values[key])}")
    if prompts_needed and not values["prompts"]:
        raise GridError("prompts must hold at least one prompt: add `prompts:` to the file or --prompt")
    return Grid(
        models=[_entry(item, content, "models", "model", ("preset",)) for item in _list(content, values, "models")],
        prompts=[
            {"negative_prompt": values.get("negative_prompt")}
            | _entry(item, content, "prompts", "prompt", ("negative_prompt", "image", "last_image"))
            for item in _list(content, values, "prompts", empty=not prompts_needed)
        ],
        seeds=[_seed(item, content) for item in _list(content, values, "seeds")],
        methods=_methods(content, values),
        caches=[_cache(item, content) for item in _list(content, values, "caches")],
        size={key: values[key] for key in SIZE_KEYS if values.get(key) is not None},
        run={key: values[key] for key in RUN_KEYS},
        control=values["control"],
        peers=_peers(content, values),
    )


def _peers(content: Mapping, values: dict[str, Any]) -> tuple[str, ...]:
    names = _list(content, {"peers": [], **values}, "peers", empty=True)
    for name in names:
        try:
            find_peer(str(name))
        except ValueError as error:
            raise GridError(f"{content.where('peers')}{error}") from error
    return tuple(dict.fromkeys(names))


def _list(content: Mapping, values: dict[str, Any], key: str, empty: bool = False) -> list[Any]:
    items = values[key]
    if not isinstance(items, list) or not (items or empty):
        raise GridError(f"{content.where(key)}{key} must be a list with at least one entry, got {shown(items)}")
    return items


def _entry(item: Any, content: Mapping, name: str, main: str, optional: tuple[str, ...]) -> Mapping:
    """A list's entry as a mapping: a text alone is its main key."""
    if isinstance(item, str):
        entry = Mapping({main: item})
        entry.line = content.lines.get(name, 0)
        return _with_text(entry, main)
    if not isinstance(item, Mapping):
        raise GridError(f"{content.where(name)}an entry of {name} must be text or keys and values, got {shown(item)}")
    item.check(f"an entry of {name}", [main, *optional])
    for key, value in item.items():
        if not isinstance(value, str):
            raise GridError(f"{item.where(key)}{key} must be text, got {shown(value)}")
    if main not in item and name != "models":
        raise GridError(f"{item.where()}an entry of {name} must have {main!r}")
    if not item:
        raise GridError(
            f"{content.where(name)}an entry of {name} must have {main!r} or {optional[0]!r}, got none of them"
        )
    item.setdefault(main, None)
    return _with_text(item, main)


def _with_text(entry: Mapping, main: str) -> Mapping:
    if entry[main] is not None and not entry[main].strip():
        raise GridError(f"{entry.where(main)}{main} must not be empty, got {entry[main]!r}")
    return entry


def _seed(item: Any, content: Mapping) -> int:
    if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**63:
        raise GridError(f"{content.where('seeds')}a seed must be an integer in [0, 2**63), got {shown(item)}")
    return item


def _cache(item: Any, content: Mapping) -> str | None:
    if item is None:
        return None
    if not isinstance(item, str):
        raise GridError(f"{content.where('caches')}a cache must be text or null, got {shown(item)}")
    try:
        parse_cache(item)
    except ValueError as error:
        raise GridError(f"{content.where('caches')}{error}") from error
    return item


def _methods(content: Mapping, values: dict[str, Any]) -> list[tuple[dict[str, Any], Mapping]]:
    budgets = None if values["budgets"] is None else _list(content, values, "budgets")
    found = []
    for item in _list(content, values, "methods"):
        entry = Mapping({"method": item}) if isinstance(item, str) else item
        if not isinstance(entry, Mapping):
            raise GridError(
                f"{content.where('methods')}an entry of methods must be text or keys and values, got {shown(item)}"
            )
        entry.line = entry.line or content.lines.get("methods", 0)
        found += [(settings, entry) for settings in _product(entry, budgets)]
    if not 1 <= len(found) <= MOST_METHODS:
        raise GridError(
            f"{content.where('methods')}methods must come to 1 to {MOST_METHODS} settings, got {len(found)}: change their lists"
        )
    return found


def _product(entry: Mapping, budgets: list[Any] | None) -> Iterator[dict[str, Any]]:
    """Every combination of the settings that are lists, each validated with its line."""
    method = entry.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise GridError(f"{entry.where('method')}method must be one of {', '.join(METHODS)}, got {shown(method)}")
    config = METHODS[method]
    names = [field.name for field in fields(config)]
    entry.check(f"method {method}", ["method", *names])
    settings: dict[str, Any] = dict(entry)
    rival = any(name in settings for name in config.rivals)
    if budgets is not None and not rival and (axis := config.sweep_field()) is not None:
        settings.setdefault(axis[0], budgets)
    choices = [
        [(key, one) for one in (value if isinstance(value, list) else [value])] for key, value in settings.items()
    ]
    if (count := math.prod(map(len, choices))) > MOST_METHODS:
        raise GridError(
            f"{entry.where()}method {method} must have at most {MOST_METHODS} settings, got {count}: fewer values"
        )
    for combination in itertools.product(*choices):
        chosen = dict(combination)
        try:
            config_from_dict(chosen)
        except (ValueError, TypeError) as error:
            key = next((key for key in chosen if key in str(error)), None)
            raise GridError(f"{entry.where(key)}{error}") from error
        yield chosen
