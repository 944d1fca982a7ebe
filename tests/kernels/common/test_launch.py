"""One kind of launch table: whose row a device takes, and whether it was measured."""

import ast
from pathlib import Path

import pytest
import torch

from svg.kernels.block_sparse.triton import LAUNCH as BLOCK_SPARSE
from svg.kernels.clustering.assign import LAUNCH as ASSIGN
from svg.kernels.common import target
from svg.kernels.common.launch import Launch, LaunchTable

KERNELS = Path(target.__file__).parents[1]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("arch, listed", [(80, 80), (86, 89), (89, 89), (90, 90), (103, 100), (121, 120)])
def test_a_device_takes_its_own_row_or_the_newest_one_below(arch, listed, monkeypatch):
    monkeypatch.setattr(target, "arch", lambda device: arch)
    assert BLOCK_SPARSE.row(CUDA, 2, 128) is BLOCK_SPARSE[listed][2, 128]
    assert ASSIGN.row(CUDA, 4) is ASSIGN[listed][4]
    assert LaunchTable({80: 4, 90: 8}).row(CUDA) == (8 if arch >= 90 else 4)


def test_rows_say_whether_they_were_measured():
    assert BLOCK_SPARSE.status(90, 2, 128) == "measured"
    assert BLOCK_SPARSE.status(90, 4, 128) == BLOCK_SPARSE.status(100, 2, 128) == "compiled only"
    assert ASSIGN.status(90, 2) == "measured" and ASSIGN.status(90, 4) == "compiled only"
    assert (
        LaunchTable({90: 1}, measured=[90]).status(90)
        == LaunchTable({90: {1: 1}}, measured=[90]).status(90, 1)
        == "measured"
    )


def test_names_tell_rows_apart():
    rows = [Launch(128, 64, 8, 3), Launch(128, 64, 8, 3, tma=True), Launch(128, 64, 8, 3, specialised=True)]
    rows.append(Launch(128, 64, 8, 3, registers=128))
    assert [row.name() for row in rows] == [
        "128x64_w8_s3",
        "128x64_w8_s3_tma",
        "128x64_w8_s3_specialised",
        "128x64_w8_s3_r128",
    ]


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_a_table_by_architecture_is_a_launch_table(path):
    if path.parent.name == "granules":
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            keys = {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
            assert not {80, 90} <= keys, f"line {node.lineno}: make it a LaunchTable"
