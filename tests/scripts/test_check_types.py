"""scripts/check_types.py: what it leaves out is there, and no more than it says."""

import sys

import pytest
from scripts_support import SCRIPTS, load_script


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield load_script("check_types.py")
    sys.path.remove(str(SCRIPTS))


def test_rooms_left_out_are_there(script, tmp_path):
    folder = script.lay_out(tmp_path / "types")
    assert all((folder / room).is_dir() for room in script.UNCHECKED)


def test_jit_code_is_told_from_host_code(script):
    kernels = SCRIPTS.parent / "kernels"
    assert script.has_jit_code(kernels / "block_sparse" / "triton.py")
    assert script.has_jit_code(kernels / "gluon" / "ring.py")
    assert not script.has_jit_code(kernels / "block_sparse" / "op.py")
