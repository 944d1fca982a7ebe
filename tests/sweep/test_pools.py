"""Two processes, and a local Ray cluster of two workers: the same results as one process, and a lost worker costs its cell's time only."""

import importlib.util
from concurrent.futures import Future

import pytest
import torch
from sweep_support import results_of, summary_of

from svg.sweep import pool as pool_module
from svg.sweep.grid import cells_of, read_grid
from svg.sweep.pool import ProcessPool, RayPool
from svg.sweep.run import Results, run_sweep


@pytest.fixture
def ray_is_there():
    if importlib.util.find_spec("ray") is None:
        pytest.fail("these tests need ray, which the extra `test` brings: pip install -e '.[test]'")


class Silent:
    """A display that keeps what it is told."""

    def __init__(self):
        self.notes, self.begun = [], []

    def start(self, cells, finished, workers):
        self.workers = workers

    def begin(self, cell):
        self.begun.append(cell.id)

    def end(self, cell, record):
        pass

    def note(self, text):
        self.notes.append(text)


class Murderous:
    """Kills the process of a worker while that runs the third cell."""

    submitted = 0

    def submit(self, slot, cell, reference) -> Future:
        future = super().submit(slot, cell, reference)
        self.submitted += 1
        if self.submitted == 3:
            self.kill(slot)
        return future


class MurderousRay(Murderous, RayPool):
    def kill(self, slot):
        self._ray.kill(self._actors[slot], no_restart=True)


class MurderousProcesses(Murderous, ProcessPool):
    def kill(self, slot):
        next(iter(self._executors[slot]._processes.values())).kill()


def check_same_results(undisturbed, write_grid, pool):
    grid = read_grid(write_grid(), {})
    display = Silent()
    results = Results("out", cells_of(grid, "cpu"), {"command": summary_of(undisturbed)["command"], "lpips": "none"})
    summary = run_sweep(results, pool, display)
    assert display.workers == 2 and summary["counts"]["finished"] == 10
    assert results_of("out") == results_of(undisturbed)
    (lost,) = {cell for cell in display.begun if display.begun.count(cell) > 1}
    assert len(display.begun) == 11 and "its worker was lost, it runs again" in display.notes[0]
    attempts = {cell["id"]: cell["attempts"] for cell in summary["cells"]}
    assert attempts.pop(lost) == 2 and set(attempts.values()) == {1}


def test_same_results_and_a_lost_actor(ray_is_there, undisturbed, write_grid):
    check_same_results(undisturbed, write_grid, lambda: MurderousRay("local", "cpu", 2, torch.get_num_threads()))


def test_same_results_and_a_lost_process(undisturbed, write_grid):
    check_same_results(undisturbed, write_grid, lambda: MurderousProcesses("cpu", 2, torch.get_num_threads()))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="workers must be at most 1, this machine's GPUs, got 2: give fewer --workers"):
        ProcessPool("cuda", 2)


def test_without_ray_the_way_out_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'svg-video\[ray\]'"):
        pool_module.import_ray()
