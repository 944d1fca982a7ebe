"""Step caches as an axis of a sweep: cells, their names and ids, and that they run beside methods and leave nothing behind."""

import json

import numpy as np
import pytest

from svg.pipelines.caches import parse_cache
from svg.sweep.grid import cells_of, read_grid
from svg.sweep.grid_file import GridError
from svg.sweep.worker import Worker


def cells(name, **flags):
    return cells_of(read_grid(name, flags), "cpu")


def test_caches_multiply_methods_and_leave_other_ids_alone(write_grid):
    plain = cells(write_grid(seeds=[0], methods=["dense", "svg1"]))
    found = cells(write_grid(seeds=[0], methods=["dense", "svg1"], caches=[None, "first-block=0.2", "taylorseer"]))
    assert [cell.label for cell in found] == [
        "dense", "control", "dense cache=first-block=0.2", "dense cache=taylorseer",
        "svg1", "svg1 cache=first-block=0.2", "svg1 cache=taylorseer",
    ]  # fmt: skip
    assert {cell.id for cell in plain} == {found[i].id for i in (0, 1, 4)}
    assert all(cell.reference == found[0].id for cell in found[1:])
    assert "cache" not in found[0].run and found[5].job().cache == "first-block=0.2"
    assert [cell.label for cell in cells(write_grid(seeds=[0], methods=["svg1"]), caches=["taylorseer=2"])][2:] == [
        "svg1 cache=taylorseer=2"
    ]


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        (["nope"], "cache must be one of first-block"),
        ([3], "a cache must be text or null"),
        (["first-block=x"], "NUMBER"),
    ],
)
def test_wrong_caches_are_named(write_grid, caches, message):
    with pytest.raises(GridError, match=message):
        cells(write_grid(caches=caches))


def test_ratios_come_from_a_file_whose_content_counts(write_grid, tmp_path):
    with pytest.raises(ValueError, match="magcache=FILE with a JSON list"):
        parse_cache("magcache=0.1")
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps([1.0, 0.99]))
    assert parse_cache(f"magcache={path}") == ("MagCacheConfig", "mag_ratios", [1.0, 0.99])
    grid = write_grid(seeds=[0], methods=["svg1"], caches=[f"magcache={path}"])
    first = cells(grid)[2].id
    path.write_text(json.dumps([1.0, 0.98]))
    assert cells(grid)[2].id != first


@pytest.mark.parametrize("cache", ["first-block=1e9", "taylorseer=3", "magcache=ratios.json"])
def test_a_cache_skips_and_is_gone_after(write_grid, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ratios.json").write_text(json.dumps([1.0] * 8))
    dense, plain, cached = cells(
        write_grid(seeds=[0], methods=["svg1"], steps=8, caches=[None, cache], control=False, lpips="none")
    )
    worker = Worker("cpu")
    _, reference = worker.run(dense, None)
    first, frames = worker.run(plain, reference)
    record, skipped = worker.run(cached, reference)
    _, again = worker.run(plain, reference)
    calls = [one["transformers"]["transformer"]["calls"]["total"] for one in (record, first)]
    assert calls[0] < calls[1] and record["quality"] is not None
    assert np.array_equal(again, frames) and not np.array_equal(skipped, frames)
