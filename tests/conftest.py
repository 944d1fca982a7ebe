"""Shared by all tests: the same random numbers in every run, and no look at a model hub."""

import os
import signal
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
# A shell that starts pytest in the background makes it and its children ignore SIGINT, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes longest, by file or folder: left out by default, as all tests that are marked slow.
SLOW = (
    *("bench/", "cli/", "scripts/", "kernels/training/", "kernels/dense_quantised/", "kernels/granules/"),
    *("kernels/block_sparse_quantised/", "kernels/clustering/"),
    *("sweep/test_pools", "sweep/test_resume", "sweep/test_sweep", "tune/test_tune", "tune/test_measure"),
    *(
        "pipelines/test_beside_stock",
        "pipelines/test_coexistence",
        "pipelines/test_families",
        "pipelines/test_fused_blocks",
    ),
    *("pipelines/test_generate", "pipelines/test_parallel", "pipelines/test_quantised", "pipelines/test_sparse"),
    *("pipelines/test_steps", "pipelines/test_training"),
    *("recordings/test_layer_precisions", "recordings/test_sparge_tune", "generate/test_partial"),
    *("generate/test_preflight", "generate/test_several_gpus", "sweep/test_caches"),
    *(f"test_packaging.py::test_{name}" for name in ("wheel", "only_svg", "metadata", "version", "bundled")),
    *("eval/test_real_clips", "eval/test_lpips", "functional/test_training"),
    *("test_examples", "test_public_names", "test_moved.py::test_new", "test_moved.py::test_old_modules_do_not"),
)


@pytest.fixture(autouse=True)
def seeded():
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def by_parameter(nodeid):
    """Whether a test is one of the long ones in processes of their own, which those with another parameter can go beside."""
    return nodeid.startswith(("tests/kernels/test_aot.py", "tests/kernels/test_interpreter.py")) and "[" in nodeid


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="all tests, the long ones too (markers: see pyproject.toml)")


def pytest_configure(config):
    if config.option.all:
        config.option.markexpr = ""
    config.option.loadscopereorder = False  # of pytest-xdist: the order below stays


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker("slow")
    if hasattr(config, "workerinput"):  # of two workers none shall begin a long one last
        items.sort(key=lambda item: not by_parameter(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay in one worker, with their fixtures, but for the long ones."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid[nodeid.index("[") :] if by_parameter(nodeid) else super()._split_scope(nodeid)

    return Scheduling(config, log)
