import pytest
import torch

from svg.kernels import neighbour_order, neighbour_order_reference


def test_each_is_followed_by_the_nearest_left():
    centroids = torch.randn(2, 3, 37, 16)
    order = neighbour_order(centroids)
    assert order.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            points, chain = centroids[b, h].double(), order[b, h].tolist()
            assert sorted(chain) == list(range(37))
            assert chain[0] == (points - points.mean(0)).norm(dim=-1).argmax()
            for i in range(36):
                left = chain[i + 1 :]
                apart = (points[left] - points[chain[i]]).norm(dim=-1)
                assert apart[0] <= apart.min() + 1e-5


def test_points_on_a_line_are_walked_along_it():
    place = torch.randperm(100)
    centroids = place[None, None, :, None].float() * torch.ones(16) + 50
    walked = place[neighbour_order(centroids)[0, 0].long()]
    assert (walked.diff().abs() == 1).all()


def test_ties_go_to_the_lowest_index():
    centroids = torch.zeros(1, 1, 20, 4)
    assert neighbour_order(centroids)[0, 0].tolist() == list(range(20))


def test_nan_stays_in_range():
    order = neighbour_order(torch.full((1, 1, 5, 4), torch.nan))
    assert (order >= 0).all() and (order < 5).all()


def test_equals_its_reference():
    centroids = torch.randn(1, 4, 70, 32)
    assert torch.equal(neighbour_order(centroids), neighbour_order_reference(centroids))


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"centroids must be \[B, H, C, D\], got \(3, 4\)"):
        neighbour_order(torch.zeros(3, 4))
