"""The one place that asks about hardware: which architecture, how many SMs, whether Triton kernels can run here."""

import contextlib
import contextvars
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for this system: the references still run

    class _NoTriton:
        """Stands in for triton at decoration time; `use_triton` refuses before a kernel could be launched."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = _NoTriton()
    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
INTERPRETER_ARCH = 90
MIN_ARCH = 80
FP8_ARCH = 89
FP4_ARCHS = (100, 103, 120, 121)


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch(device: torch.device) -> int:
    """Compute capability as one number, such as 90; the interpreter poses as 90.

    Args:
        device: where the tensors are.

    Returns:
        10 * major + minor.
    """
    if device.type != "cuda":
        return INTERPRETER_ARCH
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def sm_count(device: torch.device) -> int:
    """Number of streaming multiprocessors; 1 where there is no CUDA device.

    Args:
        device: where the tensors are.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def use_triton(x: torch.Tensor) -> bool:
    """Whether an operation on `x` runs its Triton kernel (CUDA, or the interpreter) or its reference (CPU).

    Args:
        x: any tensor of the operation.

    Raises:
        NotImplementedError: a CUDA tensor where Triton is missing or the GPU is too old.
    """
    if not x.is_cuda:
        return INTERPRETED
    if not HAS_TRITON:
        raise NotImplementedError(
            "CUDA tensors need the package `triton`, which is not installed: install it, or move to CPU"
        )
    if arch(x.device) < MIN_ARCH:
        raise NotImplementedError(
            f"Triton kernels need compute capability {MIN_ARCH / 10} or newer, got {arch(x.device) / 10}: "
            "use a newer GPU, or run on CPU"
        )
    return True


def launch_row(table: Mapping[int, Any], device: torch.device) -> Any:
    """The row of a launch table for a device: its own architecture's, else the newest one below it.

    sm86 shares sm89's shared-memory limit, not sm80's, so it takes sm89's row.

    Args:
        table: architecture -> row.
        device: where the tensors are.
    """
    wanted = {86: 89}.get(arch(device), arch(device))
    return table[max(listed for listed in table if listed <= wanted)]


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` current, because Triton launches on the current one.

    Args:
        x: any tensor of the operation.
    """
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


OVERLAP = True  # whether kernels that follow each other are set up early


def overlapped(device: torch.device) -> dict[str, bool]:
    """Options of a launch whose kernel calls `follow` first: its set-up overlaps the kernel before it (Hopper and newer).

    Args:
        device: where the tensors are.
    """
    early = OVERLAP and not INTERPRETED and arch(device) >= 90
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def has_fp8(device: torch.device) -> bool:
    """Whether FP8 products run on a device: compute capability 8.9 and newer, and everywhere in plain torch.

    Args:
        device: where the tensors are.
    """
    return arch(device) >= FP8_ARCH


def has_fp4(device: torch.device) -> bool:
    """Whether NVFP4 products run natively on a device: compute capabilities 10 and 12.

    Args:
        device: where the tensors are.
    """
    return arch(device) in FP4_ARCHS


def require_fp8(device: torch.device) -> None:
    """Raises where a GPU has no FP8.

    Args:
        device: where the tensors are.

    Raises:
        NotImplementedError: compute capability below 8.9.
    """
    if not has_fp8(device):
        raise NotImplementedError(
            f'FP8 needs compute capability {FP8_ARCH / 10} or newer, got {arch(device) / 10}: use precision "int8-fp16"'
        )


def tiles_of(x: torch.Tensor, tile: list[int]):
    """Tensor descriptor through which a kernel reads tiles of a matrix; what lies outside reads as zero.

    Args:
        x: a contiguous matrix whose rows are a multiple of 16 bytes.
        tile: rows and columns of a tile.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, tile)


def with_workspace(launch, device: torch.device):
    """A kernel launch that may ask for device memory, as descriptors made inside a kernel do.

    Args:
        launch: what `kernel[grid]` gives.
        device: where the memory comes from.

    Returns:
        The same launch; an allocator that the user gave Triton is untouched.
    """

    def run(*args, **kwargs):
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
        return launch(*args, **kwargs)

    return partial(contextvars.copy_context().run, run)


def fits_descriptor(x: torch.Tensor) -> bool:
    """Whether a tensor memory descriptor can address x: start and all strides but the last multiples of 16 bytes.

    Args:
        x: any tensor whose last dim is contiguous.
    """
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def refuse_gradients(op: str, *tensors: torch.Tensor) -> None:
    """Raises where autograd expects a gradient through a kernel that has none.

    Args:
        op: name of the operation, for the message.
        tensors: its floating-point inputs.

    Raises:
        NotImplementedError: gradients are enabled and an input requires one.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"{op} has no backward pass, and an input requires a gradient: call it under torch.no_grad(), "
            "detach the inputs, or train with svg.training_attention"
        )


@triton.jit
def follow(EARLY: tl.constexpr):
    """Waits until the kernel before has ended, and lets the one behind be set up."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
