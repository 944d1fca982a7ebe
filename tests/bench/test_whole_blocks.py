"""Kernels on whole blocks beside a peer's: the same map for both, every result, and peers that are not there or fail."""

import pytest
import torch

from svg.bench import whole_blocks
from svg.bench.peers import PEERS, Peer
from svg.bench.run import Bench


@pytest.fixture
def once(monkeypatch):
    ran = []
    monkeypatch.setattr(whole_blocks, "median_ms", lambda op, *args: ran.append(op()) or 2.0)
    monkeypatch.setattr(Peer, "version", lambda self: "1.0")
    return ran


def test_a_peer_beside_ours_on_the_same_blocks(once, monkeypatch):
    def dense_of(q, k, v, index):
        mask = torch.zeros(1, q.shape[1], *(2 * [index.shape[2]]), dtype=torch.bool).scatter_(3, index.long(), True)
        mask = mask.repeat_interleave(128, 2).repeat_interleave(128, 3)
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    def failing(q, k, v, index):
        raise RuntimeError("no such GPU")

    monkeypatch.setitem(PEERS, "nvidia-bsa", Peer("x", whole_blocks={"bf16": dense_of, "fp8": failing}))
    said = []
    bench = Bench(command="svg bench whole-blocks", show=lambda key, entry: None, say=said.append)
    whole_blocks.bench_whole_blocks(bench, 5 * 128 + 40, 2, 64, "cpu")
    key = "block_sparse/whole_blocks/{}/density0.50/{}"
    assert bench.results[key.format("bf16", "vs_nvidia-bsa")]["value"] == 1
    assert bench.results[key.format("bf16", "tflops")]["density"] == pytest.approx(0.4)  # two of five
    assert key.format("fp8", "tflops") in bench.results and key.format("fp8", "vs_nvidia-bsa") not in bench.results
    assert any("could not run here (RuntimeError: no such GPU)" in line for line in said)
    mine, theirs = once[0], once[1]
    assert (mine - theirs).abs().max() < 0.02
