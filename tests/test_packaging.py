"""The wheel holds exactly what git tracks in the packaged folders, and installs nothing beside `svg`."""

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PYPROJECT["tool"]["setuptools"]["package-dir"]


def tracked(folder):
    """Files git knows or would add: a file that is about to be committed counts."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return {name for name in names if name and (ROOT / name).is_file()}


def setuptools_is_new_enough():
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tracked files, so that nothing that lies about by accident can help."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked("."):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    offline = ["--no-isolation"] if setuptools_is_new_enough() else []
    subprocess.run([sys.executable, "-m", "build", "--wheel", *offline, "--outdir", out, copy], check=True, cwd=out)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_equals_git(wheel):
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = set()
    for package, folder in FOLDERS.items():
        inside = package.replace(".", "/")
        expected |= {inside + name.removeprefix(folder) for name in tracked(folder)}
    assert packaged == expected


def test_only_svg_is_installed(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"svg"}


def test_every_packaged_folder_is_listed():
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            found.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} needs an __init__.py"
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == found and len(listed) == len(found)


def test_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    fields = Parser().parsestr(wheel.read(name).decode())
    assert fields["Name"] == "svg-video" and fields["Requires-Python"] == ">=3.11"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "svg = svg.cli:main" in wheel.read(name).decode()


def test_version_is_the_same_everywhere(wheel):
    import svg

    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert Parser().parsestr(wheel.read(name).decode())["Version"] == svg.__version__
    assert f"version: {svg.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {svg.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_bundled_model_fits(wheel):
    sizes = [item.file_size for item in wheel.infolist() if "/tiny-wan/" in item.filename]
    assert sum(sizes) <= 40 * 2**20
    assert sum(item.file_size for item in wheel.infolist()) <= 45 * 2**20
