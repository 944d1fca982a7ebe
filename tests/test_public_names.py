"""What editors, type checkers and help() know of `svg`."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import svg

INIT = Path(svg.__file__)
FUNCTIONS = [name for name in svg.__all__ if inspect.isfunction(getattr(svg, name))]


def test_type_checkers_are_shown_the_public_names():
    (block,) = (
        node
        for node in ast.parse(INIT.read_text()).body
        if isinstance(node, ast.If) and "not" not in ast.unparse(node.test)
    )
    shown = {alias.asname for node in block.body for alias in node.names}
    assert shown == set(svg.__all__)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The sources laid out as a wheel has them: the folders beside svg/ hide from tools that look at a checkout."""
    root = tmp_path_factory.mktemp("installed")
    ignore = shutil.ignore_patterns("__pycache__", "tiny-wan")
    shutil.copytree(INIT.parent, root / "svg", ignore=ignore)
    for folder in ("kernels", "pipelines", "eval", "configs"):
        shutil.copytree(INIT.parents[1] / folder, root / "svg" / folder, ignore=ignore)
    return root


def test_jedi_completes_every_public_name(installed):
    jedi = pytest.importorskip("jedi")
    project = jedi.Project(installed)
    found = {completion.name for completion in jedi.Script("import svg\nsvg.", project=project).complete(2, 4)}
    assert set(svg.__all__) <= found
    signature = jedi.Script("import svg\nsvg.accelerate(", project=project).get_signatures(2, 15)[0]
    assert [parameter.name for parameter in signature.params] == ["pipe", "config"]


def test_mypy_knows_types_and_refuses_a_misspelt_name(installed, tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "import svg\n"
        "svg.accelerat(1)\n"
        "reveal_type(svg.summary(1))\n"
        "reveal_type(svg.accelerate(1))\n"
        "reveal_type(svg.SVG2Config(top_p=0.9).top_p)\n"
    )
    unseen = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n"
        for name in ("torch", "diffusers", "transformers", "numpy", "PIL", "triton")
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n{unseen}")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", str(program)]
    env = {"MYPYPATH": str(installed), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert 'Module has no attribute "accelerat"' in run.stdout, run.stdout + run.stderr
    for kind in ("svg.pipelines.run_summary.RunSummary", "int", "float"):
        assert re.search(rf'Revealed type is "(builtins\.)?{kind}"', run.stdout), run.stdout
    assert run.stdout.count("error:") == 1, run.stdout


def test_help_is_a_tour():
    text = svg.__doc__
    for name in ("accelerate", "summary", "restore", "accelerated", "report", "load_preset", "attention", "svg doctor"):
        assert name in text
    assert set(svg.__all__) <= set(dir(svg))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example(name):
    assert "Example:" in getattr(svg, name).__doc__
