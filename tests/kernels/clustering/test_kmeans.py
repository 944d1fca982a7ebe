import pytest
import torch
from sklearn.cluster import KMeans

from svg.kernels import cluster_means, kmeans, kmeans_assign, kmeans_update
from svg.kernels.clustering.kmeans import kmeans_and_tiles
from svg.kernels.common import target


def blobs(B, H, S, D, dtype=torch.float32, groups=12):
    """Tokens around `groups` points a head, as a [B, H, S, D] view of [B, S, H, D]."""
    points = 3 * torch.randn(B, 1, H, groups, D)
    pick = torch.randint(groups, (B, S, H, 1, 1)).expand(-1, -1, -1, 1, D)
    x = points.expand(-1, S, -1, -1, -1).gather(3, pick).squeeze(3) + torch.randn(B, S, H, D)
    return x.to(dtype).transpose(1, 2)


def distances(x, centroids):
    return (x.double().unsqueeze(3) - centroids.double().unsqueeze(2)).square().sum(-1)  # [B, H, S, C]


@pytest.mark.parametrize("S", [63, 111, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_assign_finds_the_nearest_centroid(S, dtype):
    x = blobs(2, 2, S, 64, dtype)
    centroids = x[:, :, :37].float()
    labels = kmeans_assign(x, centroids)
    assert labels.dtype == torch.int32
    mean = centroids.mean(2, keepdim=True)
    far = distances(x, mean + (centroids - mean).to(dtype))  # what the definition rounds
    lost = far.gather(3, labels.long()[..., None]).squeeze(3) - far.min(3).values
    assert lost.max() <= 1e-5 * far.mean()


@pytest.mark.parametrize("D", [16, 96, 128])
def test_assign_head_dims(D):
    x = blobs(1, 2, 70, D)
    centroids = torch.randn(1, 2, 70, D)
    assert torch.equal(kmeans_assign(x, centroids), distances(x, centroids).argmin(3).int())


def test_far_from_the_origin_labels_stay_apart():
    """|c|^2 of 6e7 would drown distances of 1 in fp32, were it part of the score."""
    x = torch.randn(1, 1, 129, 64) * 0.01
    x[..., 0] += torch.arange(129) % 5
    centroids = torch.zeros(1, 1, 5, 64)
    centroids[..., 0] = torch.arange(5)
    shifted = kmeans_assign(x + 1000, centroids + 1000)
    assert torch.equal(shifted[0, 0], torch.arange(129, dtype=torch.int32) % 5)


@pytest.mark.parametrize("clusters", [5, 150])
def test_ties_go_to_the_lowest_index(clusters):
    x = torch.randint(-3, 4, (1, 2, 63, 64)).float()  # whole numbers: equal scores are equal bits
    centroids = torch.ones(1, 2, clusters, 64)
    assert (kmeans_assign(x, centroids) == 0).all()
    centroids[:, :, 0] = 1 + clusters
    assert (kmeans_assign(x, centroids) == 1).all()


def test_labels_stay_in_range_for_nan():
    x = torch.full((1, 1, 10, 16), torch.nan)
    labels = kmeans_assign(x, torch.randn(1, 1, 3, 16))
    assert (labels >= 0).all() and (labels < 3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_update_takes_means_and_keeps_empty_clusters(dtype):
    x = blobs(2, 2, 129, 96, dtype)
    labels = torch.randint(0, 9, (2, 2, 129), dtype=torch.int32)
    labels[labels == 4] = 3
    old = torch.randn(2, 2, 9, 96)
    centroids, sizes = kmeans_update(x, labels, old)
    for b in range(2):
        for h in range(2):
            for c in range(9):
                members = x[b, h][labels[b, h] == c].double()
                assert sizes[b, h, c] == len(members)
                expected = members.mean(0) if len(members) else old[b, h, c].double()
                torch.testing.assert_close(centroids[b, h, c].double(), expected, rtol=1e-5, atol=1e-5)


def test_one_cluster_is_the_mean():
    x = blobs(1, 2, 111, 64)
    labels, centroids, sizes, _ = kmeans(x, x[:, :, :1].float(), 2)
    assert (labels == 0).all() and (sizes == 111).all()
    torch.testing.assert_close(centroids[:, :, 0], x.mean(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inertia_within_one_percent_of_scikit_learn(dtype):
    x = blobs(1, 2, 700, 16, dtype, groups=200)
    start = x[:, :, :12].float()
    labels, centroids, sizes, _ = kmeans(x, start, 5)
    assert (sizes > 0).all()  # scikit-learn moves an empty cluster elsewhere
    for h in range(2):
        points, first = x[0, h].double().numpy(), start[0, h].double().numpy()
        theirs = KMeans(12, init=first, n_init=1, max_iter=5, tol=0, algorithm="lloyd").fit(points)
        ours = distances(x, centroids)[0, h].gather(1, labels[0, h].long()[:, None]).sum()
        assert abs(ours / theirs.inertia_ - 1) < 0.01


def test_centroids_are_the_means_of_the_returned_labels():
    x = blobs(1, 2, 129, 64)
    labels, centroids, sizes, permutation = kmeans(x, x[:, :, :7].float(), 3)
    again, counts = kmeans_update(x, labels, torch.zeros(1, 2, 7, 64))
    assert torch.equal(sizes, counts)
    assert torch.equal(centroids, again)
    assert torch.equal(permutation.long(), labels.argsort(dim=-1, stable=True))


def test_means_of_groups_in_any_order():
    x = blobs(2, 2, 111, 64, torch.bfloat16)
    permutation = torch.rand(2, 2, 111).argsort(-1).int()
    sizes = torch.tensor([64, 0, 40, 7], dtype=torch.int32).expand(2, 2, -1)
    kept = torch.randn(2, 2, 4, 64)
    means = cluster_means(x, permutation, sizes, kept)
    ordered = x.double().gather(2, permutation.long()[..., None].expand_as(x))
    for c, (start, stop) in enumerate(((0, 64), (64, 64), (64, 104), (104, 111))):
        expected = ordered[:, :, start:stop].mean(2) if stop > start else kept[:, :, c].double()
        torch.testing.assert_close(means[:, :, c].double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pass what sort_labels returns"):
        cluster_means(x, permutation[..., :9], sizes, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [16, 64, 100])
def test_means_of_tiles_of_sorted_tokens(dtype, tile):
    x = blobs(1, 2, 333, 32, dtype)
    found, tiles = kmeans_and_tiles(x, x[:, :, :7].float(), 2, tile)
    plain = kmeans(x, x[:, :, :7].float(), 2)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    ordered = x.float().gather(2, found.permutation.long()[..., None].expand_as(x))
    exact = torch.stack([part.double().mean(2) for part in ordered.split(tile, dim=2)], 2)
    assert tiles.dtype == torch.float32
    assert (tiles - exact).abs().max() < 1e-5


def test_two_runs_are_bit_equal():
    x = blobs(2, 2, 111, 64, torch.bfloat16)
    first, second = (kmeans(x, x[:, :, :9].float(), 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wrong_arguments_are_named():
    x, centroids = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        kmeans(x, centroids, 0)
    with pytest.raises(ValueError, match=r"centroids \[B, H, C, D\]"):
        kmeans_assign(x, centroids[:, :1])
    with pytest.raises(TypeError, match="centroids fp32"):
        kmeans_assign(x, centroids.half())
    with pytest.raises(ValueError, match=r"labels must be \[B, H, S\]"):
        kmeans_update(x, torch.zeros(1, 2, 7, dtype=torch.int32), centroids)
    with pytest.raises(ValueError, match="contiguous in its last dim"):
        kmeans_assign(torch.zeros(1, 2, 16, 8).transpose(2, 3), centroids)


@pytest.mark.skipif(not target.INTERPRETED, reason="limits of the Triton kernel only")
def test_limits_of_the_kernel_are_named():
    with pytest.raises(NotImplementedError, match="head dim must be at most 128, got 160"):
        kmeans_assign(torch.zeros(1, 1, 4, 160), torch.zeros(1, 1, 2, 160))
    with pytest.raises(NotImplementedError, match="no backward pass"):
        kmeans_assign(torch.zeros(1, 1, 4, 16, requires_grad=True), torch.zeros(1, 1, 2, 16))
