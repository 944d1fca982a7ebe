"""Where modules of earlier releases are now; importing one by its old name works for one release, and warns."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# old module -> new module
MODULES = {
    "svg.adapt": "svg.recordings.layer_precisions",
    "svg.adapt_command": "svg.cli.adapt",
    "svg.command": "svg.generate.command_line",
    "svg.doctor": "svg.cli.doctor",
    "svg.drop_in": "svg.functional.quantised",
    "svg.drop_in_sparge": "svg.functional.sparge",
    "svg.eval.journal": "svg.sweep.journal",
    "svg.evaluate": "svg.eval.pairs",
    "svg.fingerprint": "svg.pipelines.fingerprint",
    "svg.guard": "svg.engine.guard",
    "svg.job": "svg.generate.job",
    "svg.kernels.aligned_tiles": "svg.kernels.common.aligned_tiles",
    "svg.kernels.block_sparse_hopper": "svg.kernels.block_sparse.hopper",
    "svg.kernels.block_sparse_quantised_hopper": "svg.kernels.block_sparse_quantised.hopper",
    "svg.kernels.computed_pairs": "svg.kernels.selection.computed_pairs",
    "svg.kernels.fp4_attention": "svg.kernels.dense_quantised.nvfp4",
    "svg.kernels.heads": "svg.kernels.common.heads",
    "svg.kernels.kmeans_hopper": "svg.kernels.clustering.kmeans_hopper",
    "svg.kernels.merge": "svg.kernels.common.merge",
    "svg.kernels.neighbours": "svg.kernels.clustering.neighbours",
    "svg.kernels.norm_rope": "svg.kernels.elementwise",
    "svg.kernels.nvfp4": "svg.kernels.quantize.nvfp4",
    "svg.kernels.permute": "svg.kernels.clustering.permute",
    "svg.kernels.precision": "svg.kernels.quantize.precision",
    "svg.kernels.probe": "svg.kernels.selection.probe",
    "svg.kernels.quantised_hopper": "svg.kernels.dense_quantised.hopper",
    "svg.kernels.quantised_tile": "svg.kernels.common.quantised_tile",
    "svg.kernels.quantize_values": "svg.kernels.quantize.channels",
    "svg.kernels.sparge": "svg.kernels.selection.sparge",
    "svg.kernels.target": "svg.kernels.common.target",
    "svg.kernels.top_p": "svg.kernels.selection.top_p",
    "svg.kernels.training_backward_hopper": "svg.kernels.training.backward_hopper",
    "svg.kernels.training_hopper": "svg.kernels.training.forward_hopper",
    "svg.kernels.varlen_attention": "svg.kernels.dense_quantised.varlen",
    "svg.layer_file": "svg.methods.sage.layers_file",
    "svg.layout": "svg.engine.layout",
    "svg.method_config": "svg.config.base",
    "svg.methods.orders": "svg.methods.video_order",
    "svg.methods.plan": "svg.engine.plan",
    "svg.methods.sparge_fit": "svg.recordings.sparge_fit",
    "svg.record": "svg.recordings.record",
    "svg.sage_config": "svg.methods.sage.config",
    "svg.sparge_command": "svg.cli.sparge_tune",
    "svg.sparge_tune": "svg.recordings.sparge_tune",
    "svg.state": "svg.engine.state",
    "svg.sweep.commands": "svg.cli.sweep",
    "svg.sweep.display": "svg.cli.sweep_display",
    "svg.sweep.recorded": "svg.recordings.sweep",
    "svg.tables": "svg.cli.console",
    "svg.thresholds": "svg.methods.sparge.thresholds_file",
    "svg.training": "svg.functional.training",
    "svg.tune.commands": "svg.cli.tune",
    "svg.tune.display": "svg.cli.tune_display",
    "svg.tune.stage": "svg.tune.video_trials",
    "svg.versions": "svg.environment",
}
# old module -> the modules its names are in now
SPLIT = {
    "svg.kernels.kmeans": (
        "svg.kernels.clustering.kmeans",
        "svg.kernels.clustering.assign",
        "svg.kernels.clustering.means",
    ),
    "svg.kernels.quantised_attention": (
        "svg.kernels.dense_quantised.op",
        "svg.kernels.dense_quantised.reference",
        "svg.kernels.dense_quantised.triton",
    ),
    "svg.kernels.rounded_attention": (
        "svg.kernels.common.rounded",
        "svg.kernels.common.smoothing",
        "svg.kernels.common.checks",
    ),
    "svg.kernels.training_attention": (
        "svg.kernels.training.op",
        "svg.kernels.training.reference",
        "svg.kernels.training.forward",
        "svg.kernels.training.sequences",
    ),
    "svg.kernels.training_backward": (
        "svg.kernels.training.op",
        "svg.kernels.training.reference",
        "svg.kernels.training.backward",
    ),
    "svg.kernels.training_inputs": ("svg.kernels.training.inputs", "svg.kernels.training.sequences"),
}
# package that was one module -> where the names of that module are now
PACKAGES = {
    "svg.generate": "svg.generate.run_job",
    "svg.methods.sage": "svg.methods.sage.precision",
    "svg.methods.sparge": "svg.methods.sparge.plan",
    "svg.methods.svg1": "svg.methods.svg1.plan",
    "svg.methods.svg2": "svg.methods.svg2.plan",
    "svg.kernels.block_sparse": (
        "svg.kernels.block_sparse.op",
        "svg.kernels.block_sparse.blocks",
        "svg.kernels.block_sparse.triton",
        "svg.kernels.common.tile_lists",
    ),
    "svg.kernels.block_sparse_quantised": (
        "svg.kernels.block_sparse_quantised.op",
        "svg.kernels.block_sparse_quantised.reference",
        "svg.kernels.block_sparse_quantised.triton",
    ),
    "svg.kernels.quantize": "svg.kernels.quantize.tokens",
}


class _Finder(Loader):
    """Asked after all others, hence for names alone that are nowhere else; gives the very module that has moved."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        homes = _homes(name, {**MODULES, **SPLIT})
        if not homes:
            return None
        _warn(name, " and ".join(homes))
        return ModuleSpec(name, _Finder())

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        package, _, child = name.rpartition(".")
        if callable(getattr(sys.modules[package], child, None)):
            sys.modules[package].__class__ = _KeepsOperations
        if name in MODULES:
            sys.modules[name] = importlib.import_module(MODULES[name])
        else:
            vars(module)["__getattr__"] = lambda wanted: _look_up(name, SPLIT, wanted)


class _KeepsOperations(ModuleType):
    """A package in which an operation has the name of the module that held it: importing that module does not hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and callable(self.__dict__.get(name))):
            super().__setattr__(name, value)


def _homes(name: str, table: dict[str, str | tuple[str, ...]]) -> tuple[str, ...]:
    found = table.get(name, ())
    return (found,) if isinstance(found, str) else found


def _look_up(old: str, table: dict[str, str | tuple[str, ...]], name: str) -> Any:
    """What the module had by a name; AttributeError where it had nothing of the kind."""
    for home in _homes(old, table) if not name.startswith("__") else ():
        module = importlib.import_module(home)
        if hasattr(module, name):
            if table is PACKAGES:  # an old module has warned when it was imported
                _warn(f"{old}.{name}", f"{home}.{name}")
            return getattr(module, name)
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


def install() -> None:
    """Let old names be imported."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)


def names_of(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that was one module.

    Args:
        package: one of PACKAGES.

    Returns:
        A function of a name that gives what the module had by it.
    """

    def find(name: str) -> Any:
        if importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")  # `from package import module`, which asks here first
        return _look_up(package, PACKAGES, name)

    return find


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=3)
