"""The documentation's site is built strictly: a dead link, a name that is gone or a broken page fails."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_site_is_built_and_complete(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_docs.py", "--out", tmp_path], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "svg generate" in (tmp_path / "cli" / "index.html").read_text()
    api = (tmp_path / "api" / "index.html").read_text()
    for name in ("accelerate", "summary", "NearConfig", "attention_varlen", "training_attention"):
        assert name in api
    assert {path.name for path in (tmp_path / "pages").iterdir()} == {"pareto-h100.html", "tune-h100.html"}
    outside = [path for path in tmp_path.rglob("index.html") if "fonts.googleapis" in path.read_text()]
    assert not outside, "no request leaves the pages"


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if page not in listed} == set()


def test_files_that_the_architecture_names_are_there():
    """Paths from the root of the repository, or below a folder that is named in the same line."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(
        re.findall(r"(?:svg|kernels|pipelines|eval|configs|tests|scripts)(?:/\w+)*/\w+\.(?:py|yaml|html)", text)
    )
    assert len(named) > 20 and {path for path in named if not (ROOT / path).is_file()} == set()


@pytest.mark.parametrize(
    "path, name",
    [
        ("svg/methods/svg2/config.py", "top_p"),
        ("svg/methods/svg2/plan.py", "top_p_block_map("),
        ("kernels/selection/top_p.py", "def top_p_block_map("),
        ("kernels/dense_quantised/hopper.py", "of_a_consumer"),
        ("kernels/training/forward_hopper.py", "of_a_consumer"),
        ("kernels/block_sparse/hopper.py", "MAX_REGISTERS ="),
        ("kernels/block_sparse_quantised/hopper.py", "MAX_REGISTERS ="),
        ("pipelines/registry.py", "ModelSpec"),
        ("kernels/common/launch.py", "measured"),
    ],
)
def test_what_the_architecture_says_is_where_is_there(path, name):
    assert path in (ROOT / "docs" / "architecture.md").read_text() or path.endswith("hopper.py")
    assert name in (ROOT / path).read_text()
