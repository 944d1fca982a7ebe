"""Caches of Diffusers that skip blocks whose input changed little since the last step."""

from __future__ import annotations

from typing import Any

# Name on the command line -> class in Diffusers and its one number, by name, with Diffusers' or its authors' value.
# Attention of every block; TaylorSeer's own patterns know none of Wan's and CogVideoX's names, and would cache nothing.
_ATTENTION = r"(.*\.)?(\w+_)?blocks\.\d+\.attn\d*"
CACHES = {
    "first-block": ("FirstBlockCacheConfig", "threshold", 0.05),
    "taylorseer": ("TaylorSeerCacheConfig", "cache_interval", 5),
}


def parse_cache(text: str) -> tuple[str, str, float]:
    """Read a cache option.

    Args:
        text: a name of CACHES, or "name=number".

    Returns:
        Class of its config in Diffusers, the field of its one number, and the number.

    Raises:
        ValueError: another name, or no number.
    """
    name, sign, value = text.partition("=")
    if name not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {name!r}")
    kind, field, default = CACHES[name]
    try:
        return kind, field, type(default)(value) if sign else default
    except ValueError:
        raise ValueError(f"cache must be {name}=NUMBER, such as {name}={default}, got {text!r}") from None


def enable_cache(pipe: Any, cache: str) -> None:
    """Let a pipeline skip blocks whose input changed little since the last step.

    Args:
        pipe: a Diffusers pipeline.
        cache: a name of CACHES, or "name=number".

    Raises:
        ValueError: another name, no number, or a cache that finds nothing to skip in this transformer.
    """
    import diffusers

    from .attach import transformers_of

    kind, field, value = parse_cache(cache)
    settings = {field: value, **({"cache_identifiers": [_ATTENTION]} if cache.startswith("taylorseer") else {})}
    for transformer in transformers_of(pipe).values():
        transformer.enable_cache(getattr(diffusers, kind)(**settings))
        if not any(getattr(module, "_diffusers_hook", None) for module in transformer.modules()):
            transformer.disable_cache()
            raise ValueError(
                f"cache must fit the transformer, got {cache}, which finds no block in {type(transformer).__name__}"
            )


def disable_cache(pipe: Any) -> None:
    """Undo `enable_cache`; a pipeline without one is left as it is."""
    from .attach import transformers_of

    for transformer in transformers_of(pipe).values():
        if transformer.is_cache_enabled:
            transformer.disable_cache()
