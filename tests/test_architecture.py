"""Imports point one way, and stay relative inside a folder and absolute across folders."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {f"svg.{name}": name for name in ("kernels", "pipelines", "eval", "configs")} | {"svg": "svg"}
# what a person starts: these may import everything
FRONT = {"bench", "cli", "command", "job", "generate", "evaluate", "record", "sweep", "tables", "doctor", "versions", "sparge_tune", "sparge_command"}
FRONT |= {"fingerprint", "tune", "adapt", "adapt_command"}

# package -> project packages it may import from (besides itself); the front is judged apart
ALLOWED = {
    "svg.kernels": set(),
    "svg.eval": set(),
    "svg": {"svg.kernels"},
    "svg.configs": {"svg"},
    "svg.pipelines": {"svg", "svg.kernels", "svg.configs"},
}
FOREIGN = {  # package -> libraries it must not know
    "svg.kernels": {"diffusers", "transformers", "accelerate", "click", "rich", "yaml"},
    "svg.eval": {"diffusers", "transformers", "accelerate", "triton", "click", "rich"},
    "svg": {"diffusers", "transformers", "accelerate", "imageio_ffmpeg", "lpips", "yaml", "PIL"},
    "svg.configs": {"torch", "diffusers", "transformers"},
    "svg.pipelines": {"click", "rich", "lpips", "imageio_ffmpeg"},
}


def sources():
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.parent.name in ("bench", "sweep", "tune")
            front = package == "svg" and (inside or path.parent == ROOT / "svg" and path.stem in FRONT)
            yield pytest.param(package, front, path, id=str(path.relative_to(ROOT)))


def imports(path):
    """(level, dotted name) of every import, those inside functions included; `if TYPE_CHECKING` blocks are not."""
    pending = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ((node.level, f"{module}.{alias.name}".strip(".")) for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def package_of(name):
    return next((package for package in FOLDERS if name == package or name.startswith(package + ".")), None)


@pytest.mark.parametrize("package, front, path", sources())
def test_direction(package, front, path):
    for level, name in imports(path):
        if level:
            depth = len(path.relative_to(ROOT / FOLDERS[package]).parts)
            assert level <= depth, f"{path.name}: a relative import leaves {FOLDERS[package]}/"
            if package == "svg" and not front:
                first = name.split(".")[0]
                assert first not in FRONT, f"{path.name} imports {first}, which is in front of it"
            continue
        target = package_of(name)
        assert target != package, f"{path.name}: import {name} relatively"
        if not front:
            assert name.split(".")[0] not in FOREIGN[package], f"{path.name}: {package} must not know {name}"
            assert target is None or target in ALLOWED[package], f"{path.name}: {package} must not import {name}"


@pytest.mark.parametrize("package", FOLDERS)
def test_every_folder_has_sources(package):
    assert list((ROOT / FOLDERS[package]).glob("*.py"))


def test_import_needs_no_torch():
    code = "import svg, svg.config, svg.cli, sys; assert not {'torch', 'diffusers', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_and_eval_do_not_load_diffusers():
    code = "import svg.kernels, svg.eval.compare, svg.attend, sys; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_but_tests_imports_scripts():
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(name.split(".")[0] in ("scripts", "tests") for _, name in imports(path)), path
