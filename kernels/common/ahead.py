"""Kernels compiled in parallel before they are launched: a function is traced without data, and its launches are noted.

Compiling is one thread's work, a kernel after the other, where each is compiled when it is first launched: 15 s and more for
a method. Most of it is done outside of Python's lock, so that threads share it.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .target import HAS_TRITON

MOST_THREADS = 8  # beyond these they wait for Python's lock

if HAS_TRITON:
    from triton.runtime.jit import JITFunction

_TRACING = threading.Lock()  # while a thread notes launches, no other may begin to


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor where only its type decides what is compiled: at an address that 16 divides."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    def stride(self) -> tuple[int, ...]:
        return self.strides

    @staticmethod
    def data_ptr() -> int:
        return 0

    @staticmethod
    def ptr_range() -> int:
        return 0


@dataclass(frozen=True)
class Noted:
    """A launch that was not made.

    Args:
        kernel: what was to be launched.
        args, kwargs: its arguments, tensors replaced by a Pointer.
    """

    kernel: Any
    args: tuple
    kwargs: dict[str, Any]

    def compile(self, device: torch.device) -> None:
        """Compile it, or read it from Triton's cache; a launch with such arguments finds it then."""
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel.run(*self.args, grid=(1,), warmup=True, **self.kwargs)

    def specialization(self) -> tuple:
        """Equal for launches that are compiled to the same: an integer counts as one, as a multiple of 16, or as any."""
        kinds = [
            value if parameter.is_constexpr else _kind(value)
            for parameter, value in zip(self.kernel.params, self.args, strict=False)
        ]
        named = {p.name: p.is_constexpr for p in self.kernel.params}
        more = ((name, value if named.get(name, True) else _kind(value)) for name, value in sorted(self.kwargs.items()))
        return self.kernel, *kinds, *more


def launches_of(run: Callable[[], Any]) -> list[Noted]:
    """The launches that a function would make, of each that is compiled to the same the first.

    Args:
        run: a function that depends on no tensor's contents. Those it makes have none, and none is changed.

    Returns:
        One `Noted` for each kernel that is compiled.

    Raises:
        Whatever `run` raises; RuntimeErrors of torch where it depends on what a tensor holds.
    """
    noted: list[Noted] = []
    with _TRACING, _noting(noted), warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # that tensors without data have no address
        run()
    return list({launch.specialization(): launch for launch in reversed(noted)}.values())[::-1]


def compile_together(launches: list[Noted], device: torch.device) -> list[Future]:
    """Begin to compile kernels in threads of their own.

    Args:
        launches: as `launches_of` gives them.
        device: the GPU they are for.

    Returns:
        One future a launch.
    """
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "svg-compile")
    try:
        return [pool.submit(_compile, launch, device) for launch in launches]
    finally:
        pool.shutdown(wait=False)


def _compile(launch: Noted, device: torch.device) -> None:
    if threading.main_thread().is_alive():  # else the program ends, and waits for what has begun alone
        launch.compile(device)


@contextmanager
def _noting(noted: list[Noted]) -> Iterator[None]:
    """Note this thread's launches instead of making them; those of other threads are made."""
    jit: Any = JITFunction
    here, run = threading.get_ident(), jit.run

    def note(kernel, *args, grid, warmup, **kwargs):
        if threading.get_ident() != here:
            return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        noted.append(Noted(kernel, tuple(map(_without_data, args)), {k: _without_data(v) for k, v in kwargs.items()}))

    jit.run = note
    try:
        yield
    finally:
        jit.run = run


def _without_data(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, value.shape, value.stride())
    return replace(value, base=_without_data(value.base)) if _is_descriptor(value) else value


def _kind(value: Any) -> Any:
    """What of an argument decides what is compiled."""
    if isinstance(value, Pointer):
        return value.dtype
    if _is_descriptor(value):
        return value.base.dtype, *value.block_shape, repr(getattr(value, "layout", None))
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, value.bit_length() > 31
    return value


def _is_descriptor(value: Any) -> bool:
    """Of tiles of a tensor; Triton and Gluon have a class each."""
    return hasattr(value, "base") and hasattr(value, "block_shape")
