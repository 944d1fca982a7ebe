import pytest
import torch

from svg.kernels import gather_tokens, inverse_permutation, scatter_tokens, sort_labels
from svg.kernels.clustering.permute import CHUNK, new_counters, place_counted
from svg.kernels.common import target

ODD_LENGTHS = (1, 63, 111, 129)


def random_permutation(B, H, S, dtype=torch.int32):
    return torch.rand(B, H, S).argsort(-1).to(dtype)


def as_processor_view(B, H, S, D, dtype=torch.float32):
    """[B, H, S, D] view of a fused [B, S, 3, H, D] projection: strided, last dim contiguous."""
    return torch.randn(B, S, 3, H, D).to(dtype)[:, :, 1].transpose(1, 2)


@pytest.mark.parametrize("S", ODD_LENGTHS)
def test_sort_labels_is_stable_and_counts(S):
    labels = torch.randint(0, 9, (2, 3, S), dtype=torch.int32)
    labels[labels == 4] = 5  # an empty cluster
    permutation, sizes = sort_labels(labels, 9)
    assert permutation.dtype == sizes.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            expected = sorted(range(S), key=lambda t, b=b, h=h: (labels[b, h, t].item(), t))
            assert permutation[b, h].tolist() == expected
            assert sizes[b, h].tolist() == [(labels[b, h] == c).sum().item() for c in range(9)]


def test_sort_labels_beyond_16_bit_clusters():
    labels = torch.tensor([[[40_000, 3, 40_000, 39_999]]], dtype=torch.int32)
    permutation, sizes = sort_labels(labels, 40_001)
    assert permutation.tolist() == [[[1, 3, 0, 2]]]
    assert sizes[0, 0, [3, 39_999, 40_000]].tolist() == [1, 1, 2] and sizes.sum() == 4


def test_sort_labels_names_what_is_wrong():
    with pytest.raises(TypeError, match="labels must be integers"):
        sort_labels(torch.zeros(1, 1, 4), 2)
    with pytest.raises(ValueError, match="num_clusters must be at least 1"):
        sort_labels(torch.zeros(1, 1, 4, dtype=torch.int32), 0)


@pytest.mark.parametrize("S", ODD_LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_gather_and_scatter_undo_each_other(S, dtype):
    x = as_processor_view(2, 3, S, 24, dtype)
    permutation = random_permutation(2, 3, S)
    moved = gather_tokens(x, permutation)
    for b in range(2):
        for h in range(3):
            assert torch.equal(moved[b, h], x[b, h][permutation[b, h].long()])
    assert torch.equal(scatter_tokens(moved, permutation), x)
    assert torch.equal(gather_tokens(moved, inverse_permutation(permutation)), x)


def test_one_permutation_expanded_over_heads():
    x = as_processor_view(2, 3, 65, 64)
    permutation = random_permutation(1, 1, 65, torch.int64).expand(2, 3, 65)
    assert torch.equal(gather_tokens(x, permutation), x[:, :, permutation[0, 0]])


def test_wrong_arguments_are_named():
    x, permutation = torch.zeros(1, 2, 8, 4), random_permutation(1, 2, 8)
    with pytest.raises(ValueError, match=r"permutation must be \[B, H, S\]"):
        gather_tokens(x, permutation[:, :1])
    with pytest.raises(TypeError, match="permutation must be int32 or int64"):
        scatter_tokens(x, permutation.float())
    with pytest.raises(ValueError, match="contiguous in its last dim"):
        gather_tokens(torch.zeros(1, 2, 4, 8).transpose(2, 3), permutation)


@pytest.mark.skipif(not target.INTERPRETED, reason="the reference has a gradient")
def test_gradients_are_refused():
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        gather_tokens(x, random_permutation(1, 1, 4))
    with torch.no_grad():
        gather_tokens(x, random_permutation(1, 1, 4))


@pytest.mark.skipif(not target.INTERPRETED and not torch.cuda.is_available(), reason="kernels, not references")
@pytest.mark.parametrize("clusters", [1, 40, 2500])
def test_counters_are_zero_after_a_sort(clusters):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = torch.randint(0, clusters, (2, 700), dtype=torch.int32, device=device)
    counters = new_counters(2, 700, clusters, labels.device)
    for row in range(2):
        for chunk, part in enumerate(labels[row].split(CHUNK)):
            counters.counts[row, chunk] = torch.bincount(part, minlength=clusters)
    permutation, sizes, ends = place_counted(labels, counters)
    assert torch.equal(permutation, labels.sort(stable=True).indices.int())
    assert torch.equal(ends, sizes.cumsum(1))
    assert not counters.counts.any() and not counters.tickets.any()
