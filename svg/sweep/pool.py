"""Where cells run: in this process, in several of this machine, or in a Ray cluster. All give futures; none touches a folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import numpy as np
import torch

from svg.pipelines import StepProgress

from .cell import Cell
from .worker import Worker

_STORE_BYTES = 512 * 2**20


class Pool(Protocol):
    """Workers by number."""

    size: int

    def submit(self, slot: int, cell: Cell, reference: np.ndarray | None) -> Future:
        """Start a cell on worker `slot`, which is idle; the future gives what Worker.run returns."""
        ...

    def lost(self, slot: int, error: BaseException) -> bool:
        """Whether an error means that the worker is gone, not that the cell failed; the worker is then replaced."""
        ...

    def close(self) -> None:
        """Stop what runs and give everything back."""


class LocalPool:
    """One worker, in a thread of this process.

    Args:
        device: "cpu", "cuda" or "cuda:<index>".
        on_step: told about every step.
    """

    size = 1

    def __init__(self, device: str, on_step: Callable[[Cell, StepProgress], None] | None = None):
        self._worker = Worker(device, on_step=on_step)
        self._thread = ThreadPoolExecutor(1, "svg-sweep")

    def submit(self, slot: int, cell: Cell, reference: np.ndarray | None) -> Future:
        return self._thread.submit(self._worker.run, cell, reference)

    def lost(self, slot: int, error: BaseException) -> bool:
        return False

    def close(self) -> None:
        self._worker.stop.set()
        self._thread.shutdown(cancel_futures=True)


class ProcessPool:
    """Processes of this machine, one a GPU or `workers` on its CPU; each loads a model once.

    Args:
        device: "cuda" or "cpu".
        workers: how many.
        threads: CPU threads of a process; None: this process' share for each of them.

    Raises:
        ValueError: the machine has fewer GPUs than workers.
    """

    def __init__(self, device: str, workers: int, threads: int | None = None):
        there = torch.cuda.device_count()
        if device != "cpu" and workers > there:
            raise ValueError(
                f"workers must be at most {there}, this machine's GPUs, got {workers}: give fewer --workers"
            )
        self.size = workers
        self._device, self._threads = device, threads or max(1, torch.get_num_threads() // workers)
        self._context = multiprocessing.get_context("spawn")  # CUDA cannot be forked
        self._stop = self._context.Event()
        self._executors = [self._start(slot) for slot in range(workers)]

    def submit(self, slot: int, cell: Cell, reference: np.ndarray | None) -> Future:
        return self._executors[slot].submit(_run_here, cell, reference)

    def lost(self, slot: int, error: BaseException) -> bool:
        if not isinstance(error, BrokenProcessPool):
            return False
        self._executors[slot].shutdown(wait=False)
        self._executors[slot] = self._start(slot)
        return True

    def close(self) -> None:
        self._stop.set()
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)

    def _start(self, slot: int) -> ProcessPoolExecutor:
        device = "cpu" if self._device == "cpu" else f"cuda:{slot}"
        return ProcessPoolExecutor(1, self._context, _start_here, (device, self._threads, self._stop))


_here: Worker | None = None


def _start_here(device: str, threads: int, stop: Any) -> None:
    """Make this process' worker; an interrupt is its parent's to handle."""
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _here = Worker(device, threads)
    _here.stop = stop


def _run_here(cell: Cell, reference: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray]:
    assert _here is not None, "a process begins with `_start_here`"
    return _here.run(cell, reference)


class RayPool:
    """Actors of a Ray cluster, one a GPU or `workers` on CPUs; each loads a model once.

    Args:
        address: address of a running cluster, "auto", or "local" to start one on this machine.
        device: "cuda" or "cpu".
        workers: actors; None: one a GPU, or one on a CPU.
        threads: CPU threads of an actor; None: this process' share for each of them.

    Raises:
        ValueError: ray is missing, or the cluster has fewer GPUs (CPUs) than workers.
    """

    def __init__(self, address: str, device: str, workers: int | None, threads: int | None = None):
        self._ray = import_ray()
        start_ray(self._ray, address, workers or max(1, torch.cuda.device_count()))
        kind = "GPU" if device == "cuda" else "CPU"
        there = int(self._ray.cluster_resources().get(kind, 0))
        self.size = workers or (there if device == "cuda" else 1)
        if not 1 <= self.size <= there:
            raise ValueError(
                f"workers must be in [1, {there}], the cluster's {kind}s, got {self.size}: "
                f"give fewer --workers, another --device, or a larger cluster"
            )
        resources = {"num_gpus": 1, "num_cpus": 1} if device == "cuda" else {"num_cpus": 1}
        self._actor = self._ray.remote(**resources)(Worker)
        self._device = device
        self._threads = threads or max(1, torch.get_num_threads() // self.size)
        self._actors = [self._start() for _ in range(self.size)]
        self._reference: tuple[str | None, Any] | None = None

    def submit(self, slot: int, cell: Cell, reference: np.ndarray | None) -> Future:
        return self._actors[slot].run.remote(cell, self._stored(cell, reference)).future()

    def lost(self, slot: int, error: BaseException) -> bool:
        exceptions = self._ray.exceptions
        gone = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.ObjectLostError)
        if isinstance(error, exceptions.RayTaskError) or not isinstance(error, gone):
            return False
        self._actors[slot] = self._start()
        return True

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()

    def _start(self) -> Any:
        return self._actor.remote(self._device, self._threads)

    def _stored(self, cell: Cell, reference: np.ndarray | None) -> Any:
        """The reference's frames in the cluster's store, once for all the cells that follow each other."""
        if reference is None:
            return None
        if self._reference is None or self._reference[0] != cell.reference:
            self._reference = (cell.reference, self._ray.put(reference))
        return self._reference[1]


def import_ray() -> Any:
    """The ray package.

    Raises:
        ValueError: it isn't installed.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("--ray needs the extra `ray`: pip install 'svg-video[ray]'") from error
    return ray


def start_ray(ray: Any, address: str, workers: int) -> None:
    """Connect to a cluster, or start one on this machine.

    Raises:
        ValueError: there is no cluster at the address.
    """
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == "local":
            ray.init(num_cpus=workers, object_store_memory=_STORE_BYTES, **quiet)
        else:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--ray must be `local` or the address of a running cluster, got {address}: {error}"
        ) from error
