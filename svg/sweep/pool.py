"""Where cells run: in this process, or in the actors of a Ray cluster. Both give futures and never touch a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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

    def lost(self, slot: int, error: BaseException) -> bool:
        """Whether an error means that the worker is gone, not that the cell failed; the worker is then replaced."""

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
        self._reference: tuple[str, Any] | None = None

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
