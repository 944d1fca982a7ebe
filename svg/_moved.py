"""Where modules of earlier releases are now; importing one by its old name works for one release, and warns."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
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
    "svg.layer_file": "svg.methods.sage.layers_file",
    "svg.layout": "svg.engine.layout",
    "svg.method_config": "svg.config.base",
    "svg.methods.orders": "svg.methods.video_order",
    "svg.methods.plan": "svg.engine.plan",
    "svg.methods.sparge_fit": "svg.recordings.sparge_fit",
    "svg.record": "svg.recordings.record",
    "svg.sage_config": "svg.config.sage",
    "svg.sparge_command": "svg.cli.sparge_tune",
    "svg.sparge_tune": "svg.recordings.sparge_tune",
    "svg.state": "svg.engine.state",
    "svg.summary": "svg.engine.summary",
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
# package that was one module -> where the names of that module are now
PACKAGES = {
    "svg.generate": "svg.generate.run_job",
    "svg.methods.sage": "svg.methods.sage.precision",
    "svg.methods.sparge": "svg.methods.sparge.plan",
    "svg.methods.svg1": "svg.methods.svg1.plan",
    "svg.methods.svg2": "svg.methods.svg2.plan",
}


class _Finder:
    """Asked after all others, hence for names alone that are nowhere else; gives the very module that has moved."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in MODULES:
            return None
        _warn(name, MODULES[name])
        return ModuleSpec(name, _Finder)

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MODULES[module.__name__])


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
        if not name.startswith("__"):
            home = importlib.import_module(PACKAGES[package])
            if hasattr(home, name):
                _warn(f"{package}.{name}", f"{home.__name__}.{name}")
                return getattr(home, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel=3)
