"""What a model's small JSON files say, before any weights are loaded or fetched; needs neither torch nor Diffusers."""

from __future__ import annotations

import glob
import importlib.resources
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg import documents

from .request import PipelineRules

BUNDLED = "tiny-wan"
TRANSFORMERS = ("transformer", "transformer_2")
INDEX = "model_index.json"

_NEEDED = ("vae", "text_encoder", "tokenizer", "scheduler")
_LIBRARIES = ("diffusers", "transformers")
# Sizes in configs; all others are for Diffusers and Transformers to judge.
_LARGEST = 2**31 - 1
_SIZES = {
    *("patch_size", "patch_size_t", "num_attention_heads", "attention_head_dim", "num_layers", "num_single_layers"),
    *("in_channels", "out_channels", "text_dim", "ffn_dim", "freq_dim"),
    *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "latent_channels", "block_out_channels"),
    *("scale_factor_spatial", "scale_factor_temporal", "spatial_compression_ratio", "temporal_compression_ratio"),
    *("d_model", "d_ff", "d_kv", "num_heads", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Generator:
    """A pipeline class that `svg generate` knows: its transformer and what its call takes."""

    transformer: str
    image: bool = False
    last_image: bool = False
    true_cfg: bool = False
    guidance_in_batch: bool = False


GENERATORS = {
    "WanPipeline": Generator("WanTransformer3DModel"),
    "WanImageToVideoPipeline": Generator("WanTransformer3DModel", image=True, last_image=True),
    "HunyuanVideoPipeline": Generator("HunyuanVideoTransformer3DModel", true_cfg=True),
    "HunyuanVideoImageToVideoPipeline": Generator("HunyuanVideoTransformer3DModel", image=True, true_cfg=True),
    "CogVideoXPipeline": Generator("CogVideoXTransformer3DModel", guidance_in_batch=True),
    "CogVideoXImageToVideoPipeline": Generator("CogVideoXTransformer3DModel", image=True, guidance_in_batch=True),
}


def locate_model(model: str | Path | None) -> str | Path:
    """Where a model is: the Path of a directory that is there, or a hub id as text.

    Raises:
        ValueError: it is neither.
    """
    if model is not None and not isinstance(model, (str, Path)):
        raise TypeError(f"model must be a path, a hub id or {BUNDLED}, got {model!r}")
    if model is None or str(model) == BUNDLED:
        folder = Path(str(importlib.resources.files("svg.pipelines"))) / BUNDLED
        if not folder.is_dir():
            raise ValueError(
                f"model {BUNDLED} must be bundled, got an installation without {folder}; reinstall svg-video"
            )
        return folder
    text = str(model)
    if not text.strip():
        raise ValueError(f"model must be a pipeline's directory, a hub id (owner/name) or {BUNDLED}, got {text!r}")
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise ValueError(
            f"model must be a pipeline's directory, got the file {text}; single-file weights have no configs"
        )
    if _is_path(text):
        raise ValueError(
            f"model must be an existing directory, got the path {documents.shown(text)}, which does not exist"
        )
    if _HUB_ID.fullmatch(text):
        return text
    raise ValueError(
        f"model must be a pipeline's directory, a hub id (owner/name) or {BUNDLED}, got {documents.shown(text)}, which does not "
        "exist here"
    )


def read_index(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """A pipeline's model_index.json, checked to be one that `svg generate` knows.

    Args:
        source: as `locate_model` gives it.
        revision: branch, tag or commit of a hub id.

    Returns:
        Its content.

    Raises:
        ValueError: no such file, or another pipeline or transformer.
    """
    index = read_json(source, INDEX, revision)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in GENERATORS:
        raise ValueError(f"model must be one of {', '.join(GENERATORS)}, got {name} in {source}")
    for component, entry in index.items():
        _check_entry(component, entry, source)
    for component in TRANSFORMERS:
        _, found = index.get(component) or (None, None)  # (library, class)
        if found not in (None, GENERATORS[name].transformer):
            raise ValueError(f"{component} must be one of {GENERATORS[name].transformer}, got {found} in {source}")
    missing = [part for part in _NEEDED if (index.get(part) or [None])[0] is None]
    if not any((index.get(part) or [None])[0] for part in TRANSFORMERS):
        missing.append(TRANSFORMERS[0])
    if missing:
        raise ValueError(f"model must have {', '.join(missing)}, got an {INDEX} without it in {source}")
    return index


def read_rules(source: str | Path, revision: str | None = None) -> PipelineRules:
    """What a pipeline's files say about requests: the same as a loaded pipeline does.

    Args:
        source, revision: as `read_index`.

    Returns:
        Its rules.

    Raises:
        ValueError: a file is missing or damaged, or the pipeline is another one.
    """
    index = read_index(source, revision)
    name = index["_class_name"]
    known = GENERATORS[name]
    vae = read_config(source, "vae/config.json", revision)
    transformer = next(component for component in TRANSFORMERS if (index.get(component) or [None])[0] is not None)
    return PipelineRules(
        name=name,
        transformer=read_config(source, f"{transformer}/config.json", revision),
        spatial=_spatial(vae),
        temporal=vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4,
        image=known.image,
        last_image=known.last_image,
        true_cfg=known.true_cfg,
        guidance_in_batch=known.guidance_in_batch,
        transformers=tuple(part for part in TRANSFORMERS if (index.get(part) or [None])[0] is not None),
    )


def read_config(source: str | Path, name: str, revision: str | None = None) -> dict[str, Any]:
    """A component's config, its sizes checked.

    Args:
        source, name, revision: as `read_json`.

    Returns:
        The object in it.

    Raises:
        ValueError: as `read_json`, or a size is no integer from 1 on.
    """
    config = read_json(source, name, revision)
    for key in sorted(_SIZES & set(config)):
        value = config[key]
        sizes = value if isinstance(value, list) else [value]
        if value is not None and not (sizes and all(type(size) is int and 1 <= size <= _LARGEST for size in sizes)):
            raise ValueError(f"{key} must be integers >= 1, got {documents.shown(value)} in {source}/{name}")
    return config


def check_configs(folder: Path) -> None:
    """Refuse a directory with a component whose config cannot be read, or has sizes that no component has."""
    for path in sorted(folder.glob("*/config.json")):
        read_config(folder, path.relative_to(folder).as_posix())


def check_complete(folder: Path, variant: str | None = None) -> None:
    """Refuse a directory that lacks a component, or its weights in safetensors.

    Args:
        folder: of the pipeline.
        variant: such as "fp16", as file names have it; components without that variant may have the plain one.

    Raises:
        ValueError: naming the first file that is missing.
    """
    check_configs(folder)
    if variant is not None and not any(folder.glob(f"*/*.{glob.escape(variant)}[.-]*")):
        raise ValueError(
            f"variant must be one that is there, got {documents.shown(variant)}, which no file in {folder} has"
        )
    for component, entry in read_index(folder).items():
        if component.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        if not (folder / component).is_dir():
            raise ValueError(f"model must be complete and in safetensors, got {folder} without {component}/")
        if (folder / component / "config.json").is_file():
            _check_weights(folder / component, variant)


def read_json(source: str | Path, name: str, revision: str | None = None) -> dict[str, Any]:
    """A small JSON file of a model.

    Args:
        source: directory or hub id.
        name: the file's path inside it.
        revision: branch, tag or commit of a hub id.

    Returns:
        The object in it.

    Raises:
        ValueError: there is none, it is no JSON object, or the hub does not give it: which of these, and the way out.
    """
    path = source / name if isinstance(source, Path) else _fetch(source, name, revision)
    if not os.path.isfile(path):
        raise ValueError(f"model must be a pipeline's directory, got {source} without {name}")
    try:
        content = documents.read_json(path, documents.MEBIBYTE)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {documents.shown(content)}")
        return content
    except ValueError as error:
        raise ValueError(f"model must have a {name} with one JSON object, got {path}: {error}") from error


def _fetch(repository: str, name: str, revision: str | None) -> Path:
    """A file of the hub, from its cache where it is there."""
    from huggingface_hub import errors, hf_hub_download

    about = f"model must be an existing directory or a reachable hub id with a {name}, got {repository!r}"
    login = "run `hf auth login`, or set HF_TOKEN"
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        raise ValueError(f"{about}, which is gated: accept its terms at {page}, then {login}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{about}, which has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{about}, which the hub does not know: check the spelling; if it is private, {login}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(f"{about}: {_why_offline()}; it is not in the local cache either") from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{about}, which has none: choose its Diffusers version, often named ...-Diffusers") from error
    except (OSError, ValueError) as error:  # what else the network or the cache's disk may give
        raise ValueError(f"{about}: {' '.join(str(error).split())}") from error


def _why_offline() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so nothing is fetched: unset it"
    return "the hub cannot be reached: check the network or its proxy"


def _check_entry(component: str, entry: Any, source: str | Path) -> None:
    """Refuse what is no component (library, class) of libraries that run no code of the model's."""
    if component.startswith("_") or not (isinstance(entry, list) or component in (*_NEEDED, *TRANSFORMERS)):
        return  # a setting of the pipeline
    pair = entry if isinstance(entry, list) and len(entry) == 2 else None
    if entry is None or pair == [None, None]:
        return
    if pair is None or pair[0] not in _LIBRARIES or not isinstance(pair[1], str):
        raise ValueError(
            f"{component} must be a class of {' or '.join(_LIBRARIES)}, got {documents.shown(entry)} in {source}/{INDEX}"
        )


def _check_weights(folder: Path, variant: str | None) -> None:
    for index in folder.glob("*.safetensors.index*.json"):
        shards = set(documents.read_json(index).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ValueError(f"model must be complete and in safetensors, got {folder} without {missing[0]}")
    found = [path.name for path in folder.glob("*.safetensors")]
    if not found:
        raise ValueError(f"model must be complete and in safetensors, got {folder} without weights (*.safetensors)")
    if (
        variant is not None
        and not any(f".{variant}." in name for name in found)
        and all(name.count(".") > 1 for name in found)
    ):
        raise ValueError(
            f"variant must be one that is there, got {variant!r} with {', '.join(sorted(found))} in {folder}"
        )


def _spatial(vae: dict[str, Any]) -> int:
    given = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    if given:
        return given
    blocks = vae.get("block_out_channels")  # CogVideoX: every block but the last halves the picture
    return 2 ** (len(blocks) - 1) if blocks else 8


def _is_path(text: str) -> bool:
    return text.startswith((".", "~", os.sep)) or text.endswith(os.sep) or text.count("/") > 1 or "\\" in text
