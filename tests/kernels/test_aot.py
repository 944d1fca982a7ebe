"""Every kernel compiled ahead of time for each architecture: tensor-core instructions, no spills, shared memory."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from svg.kernels.common import target

pytestmark = [pytest.mark.aot, pytest.mark.skipif(target.INTERPRETED, reason="the interpreter compiles nothing")]
COMPILER = Path(__file__).parents[1] / "support" / "triton_aot.py"
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a block may use
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
KERNELS = {
    "_attention_kernel", "_key_tiles_kernel", "_query_tiles_kernel", "_assign_kernel", "_sum_kernel", "_mean_kernel", "_total_kernel",
    "_move_kernel", "_select_kernel", "_count_kernel", "_place_kernel", "_pairs_kernel", "_merge_kernel", "_mean_score_kernel", "_chain_kernel", "_probe_kernel",
    "_block_statistics_kernel", "_select_blocks_kernel", "_norm_rope_kernel", "_modulate_kernel", "_gate_kernel",
    "_quantize_granules_kernel", "_granules_int8_kernel", "_hopper_granules_int8_kernel",
    "_statistics_kernel", "_quantize_tokens_kernel", "_quantize_channels_kernel", "_quantised_attention_kernel",
    "_pack_queries_kernel", "_pack_keys_kernel", "_pack_gradients_kernel", "_turn_kernel", "_training_forward_kernel",
    "_query_gradient_kernel", "_key_gradient_kernel", "_sparse_quantised_kernel", "_aligned_tiles_kernel", "_separate_tiles_kernel", "_join_statistics_kernel",
    "_quantize_nvfp4_kernel", "_fp4_attention_kernel", "_move_heads_kernel", "_segment_means_kernel", "_scan_kernel", "_centre_kernel", "_hopper_attention_kernel",
    "_hopper_quantised_kernel", "_hopper_sparse_quantised_kernel", "_hopper_training_kernel", "_hopper_query_gradient_kernel", "_hopper_key_gradient_kernel",
    "_hopper_assign_kernel", "_hopper_assign_few_kernel", "_granules_kernel", "_hopper_granules_kernel",
    "_cut_kernel", "_pool_kernel", "_normalizers_kernel", "_scores_kernel", "_floors_kernel", "_histogram_kernel", "_counts_kernel",
    "_ties_kernel", "_lists_kernel", "_sums_kernel", "_density_kernel", "_quantize_rows_kernel", "_activate_kernel", "_quantize_blocks_kernel", "_int8_matmul_kernel",
    "_quantize_int8_rows_kernel", "_modulate_int8_rows_kernel", "_int8_rows_matmul_kernel", "_hopper_int8_rows_matmul_kernel", "_add_rows_kernel",
}  # fmt: skip
HOPPER_ONLY = {name for name in KERNELS if name.startswith("_hopper_")}
# Bytes a thread may spill, with Triton 3.6 or 3.8; the rest none. docs/kernels.md says what they are.
SPILLS = {
    "_int8_matmul_kernel": 16, "_hopper_granules_int8_kernel": 112, "_quantize_granules_kernel": 8,
    "_hopper_attention_kernel": 8, "_hopper_quantised_kernel": 88, "_hopper_sparse_quantised_kernel": 64, "_hopper_training_kernel": 24,
    "_hopper_query_gradient_kernel": 120, "_hopper_granules_kernel": 32, "_floors_kernel": 8, "_hopper_assign_kernel": 40, "_hopper_assign_few_kernel": 8, "_hopper_int8_rows_matmul_kernel": 48,
}  # fmt: skip
ON_TENSOR_CORES = {
    "_attention_kernel",
    "_assign_kernel",
    "_hopper_attention_kernel",
    "_granules_kernel",
    "_hopper_granules_kernel",
    "_normalizers_kernel",
    "_scores_kernel",
    "_hopper_assign_kernel",
    "_hopper_assign_few_kernel",
}
FP8_ONLY = {"_add_rows_kernel", "_quantize_channels_kernel", "_aligned_tiles_kernel", "_quantize_rows_kernel"}
INT8 = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA"}
FP4 = {100: "UTCOMMA", 120: "OMMA"}  # elsewhere fp16 products emulate it
FP8 = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
archs = pytest.mark.parametrize("arch", SHARED_LIMIT)


@cache
def compilation(arch):
    return subprocess.run(
        [sys.executable, "-P", COMPILER, str(arch)],
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def compiled(arch):
    run = compilation(arch)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_no_kernel_is_left_out():
    source = "".join(path.read_text() for path in Path(target.__file__).parents[1].rglob("*.py"))
    assert set(re.findall(r"(\w+_kernel)\[", source)) == KERNELS


@archs
def test_every_kernel_compiles_within_the_limits(arch):
    rows = compiled(arch)
    missing = (FP8_ONLY if arch not in FP8 else set()) | (HOPPER_ONLY if arch != 90 else set())
    assert {row["kernel"] for row in rows} == KERNELS - missing
    for row in rows:
        assert row["spills"] <= SPILLS.get(row["kernel"], 0), row
        # The most is in a loop over rows; in one over tiles of keys 22, of 300 to 900 instructions.
        assert row["reloads"] <= 44, row
        assert row["shared"] <= SHARED_LIMIT[arch], row
        assert not row["stale"], row


@archs
def test_products_run_on_tensor_cores(arch):
    rows = [row for row in compiled(arch) if row["kernel"] in ON_TENSOR_CORES]
    for row in rows:
        # Three TF32 products may take the older instruction where the newer one has no layout for them.
        small = "fp32" in row["case"] or " rows" in row["case"]  # too few rows for a warpgroup's instruction
        allowed = {TENSOR_CORE[arch], "HMMA"} if small else {TENSOR_CORE[arch]}
        assert row["instructions"] and set(row["instructions"]) <= allowed, row


@archs
def test_quantised_products_run_in_8_bits(arch):
    named = ("quantised" in row["kernel"] or "granules_int8" in row["kernel"] for row in compiled(arch))
    rows = [row for row, found in zip(compiled(arch), named) if found]
    assert any("fp8" in row["case"] for row in rows) == (arch in FP8)
    for row in rows:
        assert set(row["instructions"]) == {INT8[arch], FP8[arch] if "fp8" in row["case"] else TENSOR_CORE[arch]}, row


@archs
def test_linears_run_in_int8(arch):
    own = ["_hopper_int8_rows_matmul_kernel"] if arch == 90 else []
    for kernel in ("_int8_matmul_kernel", "_int8_rows_matmul_kernel", *own):
        rows = [row for row in compiled(arch) if row["kernel"] == kernel]
        assert len(rows) == 3 and all(row["instructions"] == [INT8[arch]] for row in rows), rows


@archs
def test_nvfp4_runs_natively_on_blackwell(arch):
    rows = [row for row in compiled(arch) if row["kernel"] == "_fp4_attention_kernel"]
    assert len(rows) == 2
    for row in rows:
        assert row["instructions"] == [FP4.get(arch, TENSOR_CORE[arch])], row
        assert row["scaled"] == (arch in FP4), row


@archs
def test_training_runs_in_8_bits_but_for_one_product(arch):
    found = {}
    for row in compiled(arch):
        if row["kernel"] in ("_training_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel"):
            products = "int8" if "int8" in row["case"] else "bf16"
            found.setdefault((row["kernel"], products), set()).add(frozenset(row["instructions"]))
    int8, both = frozenset({INT8[arch]}), frozenset({INT8[arch], TENSOR_CORE[arch]})
    for products in ("int8", "bf16"):
        assert found["_training_forward_kernel", products] == {int8}
        assert found["_query_gradient_kernel", products] == {both}
    for row in compiled(arch):
        if "training specialised" in row["case"] and row["kernel"] in HOPPER_ONLY:
            assert set(row["instructions"]) == {"IGMMA", "HGMMA"}, row
    # Where dV has a launch of its own, that has no product in 16 bits.
    assert found["_key_gradient_kernel", "int8"] == {both, int8} and found["_key_gradient_kernel", "bf16"] == {both}
