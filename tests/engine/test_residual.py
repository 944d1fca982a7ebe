"""What the last dense step's sparse attention loses comes back in the sparse steps after it."""

import math

import pytest
import torch

from svg.attend import attend
from svg.config import NearConfig
from svg.engine.layout import TokenLayout
from svg.engine.residual import DECAY, KEY, SCALE, add, keep
from svg.engine.state import RunState

LAYOUT = TokenLayout(4, 6, 8, 11, "last")
STEPS, DENSE = 10, 2


def inputs(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    meanings = torch.randn(9, 32, generator=generator)
    kind = torch.randint(0, 9, (LAYOUT.total_tokens,), generator=generator)
    shape = (2, LAYOUT.total_tokens, 3, 32)
    return [(meanings[kind][:, None] + 0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in "qkv"]


def run(residual, steps, branches=("cond",), layers=1, **options):
    """Outputs by (step, branch) of the last layer, of a run that has the same inputs in every step."""
    options = {"budget": 0.3, "rows": 16, "warmup_layers": 0.0, "early": 0.0, "first_iterations": 3} | options
    state = RunState(NearConfig(warmup_steps=DENSE / STEPS, residual=residual, **options), layers)
    found = {}
    for step in steps:
        for i, branch in enumerate(branches):
            state.begin_forward(step, STEPS, branch, LAYOUT)
            for layer in range(layers):
                found[step, branch] = attend(*inputs(i), state, layer)
    return found, state


def test_the_error_falls_by_the_weight_where_inputs_stay():
    plain, _ = run(0.0, range(1, 5))
    shared, _ = run(0.8, range(1, 5))
    dense = plain[1, "cond"]
    assert torch.equal(shared[1, "cond"], dense)  # the dense step itself stays
    for step in (2, 4):
        weight = 0.8 * math.exp(-(step - 1) / (DECAY * STEPS))
        left = (shared[step, "cond"] - dense).norm() / (plain[step, "cond"] - dense).norm()
        assert left == pytest.approx(1 - weight, abs=0.05)  # clusters move a little between the steps


def test_branches_have_their_own():
    alone, _ = run(1.0, (1, 2))
    both, _ = run(1.0, (1, 2), ("cond", "uncond"))
    assert torch.equal(alone[2, "cond"], both[2, "cond"])
    assert not torch.equal(both[2, "cond"], both[2, "uncond"])


def test_a_run_without_its_last_dense_step_has_none():
    plain, _ = run(0.0, (2, 3))
    late, state = run(1.0, (2, 3))
    assert torch.equal(late[3, "cond"], plain[3, "cond"]) and KEY not in state.layer(0).cache
    _, state = run(1.0, (0,))
    assert KEY not in state.layer(0).cache  # the first of two dense steps


def test_dense_layers_and_short_sequences_have_none():
    _, state = run(1.0, (1,), layers=2, warmup_layers=0.5)
    assert KEY not in state.layer(0).cache and KEY in state.layer(1).cache
    _, state = run(1.0, (1,), min_tokens=LAYOUT.total_tokens + 1)
    assert KEY not in state.layer(0).cache


def test_another_video_forgets_it():
    _, state = run(1.0, (1, 2))
    q, k, v = inputs()
    other = TokenLayout(4, 6, 8)
    state.begin_forward(3, STEPS, "cond", other)
    attend(*(x[:, : other.total_tokens] for x in (q, k, v)), state, 0)
    assert KEY not in state.layer(0).cache


def test_gradients_flow_through_a_dense_step_on_a_cpu():
    state = RunState(NearConfig(warmup_steps=0.1, residual=1.0, rows=16), 1)
    state.begin_forward(0, STEPS, "cond", LAYOUT)
    q, k, v = (x.requires_grad_() for x in inputs())
    attend(q, k, v, state, 0).sum().backward()
    assert q.grad.any() and not state.layer(0).cache.get(KEY, torch.zeros(1)).requires_grad


@pytest.mark.parametrize(
    ("dtype", "held", "step"), [(torch.float32, torch.float32, 1e-6), (torch.bfloat16, torch.uint8, 2.0**-4)]
)
def test_in_16_bits_it_is_kept_in_8(dtype, held, step):
    state = RunState(NearConfig(warmup_steps=DENSE / STEPS, residual=1.0), 1)
    state.begin_forward(DENSE - 1, STEPS, "cond", LAYOUT)
    dense, sparse = torch.randn(2, 1, 3, LAYOUT.total_tokens, 32).to(dtype)
    keep(state, 0, dense, sparse)
    cache = state.layer(0).cache
    assert cache[KEY].dtype == held and (SCALE in cache) == (held == torch.uint8)
    state.begin_forward(DENSE, STEPS, "cond", LAYOUT)
    lost = (dense - sparse).float()
    found = add(state, 0, torch.zeros_like(sparse)).float() / math.exp(-1 / (DECAY * STEPS))
    assert ((found - lost).abs() <= (step + 2.0**-8) * lost.abs() + 2.0**-8).all()


def test_two_runs_are_bit_equal():
    first, second = run(0.7, range(1, 4))[0], run(0.7, range(1, 4))[0]
    assert all(torch.equal(first[key], second[key]) for key in first)
