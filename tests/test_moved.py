"""Names of the release before still import, give the very same objects, and say what they are now."""

import importlib
import subprocess
import sys

import pytest

import svg
from svg import _moved


@pytest.mark.parametrize("old", _moved.MODULES)
def test_old_module_is_the_new_one_and_warns(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {_moved.MODULES[old]}"):
        found = importlib.import_module(old)
    assert (
        found is importlib.import_module(_moved.MODULES[old])
        and found.__name__ == found.__spec__.name == _moved.MODULES[old]
    )


@pytest.mark.parametrize("old", _moved.SPLIT)
def test_old_module_that_was_split_has_its_names_and_warns(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {' and '.join(_moved.SPLIT[old])}"):
        found = importlib.import_module(old)
    for home in _moved.SPLIT[old]:
        for name, value in vars(importlib.import_module(home)).items():
            if getattr(value, "__module__", None) == home:
                assert getattr(found, name) is value
    with pytest.raises(ImportError, match="no_such_name"):
        exec(f"from {old} import no_such_name")


def test_old_modules_do_not_hide_operations_of_their_names(tmp_path):
    names = ("kmeans", "norm_rope", "quantised_attention", "training_attention", "varlen_attention", "fp4_attention")
    code = f"import svg.kernels as k, types, importlib\nfor n in {names}:\n    importlib.import_module(f'svg.kernels.{{n}}')\n"
    code += f"assert not any(isinstance(getattr(k, n), types.ModuleType) for n in {names})\n"
    code += "from svg.kernels import fp4_attention, permute, quantised_hopper\n"
    code += "assert callable(fp4_attention) and permute.__name__ == 'svg.kernels.clustering.permute'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "package, name",
    [
        ("svg.kernels.block_sparse", "LAUNCH"),
        ("svg.kernels.block_sparse_quantised", "skipped_tiles"),
        ("svg.kernels.quantize", "padded_head_dim"),
        ("svg.generate", "run"),
        ("svg.methods.svg1", "head_kinds"),
        ("svg.methods.sparge", "video_blocks"),
        ("svg.methods.svg2", "Chosen"),
        ("svg.methods.sage", "quantised"),
    ],
)
def test_old_names_of_a_package_that_was_a_module(package, name):
    with pytest.warns(DeprecationWarning, match=f"{package}.{name} is now"):
        found = getattr(importlib.import_module(package), name)
    homes = map(importlib.import_module, _moved._homes(package, _moved.PACKAGES))
    assert any(found is getattr(home, name, None) for home in homes)


def test_attributes_and_unknown_names():
    with pytest.warns(DeprecationWarning):
        sys.modules.pop("svg.drop_in", None)
        svg.__dict__.pop("drop_in", None)
        assert svg.drop_in.attention is svg.attention
    for name in ("no_such_name", "__path_of_nothing__"):
        with pytest.raises(AttributeError, match=name):
            getattr(importlib.import_module("svg.generate"), name)
    with pytest.raises(ImportError):
        importlib.import_module("svg.no_such_module")


def test_new_names_do_not_warn(tmp_path):
    code = "import svg, svg.cli, svg.pipelines, svg.attend, svg.tune.run, svg.cli.tune_display, svg.cli.sweep_display"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:svg", "-c", code], check=True, cwd=tmp_path)
