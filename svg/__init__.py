"""Sparse attention for video diffusion transformers. Everything here loads on first use: `import svg` needs no torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings

from . import _moved

__version__ = "0.1.0"

_HOME = {
    "accelerate": "svg.pipelines.attach",
    "restore": "svg.pipelines.attach",
    "report": "svg.pipelines.attach",
    "at_step": "svg.pipelines.attach",
    "context_parallel_plan": "svg.pipelines.parallel",
    "ModelSpec": "svg.pipelines.spec",
    "register_model": "svg.pipelines.registry",
    "supported_models": "svg.pipelines.registry",
    "MethodConfig": "svg.config",
    "DenseConfig": "svg.config",
    "NearConfig": "svg.config",
    "SVG1Config": "svg.config",
    "SVG2Config": "svg.config",
    "SpargeConfig": "svg.config",
    "Sage2Config": "svg.config",
    "Sage2PlusConfig": "svg.config",
    "Sage3Config": "svg.config",
    "config_from_dict": "svg.config",
    "TokenLayout": "svg.engine.layout",
    "attention": "svg.functional.quantised",
    "attention_varlen": "svg.functional.quantised",
    "sparge_attention": "svg.functional.sparge",
    "training_attention": "svg.functional.training",
    "int8_training": "svg.pipelines.training",
    "dense_attention": "svg.methods.dense",
    "load_preset": "svg.configs",
}
# `svg.attend` is the module: a function of that name here would be hidden by it as soon as it is imported.
__all__ = list(_HOME)

# Distributions that install a module called `svg` too and overwrite files of this one, or are overwritten by it.
_FOREIGN = ("svg.py", "svg.path")


def __getattr__(name: str):
    if f"svg.{name}" in _moved.MODULES:
        return importlib.import_module(f"svg.{name}")
    home = _HOME.get(name, "svg.config" if name.endswith("Config") else None)
    if home is None:
        raise AttributeError(f"module 'svg' has no attribute {name!r}; choose from {', '.join(__all__)}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _warn_of_foreign_distributions() -> None:
    for name in _FOREIGN:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        warnings.warn(
            f"{name} is installed and also provides a module called 'svg'; one hides the other. "
            f"Uninstall it, then reinstall svg-video: pip uninstall {name} && pip install --force-reinstall svg-video",
            RuntimeWarning,
            stacklevel=3,
        )


_moved.install()
_warn_of_foreign_distributions()
