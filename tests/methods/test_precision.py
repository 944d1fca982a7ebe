"""SVG1 and SVG2 in 8 bits: the same plan, its attention quantised."""

import dataclasses

import pytest
import torch

from svg.attend import attend
from svg.config import SVG1Config, SVG2Config
from svg.engine.layout import TokenLayout

SPARSE = {
    "svg1": SVG1Config(density=0.6, block_size=4, sample_rows=6),
    "svg2": SVG2Config(top_p=0.6, num_q_clusters=5, num_k_clusters=9, first_iterations=4),
}


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
@pytest.mark.parametrize("config", SPARSE.values(), ids=SPARSE.keys())
def test_sparse_calls_are_close_and_plan_alike(config, precision, layout, make_qkv, make_state, make_mask):
    qkv, mask = make_qkv(layout, dtype=torch.bfloat16), make_mask(layout)
    native = make_state(config, layout)
    quantised = make_state(dataclasses.replace(config, precision=precision), layout)
    expected, out = (attend(*qkv, state, 3, mask).float() for state in (native, quantised))
    assert torch.equal(native.records[0].density, quantised.records[0].density)
    difference = (out - expected).norm() / expected.norm()
    assert 0 < difference < (0.06 if precision == "int8-fp8" else 0.02)


def test_warmup_stays_native(make_qkv, make_state):
    layout = TokenLayout(3, 3, 4)
    config = SVG2Config(warmup_steps=0.6)
    qkv = make_qkv(layout)
    outs = (
        attend(*qkv, make_state(dataclasses.replace(config, precision=p), layout), 3) for p in ("native", "int8-fp8")
    )
    assert torch.equal(*outs)
