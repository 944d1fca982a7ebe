"""Quantised dense attention inside real pipelines."""

import pytest
import torch

import svg
from svg.config import SVG2Config


@pytest.mark.parametrize("method", ["sage2", "sage2++", "sage3"])
@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox_1_5"])
def test_by_name_and_close_to_dense(load, run, name, method):
    pipe = load(name)
    dense = run(pipe)
    out = run(svg.accelerate(pipe, method))
    assert 0 < (out - dense).norm() / dense.norm() < (0.2 if method == "sage3" else 0.05)
    assert torch.equal(run(pipe), out)
    (part,) = svg.report(pipe)["transformers"].values()
    assert part["calls"]["dense"] == 0 and part["density"]["all_calls"] == 1
    assert part["quantised"]["guard"]["recomputed"] == 0
    assert set(part["quantised"]["precisions"]) == {
        "sage2": {"int8-fp8"}, "sage2++": {"int8-fp8-acc16"}, "sage3": {"int8-fp8", "nvfp4"}
    }[method]  # fmt: skip
    assert torch.equal(run(svg.restore(pipe)), dense)


def test_the_guard_gives_finite_frames_where_a_kernel_does_not(load, run, monkeypatch):
    """A head that comes out as NaN never reaches the frames, whichever method and step."""
    from svg.engine import execute

    kernel = execute.block_sparse_attention_quantised

    def broken(*args, failed, **kwargs):
        out = kernel(*args, failed=failed, **kwargs)
        out[:, 0] = torch.nan
        failed[:, 0] = 1
        return out

    pipe = load("wan")
    config = {"top_p": 0.5, "num_q_clusters": 4, "num_k_clusters": 6, "first_iterations": 5, "warmup_layers": 0.0}
    native = run(svg.accelerate(pipe, SVG2Config(**config)))
    monkeypatch.setattr(execute, "block_sparse_attention_quantised", broken)
    out = run(svg.accelerate(pipe, SVG2Config(**config, precision="int8-fp8")))
    assert out.isfinite().all() and (out - native).norm() < 0.1 * native.norm()
    (part,) = svg.report(pipe)["transformers"].values()
    assert part["quantised"]["guard"]["recomputed"] == part["calls"]["sparse"]  # one head of each call, one sample
