"""Caches that skip blocks, or steps, whose input changed little: Diffusers' own, and cache-dit's DBCache if it is there."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from svg.documents import MEBIBYTE, read_json, shown

# Name on the command line -> class of its config and its one number, by name, with Diffusers' or its authors' value.
CACHES = {
    "first-block": ("FirstBlockCacheConfig", "threshold", 0.05),
    "taylorseer": ("TaylorSeerCacheConfig", "cache_interval", 5),
    "seacache": ("SeaCacheConfig", "threshold", 0.25),
    "dbcache": ("DBCacheConfig", "residual_diff_threshold", 0.08),
}
# Whose numbers are of one model and are read from a file: what Diffusers prints with `MagCacheConfig(calibrate=True)`.
FROM_FILE = {"magcache": ("MagCacheConfig", "mag_ratios")}
CACHE_DIT = ("DBCacheConfig",)
# SeaCache asks for the noise of a step, which these alone pass on; beside others it would run everything, with a warning.
SEA_PIPELINES = ("WanPipeline", "Cosmos3OmniPipeline")
# What TaylorSeer predicts. Diffusers' own pattern wants a name that ends in attn, which Wan's attn1 does not.
PREDICTED = (
    r"(.*\.)?[a-z_]*(blocks|layers)\.\d+\.(.*\.)?(attn\d*|self_attn|self_attention|cross_attention|ffn?|feed_forward)"
)


def parse_cache(text: str) -> tuple[str, str, Any]:
    """Read a cache option.

    Args:
        text: a name of CACHES, "name=number", or "magcache=FILE" with a JSON list of ratios.

    Returns:
        Class of its config, the field of its one number, and the number, or list of numbers.

    Raises:
        ValueError: another name, no number, no such file, or a package that is not installed.
    """
    name, sign, value = text.partition("=")
    if name in FROM_FILE:
        return (*FROM_FILE[name], _ratios(name, value))
    if name not in CACHES:
        raise ValueError(f"cache must be one of {', '.join([*CACHES, *FROM_FILE])}, got {shown(name)}")
    kind, field, default = CACHES[name]
    if kind in CACHE_DIT and importlib.util.find_spec("cache_dit") is None:
        raise ValueError(f"cache {name} needs the package cache-dit, which is not installed: pip install cache-dit")
    try:
        number = type(default)(value) if sign else default
    except ValueError:
        raise ValueError(f"cache must be {name}=NUMBER, such as {name}={default}, got {shown(text)}") from None
    if not 0 < number < math.inf:
        raise ValueError(f"cache must have a finite number above 0, such as {name}={default}, got {shown(text)}")
    return kind, field, number


def cache_file(cache: str) -> str | None:
    """The file that a cache option reads, or None."""
    name, _, value = cache.partition("=")
    return value if name in FROM_FILE else None


def _ratios(name: str, path: str) -> list[float]:
    found = read_json(path, MEBIBYTE) if Path(path).is_file() else None
    if not isinstance(found, list) or not found or not all(map(_is_ratio, found)):
        raise ValueError(
            f"cache must be {name}=FILE with a JSON list of ratios above 0, which Diffusers prints with "
            f"MagCacheConfig(calibrate=True), got {path!r}"
        )
    return [float(one) for one in found]


def _is_ratio(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def enable_cache(pipe: Any, cache: str, steps: int) -> None:
    """Let a pipeline skip blocks whose input changed little since the last step.

    Args:
        pipe: a Diffusers pipeline.
        cache: as `parse_cache` takes it.
        steps: of the run.

    Raises:
        ValueError: as `parse_cache`, or the cache does nothing beside this pipeline.
    """
    import diffusers

    from .attach import transformers_of

    kind, field, value = parse_cache(cache)
    if kind in CACHE_DIT:
        import cache_dit

        cache_dit.enable_cache(pipe, cache_config=getattr(cache_dit, kind)(**{field: value}))
        return
    if kind == "SeaCacheConfig" and type(pipe).__name__ not in SEA_PIPELINES:
        raise ValueError(
            f"cache seacache must be left out for {type(pipe).__name__}, which does not tell it how much noise a step has "
            f"({' and '.join(SEA_PIPELINES)} do): use first-block or taylorseer"
        )
    more = {
        "MagCacheConfig": {"num_inference_steps": steps},
        "TaylorSeerCacheConfig": {"cache_identifiers": [PREDICTED]},
    }
    for transformer in transformers_of(pipe).values():
        transformer.enable_cache(getattr(diffusers, kind)(**{field: value}, **more.get(kind, {})))


def disable_cache(pipe: Any) -> None:
    """Undo `enable_cache`; a pipeline without one is left as it is."""
    from .attach import transformers_of

    if getattr(pipe, "_is_cached", False):  # by cache-dit
        import cache_dit

        cache_dit.disable_cache(pipe)
    for transformer in transformers_of(pipe).values():
        if transformer.is_cache_enabled:
            transformer.disable_cache()
