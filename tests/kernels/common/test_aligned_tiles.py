import pytest
import torch

from svg.kernels.common import target
from svg.kernels.common.aligned_tiles import ALIGN, aligned_key_tiles, aligned_key_tiles_reference, separate_key_tiles

pytestmark = pytest.mark.skipif(not target.INTERPRETED, reason="lists that only the Triton kernels read")


@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize("clusters", [1, 7, 40])
def test_against_the_specification(clusters, block_n):
    sizes = torch.randint(0, 90, (3, clusters), dtype=torch.int32)
    sizes[sizes < 15] = 0
    sizes[:, 0] += 1
    tokens = int(sizes.sum(1).max())
    sizes[:, -1] += tokens - sizes.sum(1, dtype=torch.int32)
    block_map = torch.rand(3, 9, clusters) < torch.linspace(0, 1, 9)[None, :, None]
    tiles, counts = aligned_key_tiles(block_map, sizes, tokens, block_n)
    right = aligned_key_tiles_reference(block_map, sizes, tokens, block_n)
    for m in range(3):
        for row in range(9):
            full, used = counts[m, row].tolist()
            found = [(entry // block_n, entry % block_n + 1) for entry in tiles[m, row, :used].tolist()]
            assert sorted(found) == right[m][row]
            assert all(first % ALIGN == 0 and keys == block_n for first, keys in found[:full])
            assert all(first % ALIGN + keys <= block_n for first, keys in found)
            assert not any(first % ALIGN == 0 and keys == block_n for first, keys in found[full:])


@pytest.mark.parametrize(("last", "text"), [(64, 0), (1, 0), (64, 200), (64, 33)])
def test_clusters_that_begin_at_tiles(last, text):
    sizes = torch.tensor([[64, 64, 64, last, text, 40 if text else 0]] * 2, dtype=torch.int32)
    tokens = int(sizes[0].sum())
    block_map = torch.rand(2, 9, 6) < torch.linspace(0, 1, 9)[None, :, None]
    block_map[..., 5] = False  # padding
    tiles, counts = separate_key_tiles(block_map, sizes, tokens, 64)
    right = aligned_key_tiles_reference(block_map, sizes, tokens, 64)
    for m in range(2):
        for row in range(9):
            full, used = counts[m, row].tolist()
            found = [(entry // 64, entry % 64 + 1) for entry in tiles[m, row, :used].tolist()]
            assert sorted(found) == right[m][row]
            assert [keys == 64 for _, keys in found] == [True] * full + [False] * (used - full)
