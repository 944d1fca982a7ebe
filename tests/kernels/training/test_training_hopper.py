"""Hopper's training kernels: how they split sequences, on any machine; and their results, on a Hopper GPU only."""

import pytest
import torch

from svg.kernels import training_attention, training_attention_backward
from svg.kernels.common import target
from svg.kernels.quantize.channels import statistics_reference
from svg.kernels.training import backward_hopper as training_backward_hopper
from svg.kernels.training import forward_hopper as training_hopper
from svg.kernels.training.inputs import pack_keys
from svg.kernels.training.sequences import sequences

HOPPER = torch.cuda.is_available() and target.arch(torch.device("cuda")) == 90
on_hopper = pytest.mark.skipif(not HOPPER or not training_hopper.LOADABLE, reason="needs a Hopper GPU")
BARS = {"out": 0.0115, "dq": 0.0135, "dk": 0.0135, "dv": 0.0115}  # of the relative l2 error, at N(0, 1)


@pytest.mark.parametrize("rows", [64, 128, 192])
@pytest.mark.parametrize("starts", [None, [0, 70, 70, 200, 331], [0, 331]])
def test_programs_cover_every_row_once(rows, starts):
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    layout = sequences(2 if starts is None else 1, 331, starts, torch.device("cpu"))
    owned = torch.zeros(layout.tokens, dtype=torch.int32)
    for n, first in training_hopper.programs(layout, rows).tolist():
        if n >= 0:
            _, _, count, start = layout.table[n].tolist()
            assert first % rows == 0
            owned[start + first : start + min(first + rows, -(-count // 128) * 128)] += 1
    assert torch.equal(owned, (layout.owner >= 0).int().repeat_interleave(128))


@pytest.mark.parametrize("S", [63, 4000])
def test_16_bit_values_keep_their_mean(S):
    """Without the correction every sum of bf16 V would be off by what it lost to rounding, however many keys there are."""
    k, v = (torch.randn(1, 2, S, 64).bfloat16() for _ in range(2))
    layout, stats = sequences(1, S, None, k.device), statistics_reference(k, v)
    packed = pack_keys(k, v, stats, layout, wide=True)
    kept = packed.offset[0] + packed.wide.float().sum(1) / S
    assert (kept - v[0].float().mean(1)).abs().max() < 1e-5
    assert (packed.offset - stats.v_mean).abs().max() > 1e-5


def exact(q, k, v, grad, is_causal):
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())


def computed(q, k, v, grad, **options):
    out, kept = training_attention(q, k, v, **options)
    options |= {"key_tokens": k.shape[2], "sm_scale": q.shape[-1] ** -0.5}
    return out, *training_attention_backward(grad, out, kept, **options)


@on_hopper
@pytest.mark.parametrize("launch", ["TWO", "THREE"])
@pytest.mark.parametrize(
    ("S", "Sk", "D", "is_causal"),
    [
        (1, 7, 64, False),
        (129, 193, 128, False),
        (4096, 4096, 128, False),
        (1025, 2047, 128, True),
        (300, 700, 80, True),
    ],
)
def test_errors_and_the_same_bits_in_every_run(monkeypatch, launch, S, Sk, D, is_causal):
    monkeypatch.setattr(training_hopper, "LAUNCH", getattr(training_hopper, launch))
    monkeypatch.setattr(training_backward_hopper, "QUERIES", getattr(training_backward_hopper, launch))
    shapes = ((2, S, 4, D), (2, Sk, 2, D), (2, Sk, 2, D), (2, S, 4, D))
    arguments = [torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for shape in shapes]
    found, again = (computed(*arguments, is_causal=is_causal) for _ in range(2))
    for bar, a, b, right in zip(BARS.values(), found, again, exact(*arguments, is_causal), strict=True):
        assert torch.equal(a, b)
        assert (a - right).norm() <= bar * right.norm().clamp(min=1e-3)
