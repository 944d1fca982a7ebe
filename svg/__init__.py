"""Sparse attention for video diffusion transformers: the same video from a fraction of the attention, no retraining.

A tour, with any supported Diffusers pipeline `pipe`:

    svg.accelerate(pipe)                  what suits the model; or "quality", "balanced", "fast", a method, a preset
    video = pipe(prompt).frames[0]        as ever
    print(svg.summary(pipe))              how much was computed, how much faster it was
    svg.restore(pipe)                     the pipeline is as it was

    with svg.accelerated(pipe, "fast"):   the same for a block
    svg.report(pipe)                      every number, by step, layer and head

Settings: svg.NearConfig(budget=0.25), svg.SVG2Config(top_p=0.9), svg.SVG1Config, svg.SpargeConfig, svg.Sage2Config ...
Presets: svg.load_preset(name).
Attention for any model: svg.attention (8 and 4 bits), svg.attention_varlen, svg.sparge_attention,
svg.dense_attention, and with gradients svg.training_attention; svg.int8_training(transformer) for fine-tuning.
Your own transformer: svg.register_model(svg.ModelSpec(...)), svg.at_step; what is known: svg.supported_models().
Several GPUs: svg.context_parallel_plan.

The module logs under "svg": one line at INFO when it attaches, a WARNING where a slow path runs.
In a shell: `svg --help`, `svg generate "a prompt"`, `svg doctor`. Names load on first use: `import svg` needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from typing import TYPE_CHECKING

from . import _moved

if TYPE_CHECKING:  # for editors and type checkers; at run time `__getattr__` finds the same names
    from svg.configs import load_preset as load_preset
    from svg.pipelines.attach import accelerate as accelerate
    from svg.pipelines.attach import accelerated as accelerated
    from svg.pipelines.attach import at_step as at_step
    from svg.pipelines.attach import report as report
    from svg.pipelines.attach import restore as restore
    from svg.pipelines.parallel import context_parallel_plan as context_parallel_plan
    from svg.pipelines.registry import register_model as register_model
    from svg.pipelines.registry import supported_models as supported_models
    from svg.pipelines.run_summary import RunSummary as RunSummary
    from svg.pipelines.run_summary import summary as summary
    from svg.pipelines.spec import ModelSpec as ModelSpec
    from svg.pipelines.training import int8_training as int8_training

    from .config import DenseConfig as DenseConfig
    from .config import MethodConfig as MethodConfig
    from .config import NearConfig as NearConfig
    from .config import Sage2Config as Sage2Config
    from .config import Sage2PlusConfig as Sage2PlusConfig
    from .config import Sage3Config as Sage3Config
    from .config import SpargeConfig as SpargeConfig
    from .config import SVG1Config as SVG1Config
    from .config import SVG2Config as SVG2Config
    from .config import config_from_dict as config_from_dict
    from .engine.layout import TokenLayout as TokenLayout
    from .functional.quantised import attention as attention
    from .functional.quantised import attention_varlen as attention_varlen
    from .functional.sparge import sparge_attention as sparge_attention
    from .functional.training import training_attention as training_attention
    from .methods.dense import dense_attention as dense_attention

__version__ = "0.1.0"

_PUBLIC = {
    "accelerate": "svg.pipelines.attach",
    "accelerated": "svg.pipelines.attach",
    "restore": "svg.pipelines.attach",
    "report": "svg.pipelines.attach",
    "at_step": "svg.pipelines.attach",
    "context_parallel_plan": "svg.pipelines.parallel",
    "ModelSpec": "svg.pipelines.spec",
    "register_model": "svg.pipelines.registry",
    "supported_models": "svg.pipelines.registry",
    "summary": "svg.pipelines.run_summary",
    "RunSummary": "svg.pipelines.run_summary",
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
__all__ = list(_PUBLIC)

# Distributions that install a module called `svg` too and overwrite files of this one, or are overwritten by it.
_FOREIGN = ("svg.py", "svg.path", "sparse-videogen")


if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str):
        if f"svg.{name}" in _moved.MODULES:
            return importlib.import_module(f"svg.{name}")
        home = _PUBLIC.get(name, "svg.config" if name.endswith("Config") else None)
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
