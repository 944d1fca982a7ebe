"""scripts/check_types.py: what it leaves out is jit code, and no more."""

import json
import subprocess
import sys

import pytest
from scripts_support import SCRIPTS, load_script


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield load_script("check_types.py")
    sys.path.remove(str(SCRIPTS))


def test_only_jit_code_is_left_out(script, monkeypatch, tmp_path):
    asked = []

    def run(command):
        asked.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script.subprocess, "run", run)
    (tmp_path / "build").mkdir()
    assert script.main() == 3  # pyright's exit code
    folder = tmp_path / "build" / "types"
    settings = json.loads((folder / "pyrightconfig.json").read_text())
    assert settings["include"] == ["svg"] and str(folder) in asked[0]
    left_out = {folder / path for path in settings["exclude"]}
    assert left_out == {path for path in (folder / "svg").rglob("*.py") if script.has_jit_code(path)}
    assert all((folder / "svg" / "kernels") in path.parents for path in left_out)


def test_jit_code_is_told_from_host_code(script):
    kernels = SCRIPTS.parent / "kernels"
    assert script.has_jit_code(kernels / "block_sparse" / "triton.py")
    assert script.has_jit_code(kernels / "gluon" / "ring.py")
    assert not script.has_jit_code(kernels / "block_sparse" / "op.py")
