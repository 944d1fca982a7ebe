"""`int8_rows_matmul` for Hopper, in Gluon: a producer fills a ring of stages, consumers multiply and write their rows.

A tile of ROWS x 256 of the output takes a stage of (ROWS + 256) x 128 bytes from the cache for each 128 of the sum. With
smaller tiles the cache is what bounds the product, at half of the tensor cores' rate.
"""

import torch

from ...common import target
from ...gluon import LOADABLE
from ..rows import QuantizedRows

CONSUMERS = 3
PART = 64  # rows of a consumer
COLUMNS = 256
STEP = 128  # of the sum in a stage
STAGES = 3
REGISTERS = 160
GROUP = 8  # rows of tiles that run together, so that they share columns in the cache


def is_there(device: torch.device) -> bool:
    """Whether a device is one that the kernel is for."""
    return LOADABLE and target.arch(device) == 90


def supports(x: QuantizedRows, weight: QuantizedRows) -> bool:
    """Whether the kernel takes a product: on Hopper, of sides that tensor descriptors can have, a tile or more a multiprocessor.

    Args:
        x: rows of activations [..., K].
        weight: rows of a weight [N, K].
    """
    (N, K), device = weight.shape, x.values.device
    if not is_there(device) or K % 16 or N % 16:
        return False
    return _tiles(x.scale.numel(), N) >= target.sm_count(device)


def _tiles(M: int, N: int) -> int:
    return -(-M // (PART * CONSUMERS)) * -(-N // COLUMNS)


def launch(x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """The product, written.

    Args:
        x: rows of activations [..., K] that `supports` accepted.
        weight: rows of a weight [N, K].
        bias: [N], or None.
        out: [..., N], contiguous, written.
    """
    (N, K), M = weight.shape, x.scale.numel()
    layout = gl.NVMMASharedLayout(128, 8)
    a_desc = TensorDescriptor.from_tensor(x.values.view(-1, K), [PART, STEP], layout)
    b_desc = TensorDescriptor.from_tensor(weight.values, [COLUMNS, STEP], layout)
    _hopper_int8_rows_matmul_kernel[(min(_tiles(M, N), target.sm_count(out.device)),)](
        a_desc, b_desc, x.scale, weight.scale, bias, out, M, N, K, PART=PART, COLUMNS=COLUMNS, STEP=STEP, GROUP=GROUP,
        CONSUMERS=CONSUMERS, STAGES=STAGES, REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip


if LOADABLE:
    from ...gluon import TensorDescriptor, gl, gluon, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from ...gluon.ring import acquire, await_stage, new_ring, release

    @gluon.jit
    def _place_of(t, M, N, ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr):
        """First row and first column of tile t."""
        rows, columns = gl.cdiv(M, ROWS), gl.cdiv(N, COLUMNS)
        group = t // (GROUP * columns)
        height = gl.minimum(rows - group * GROUP, GROUP)
        inside = t % (GROUP * columns)
        return (group * GROUP + inside % height) * ROWS, inside // height * COLUMNS

    @gluon.jit
    def _fetch(
        a_desc, b_desc, boxes, barriers, sizes, PART: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr,
        GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        a_boxes, b_boxes = boxes
        ready, empty = barriers
        tiles, M, N, K = sizes
        n = 0
        for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
            row, column = _place_of(t, M, N, PART * CONSUMERS, COLUMNS, GROUP)
            for k in range(0, K, STEP):
                stage = n % STAGES
                acquire(empty, n, STAGES)
                bar = ready.index(stage)
                mbarrier.expect(bar, (PART * CONSUMERS + COLUMNS) * STEP)
                for part in gl.static_range(CONSUMERS):
                    box = a_boxes.index(stage * CONSUMERS + part)
                    tma.async_copy_global_to_shared(a_desc, [row + part * PART, k], bar, box)
                tma.async_copy_global_to_shared(b_desc, [column, k], bar, b_boxes.index(stage))
                n += 1

    @gluon.jit
    def _multiply(
        OWN: gl.constexpr, vectors, boxes, barriers, sizes, PART: gl.constexpr, COLUMNS: gl.constexpr,
        STEP: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """PART rows of every tile."""
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
        a_boxes, b_boxes = boxes
        ready, empty = barriers
        tiles, M, N, K = sizes
        n = 0
        for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
            row, column = _place_of(t, M, N, PART * CONSUMERS, COLUMNS, GROUP)
            acc = gl.zeros([PART, COLUMNS], gl.int32, layout)
            for k in range(0, K, STEP):
                stage = n % STAGES
                await_stage(ready, n, STAGES)
                a, b = a_boxes.index(stage * CONSUMERS + OWN), b_boxes.index(stage)
                acc = warpgroup_mma(a, b.permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                if k > 0:  # its product is done when this one has begun
                    release(empty, n - 1, STAGES)
                n += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            release(empty, n - 1, STAGES)
            _write(acc, vectors, row + OWN * PART, column, M, N, PART, COLUMNS, layout)

    @gluon.jit
    def _halves(x, layout: gl.constexpr):
        """Left and right half of the columns."""
        half: gl.constexpr = x.shape[1] // 2
        left, right = x.reshape([x.shape[0], 2, half]).permute((0, 2, 1)).split()
        return gl.convert_layout(left, layout), gl.convert_layout(right, layout)

    @gluon.jit
    def _write(
        acc, vectors, row, column, M, N, PART: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr
    ):  # fmt: skip
        """Some columns at a time: no more of them need registers."""
        if COLUMNS > 64:
            left, right = _halves(acc, layout)
            _write(left, vectors, row, column, M, N, PART, COLUMNS // 2, layout)
            _write(right, vectors, row, column + COLUMNS // 2, M, N, PART, COLUMNS // 2, layout)
        else:
            # A thread has eight columns side by side, of the rows that its warp has anyway.
            o_layout: gl.constexpr = gl.DistributedLinearLayout(
                [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
                [64, 64],
            )  # fmt: skip
            a_scale, b_scale, bias, out = vectors
            offs = row + gl.arange(0, PART, gl.SliceLayout(1, layout))
            scale = gl.load(a_scale + offs, mask=offs < M, other=0.0)
            across = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
            wide = acc.to(gl.float32) * scale[:, None] * gl.load(b_scale + across, mask=across < N, other=0.0)[None, :]
            if bias is not None:
                wide += gl.load(bias + across, mask=across < N, other=0.0).to(gl.float32)[None, :]
            wide = gl.convert_layout(wide.to(out.dtype.element_ty), o_layout)
            offs = row + gl.arange(0, PART, gl.SliceLayout(1, o_layout))
            across = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, o_layout))
            inside = (offs < M)[:, None] & (across < N)[None, :]
            gl.store(out + offs.to(gl.int64)[:, None] * N + across[None, :], wide, mask=inside)

    @gluon.jit(do_not_specialize=["M"])
    def _hopper_int8_rows_matmul_kernel(
        a_desc, b_desc, a_scale, b_scale, bias, out, M, N, K, PART: gl.constexpr, COLUMNS: gl.constexpr,
        STEP: gl.constexpr, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
        REGISTERS: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        a_boxes = gl.allocate_shared_memory(gl.int8, [STAGES * CONSUMERS, PART, STEP], a_desc.layout)
        b_boxes = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, STEP], b_desc.layout)
        barriers = new_ring(STAGES, CONSUMERS)
        boxes, vectors = (a_boxes, b_boxes), (a_scale, b_scale, bias, out)
        sizes = (gl.cdiv(M, PART * CONSUMERS) * gl.cdiv(N, COLUMNS), M, N, K)
        if CONSUMERS == 2:
            gl.warp_specialize(
                [
                    (_multiply, (0, vectors, boxes, barriers, sizes, PART, COLUMNS, STEP, GROUP, CONSUMERS, STAGES)),
                    (_multiply, (1, vectors, boxes, barriers, sizes, PART, COLUMNS, STEP, GROUP, CONSUMERS, STAGES)),
                    (_fetch, (a_desc, b_desc, boxes, barriers, sizes, PART, COLUMNS, STEP, GROUP, CONSUMERS, STAGES)),
                ],
                [4, 1],
                [REGISTERS, 24],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_multiply, (0, vectors, boxes, barriers, sizes, PART, COLUMNS, STEP, GROUP, CONSUMERS, STAGES)),
                    (_multiply, (1, vectors, boxes, barriers, sizes, PART, COLUMNS, STEP, GROUP, CONSUMERS, STAGES)),
                    (_multiply, (2, vectors, boxes, barriers, sizes, PART, COLUMNS, STEP, GROUP, CONSUMERS, STAGES)),
                    (_fetch, (a_desc, b_desc, boxes, barriers, sizes, PART, COLUMNS, STEP, GROUP, CONSUMERS, STAGES)),
                ],
                [4, 4, 1],
                [REGISTERS, REGISTERS, 24],
            )  # fmt: skip
