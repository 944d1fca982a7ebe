import pytest
import torch

from svg.kernels.selection.computed_pairs import computed_pairs


@pytest.mark.parametrize(("M", "Cq", "Ck"), [(1, 1, 1), (3, 17, 33), (2, 40, 1100)])
@pytest.mark.parametrize("tail", [0, 1, 30])
def test_counts_pairs(M, Cq, Ck, tail):
    block_map = torch.rand(M, Cq, Ck) < 0.4
    q_sizes, k_sizes = (torch.randint(0, 90, (M, n), dtype=torch.int32) for n in (Cq, Ck))
    expected = []
    for m in range(M):
        total, chosen = 0, block_map[m].tolist()
        for row, queries in enumerate(q_sizes[m].tolist()):
            for column, keys in enumerate(k_sizes[m].tolist()):
                total += queries * (keys if chosen[row][column] else keys > 0 and column < tail)
        expected.append(total)
    assert computed_pairs(block_map, q_sizes, k_sizes, tail).tolist() == expected


def test_does_not_overflow():
    block_map = torch.ones(1, 3, 5, dtype=torch.bool)
    sizes = torch.full((1, 3), 1 << 20, dtype=torch.int32), torch.full((1, 5), 1 << 20, dtype=torch.int32)
    assert computed_pairs(block_map, *sizes).item() == 15 << 40
