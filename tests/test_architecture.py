"""Imports point one way, and stay relative inside a folder and absolute across folders."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import svg.kernels.granules  # noqa: F401
from svg import kernels
from svg.kernels import granules

ROOT = Path(__file__).parents[1]
FOLDERS = {f"svg.{name}": name for name in ("kernels", "pipelines", "eval", "configs")} | {"svg": "svg"}
# Folders and modules of svg/ from the ground up; none imports from a layer above its own.
LAYERS = (
    {"config", "documents", "words", "environment", "_moved", "__init__"},
    {"engine"},
    {"methods", "attend", "functional"},
    {"generate", "recordings"},
    {"sweep", "tune", "bench"},
    {"cli", "__main__"},
)
LONGEST_FILE, MOST_PARAMETERS = 450, 10
LIBRARY = set().union(*LAYERS[:3])  # below svg.pipelines; the other layers are a program above it

# package -> project packages it may import from (besides itself); the program is judged apart
ALLOWED = {
    "svg.kernels": set(),
    "svg.eval": {"svg"},
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
TERMINAL = {"click", "rich"}  # for svg/cli/ alone
FORMATS = {"json", "yaml", "csv", "safetensors"}
FILES_OF_THE_LIBRARY = {"svg/documents.py", "svg/methods/sparge/thresholds_file.py", "svg/methods/sage/layers_file.py"}


def sources():
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield pytest.param(package, path, id=str(path.relative_to(ROOT)))


def sources_of_svg():
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted((ROOT / "svg").rglob("*.py"))]


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


def room_of(path):
    """Folder or module right under svg/ that a file of it belongs to."""
    return path.relative_to(ROOT / "svg").with_suffix("").parts[0]


def rooms_imported(path):
    """Folders and modules right under svg/ that a file of it imports from."""
    inside = path.relative_to(ROOT / "svg").parent.parts
    for level, name in imports(path):
        if level:
            whole = [*inside[: len(inside) - level + 1], *name.split(".")]
            yield (
                whole[0]
                if (ROOT / "svg" / whole[0]).is_dir() or (ROOT / "svg" / f"{whole[0]}.py").is_file()
                else "__init__"
            )


def layer_of(room):
    return next(index for index, rooms in enumerate(LAYERS) if room in rooms)


@pytest.mark.parametrize("package, path", sources())
def test_direction(package, path):
    program = package == "svg" and room_of(path) not in LIBRARY
    for level, name in imports(path):
        if level:
            depth = len(path.relative_to(ROOT / FOLDERS[package]).parts)
            assert level <= depth, f"{path.name}: a relative import leaves {FOLDERS[package]}/"
            continue
        target = package_of(name)
        assert target != package, f"{path.name}: import {name} relatively"
        if not program:
            assert name.split(".")[0] not in FOREIGN[package], f"{path.name}: {package} must not know {name}"
            assert target is None or target in ALLOWED[package] or name.startswith("svg._moved"), (
                f"{path.name}: {package} must not import {name}"
            )


def test_every_room_of_svg_has_a_layer():
    found = {room_of(path) for path in (ROOT / "svg").rglob("*.py")}
    assert found == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(found), "a room is in two layers"


@pytest.mark.parametrize("path", sources_of_svg())
def test_no_layer_imports_from_one_above_it(path):
    own = layer_of(room_of(path))
    for room in rooms_imported(path):
        assert layer_of(room) <= own, f"{path.relative_to(ROOT)} imports from svg/{room}, which is above it"


def test_no_circle_among_rooms():
    arrows = {}
    for path in (ROOT / "svg").rglob("*.py"):
        arrows.setdefault(room_of(path), set()).update(set(rooms_imported(path)) - {room_of(path)})
    while arrows:
        free = {room for room, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"circle among {sorted(arrows)}"
        arrows = {room: targets for room, targets in arrows.items() if room not in free}


def test_no_circle_among_files():
    """None of svg/, imports inside functions included."""
    arrows = {}
    for path in (ROOT / "svg").rglob("*.py"):
        inside = path.parent.relative_to(ROOT)
        arrows[path] = set()
        for level, name in imports(path):
            if level:
                parts = [*inside.parts[: len(inside.parts) - level + 1], *name.split(".")]
                target = ROOT.joinpath(*parts)
                found = (target.with_suffix(".py"), target / "__init__.py", target.parent.with_suffix(".py"))
                arrows[path] |= {one for one in found if one.is_file() and one.name != "__init__.py"} - {path}
    while arrows:
        free = [path for path, targets in arrows.items() if not targets & set(arrows)]
        assert free, f"circle among {sorted(str(path.relative_to(ROOT)) for path in arrows)}"
        for path in free:
            del arrows[path]


@pytest.mark.parametrize("path", sources_of_svg())
def test_files_and_terminal_have_their_places(path):
    known = {name.split(".")[0] for level, name in imports(path) if not level}
    if room_of(path) in LIBRARY and str(path.relative_to(ROOT)) not in FILES_OF_THE_LIBRARY:
        assert not known & FORMATS, "file formats of the library are those that docs/architecture.md names"
    if room_of(path) not in ("cli", "__main__"):
        assert not known & TERMINAL, "what a person types and sees in a terminal is svg/cli's"


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


def test_no_file_is_longer_than_a_person_reads():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.js", "*.sh"],
                            cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    files = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lines) > 300 and not {name: count for name, count in lines.items() if count > LONGEST_FILE}


OPERATIONS = {name: getattr(room, name) for room in (kernels, granules) for name in room.__all__}


@pytest.mark.parametrize(
    "operation", [pytest.param(op, id=n) for n, op in OPERATIONS.items() if inspect.isfunction(op)]
)
def test_operations_take_few_parameters(operation):
    """How it is quantised and which blocks are computed are values; their fields may be given by keyword (`**fields`)."""
    assert len(inspect.signature(operation).parameters) <= MOST_PARAMETERS
