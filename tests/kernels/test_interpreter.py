"""The Triton kernels on a CPU: the semantics tests once more under Triton's interpreter, and the interpreter itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svg.kernels.common import target

if target.INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def round_trip(bits, there, back, wide, SIZE: tl.constexpr, NARROW: tl.constexpr):
        offs = tl.arange(0, SIZE)
        values = tl.load(bits + offs)
        tl.store(wide + offs, values.to(tl.float32))
        tl.store(back + offs, values.to(tl.float32).to(NARROW))
        tl.store(there + offs, tl.load(there + offs).to(tl.float32).to(NARROW).to(tl.float32))

    @triton.jit
    def multiply_add(a, b, dot, total, SIZE: tl.constexpr):
        offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        x, y = tl.load(a + offs), tl.load(b + offs)
        tl.store(dot + offs, tl.dot(x, y))
        tl.store(total + offs, x + y)


in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="runs inside the interpreter's own process")
HERE = Path(__file__).parent
# A folder's tests share a process, which takes seconds to start; those beside this file share another.
SUITES = [".", *sorted(path.name for path in HERE.iterdir() if path.is_dir() and list(path.glob("test_*.py")))]


@pytest.mark.interpreter
@pytest.mark.skipif(target.INTERPRETED, reason="starts the interpreter's process")
@pytest.mark.parametrize("suite", SUITES)
def test_kernels_pass_the_same_tests_as_their_references(suite):
    files = sorted(map(str, (HERE / suite).glob("test_*.py")))
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--all", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_canary_256_values_survive_and_round_to_nearest(dtype):
    narrow = {torch.bfloat16: tl.bfloat16, torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}[dtype]
    bits = torch.arange(256, dtype=torch.uint8)
    bits = (bits.to(torch.int16) * 257).view(dtype) if dtype == torch.bfloat16 else bits.view(dtype)
    finite = bits.float().isfinite()
    limit = min(torch.finfo(dtype).max, 1e30)
    there = (torch.randn(256) * torch.logspace(-6, 3, 256)).clamp(-limit, limit)
    expected = there.to(dtype).float()
    back, wide = torch.empty_like(bits), torch.empty(256)
    round_trip[(1,)](bits, there, back, wide, SIZE=256, NARROW=narrow)
    assert torch.equal(wide[finite], bits.float()[finite])
    assert torch.equal(back.float()[finite], bits.float()[finite])
    assert torch.equal(there, expected)


@in_interpreter
def test_bf16_arithmetic():
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    dot, total = torch.empty(32, 32), torch.empty(32, 32, dtype=torch.bfloat16)
    multiply_add[(1,)](a, b, dot, total, SIZE=32)
    torch.testing.assert_close(dot, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, a + b)
