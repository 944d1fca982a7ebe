"""Two and three processes that share a sequence give what one gives; what cannot be split is refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import ulysses_worker as worker
from sparge_blocks import sparge_blocks
from tiny_transformers import FAMILIES

import svg
from svg.config import DenseConfig, SVG2Config
from svg.pipelines.parallel import Ulysses
from svg.pipelines.registry import MODELS

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Number of processes -> (family, method) -> output and densities; each is run once."""
    known = {}

    def run(processes):
        if processes in known and known[processes] is None:
            pytest.fail(f"{processes} processes have failed before")
        if processes not in known:
            known[processes] = None
            path = tmp_path_factory.mktemp("ulysses") / "out.pt"
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            environment = {
                **os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            ranks = [
                subprocess.Popen(
                    [sys.executable, str(SUPPORT / "ulysses_worker.py"), str(path)],
                    env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
                )
                for rank in range(processes)
            ]  # fmt: skip
            errors = [rank.communicate(timeout=280)[1] for rank in ranks]
            assert not any(rank.returncode for rank in ranks), errors[0][-3000:]
            known[processes] = torch.load(path)
        return known[processes]

    return run


small_blocks = sparge_blocks(6, 3)


@pytest.mark.parametrize("method", worker.METHODS)
@pytest.mark.parametrize("name", worker.PARALLEL)
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_what_one_gives(together, processes, name, method):
    """Three heads on two ranks, 105 tokens (420 in LTX) on two and three; every rank's heads do what one process does."""
    out, densities = together(processes)[name, method]
    alone, expected = worker.outputs(name, worker.METHODS[method])
    # A last bit that differs may round to another 8-bit number.
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-4 if method == "sage2" else 1e-5)
    for found, wanted in zip(densities, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def parallel(transformer, **changes):
    config = SimpleNamespace(ring_degree=1, ulysses_degree=2, _ulysses_mesh=SimpleNamespace(get_group=lambda: None))
    vars(config).update(changes)
    for module in transformer.modules():
        if hasattr(module, "processor"):
            module.processor._parallel_config = SimpleNamespace(context_parallel_config=config)
    return transformer


def test_ring_is_refused_in_words():
    transformer = parallel(FAMILIES["wan"].make(), ring_degree=2)
    with pytest.raises(NotImplementedError, match="ring_degree must be 1: in a ring no rank sees all keys"):
        svg.accelerate(transformer, DenseConfig())


@pytest.mark.parametrize("name", [name for name in FAMILIES if not MODELS[FAMILIES[name].kind].parallel])
def test_a_family_whose_split_is_not_known_is_refused(name):
    """Wan's VACE, Animate and SkyReels among them, whose conditions Diffusers does not split with the video."""
    transformer = parallel(FAMILIES[name].make())
    with pytest.raises(
        NotImplementedError, match=f"context parallelism must be off for {FAMILIES[name].kind}: it is not"
    ):
        svg.accelerate(transformer, DenseConfig())


def test_settings_of_single_heads_are_refused():
    config = SVG2Config(head_top_p=((0.5,) * 3,) * 2)
    with pytest.raises(
        NotImplementedError, match="settings of single heads must be left out under context parallelism"
    ):
        svg.accelerate(parallel(FAMILIES["wan"].make()), config)


def test_parallelism_that_is_enabled_later_is_checked_too():
    transformer = svg.accelerate(FAMILIES["mochi"].make(), DenseConfig())
    parallel(transformer)
    with svg.at_step(transformer, 0, 1), pytest.raises(NotImplementedError, match="must be off for Mochi"):
        transformer(**FAMILIES["mochi"].inputs(1, 3, 4, 6))


def test_more_ranks_than_heads_are_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 4)
    with pytest.raises(ValueError, match="ulysses_degree must be at most the number of heads and of tokens, 3 and 90"):
        Ulysses(None, 90, 3)


def test_a_plan_for_every_family_that_runs_in_parallel():
    for name in worker.PARALLEL:
        assert svg.context_parallel_plan(FAMILIES[name].make())
    with pytest.raises(NotImplementedError, match="has no plan for context parallelism"):
        svg.context_parallel_plan(FAMILIES["mochi"].make())
