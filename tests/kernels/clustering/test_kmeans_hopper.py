"""The specialised assignment gives the plain kernel's labels; on a Hopper GPU only (test_aot.py compiles it everywhere)."""

import dataclasses
import functools

import pytest
import torch

from svg.kernels.clustering import assign, kmeans_hopper
from svg.kernels.clustering.kmeans import kmeans_and_tiles
from svg.kernels.clustering.permute import new_counters
from svg.kernels.common import target

HOPPER = torch.cuda.is_available() and target.arch(torch.device("cuda")) == 90
on_hopper = pytest.mark.skipif(not HOPPER or not kmeans_hopper.LOADABLE, reason="needs a Hopper GPU")


@pytest.mark.skipif(not kmeans_hopper.LOADABLE, reason="needs Triton, and Gluon has no interpreter")
def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(target, "arch", lambda device: 90)
    x = torch.zeros(1, 63, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    assert kmeans_hopper.supports(x) and kmeans_hopper.supports(x[..., :96])
    assert not kmeans_hopper.supports(x.float())
    assert not kmeans_hopper.supports(x[..., :100])
    assert not kmeans_hopper.supports(x[..., 1:97])  # starts between multiples of 16 bytes
    assert not kmeans_hopper.supports(x[:, :1].expand(1, 2, 63, 128))
    monkeypatch.setattr(target, "arch", lambda device: 100)
    assert not kmeans_hopper.supports(x)


def counted(x, scored):
    """Labels, and how often each chunk has each."""
    clusters = scored.directions.shape[2]
    counts = new_counters(x.shape[0] * x.shape[1], x.shape[2], clusters, x.device).counts
    return assign._assign(x, scored, counts), counts


@on_hopper
@pytest.mark.parametrize(
    ("S", "D", "clusters"), [(1, 128, 1), (63, 64, 37), (1111, 128, 300), (4097, 96, 321), (2500, 128, 1000)]
)
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_same_labels_and_counts_as_the_plain_kernel(monkeypatch, S, D, clusters, few, dtype):
    if few and clusters > kmeans_hopper.FEW:
        pytest.skip("so many centroids don't fit")
    torch.manual_seed(0)
    x = torch.randn(2, S, 3, D, device="cuda", dtype=dtype).transpose(1, 2)
    start = torch.randn(2, 3, clusters, D, device="cuda")
    start[:, :, clusters // 2 :] = start[:, :, : clusters - clusters // 2]  # ties, and empty clusters
    scored = assign.centered(x, start)
    monkeypatch.setattr(kmeans_hopper, "launch", functools.partial(kmeans_hopper.launch, few=few))
    labels, counts = counted(x, scored)
    monkeypatch.setitem(assign.LAUNCH[90], 2, dataclasses.replace(assign.LAUNCH[90][2], specialised=False))
    plain_labels, plain_counts = counted(x, scored)
    assert torch.equal(labels, plain_labels)
    assert torch.equal(counts, plain_counts)


@on_hopper
@pytest.mark.parametrize("clusters", [300, 1000])
def test_many_tokens_give_the_same_labels_every_time(monkeypatch, clusters):
    x = torch.randn(1, 75_600, 4, 128, device="cuda").bfloat16().transpose(1, 2)
    scored = assign.centered(x, x[:, :, :clusters].float())
    found = [counted(x, scored) for _ in range(20)]
    monkeypatch.setitem(assign.LAUNCH[90], 2, dataclasses.replace(assign.LAUNCH[90][2], specialised=False))
    plain_labels, plain_counts = counted(x, scored)
    for labels, counts in found:
        assert torch.equal(labels, plain_labels) and torch.equal(counts, plain_counts)


def everything(x):
    found, tiles = kmeans_and_tiles(x, x[:, :, :300].float(), 3, 64)
    return *found, tiles


@on_hopper
def test_same_clustering_as_the_plain_kernel(monkeypatch):
    x = torch.randn(1, 20_001, 2, 128, device="cuda").bfloat16().transpose(1, 2)
    first, second = (everything(x) for _ in range(2))
    monkeypatch.setitem(assign.LAUNCH[90], 2, dataclasses.replace(assign.LAUNCH[90][2], specialised=False))
    plain = everything(x)
    for a, b, c in zip(first, second, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
