import pytest
import torch

from svg.kernels.common.heads import move_heads


@pytest.mark.parametrize("S", [1, 63, 130])
@pytest.mark.parametrize("permuted", [False, True])
def test_only_chosen_heads_change(S, permuted):
    x, out = (torch.randn(2, S, 3, 48).bfloat16().transpose(1, 2) for _ in range(2))
    chosen = torch.tensor([[1, 0, 1], [0, 0, 7]], dtype=torch.int32)
    permutation = torch.rand(2, 3, S).argsort(-1).int() if permuted else None
    rows = x if permutation is None else x.gather(2, permutation.long()[..., None].expand_as(x))
    expected = torch.where(chosen[..., None, None] != 0, rows, out)
    move_heads(x, out, chosen, permutation)
    assert torch.equal(out, expected)


def test_shapes_must_fit():
    x = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="out and chosen must fit x"):
        move_heads(x, torch.zeros(1, 2, 5, 8), torch.zeros(2, 2, dtype=torch.int32))
