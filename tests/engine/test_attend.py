import dataclasses
from functools import partial

import pytest
import torch
from sparge_blocks import sparge_blocks

from svg.attend import attend, dense_attention
from svg.config import DenseConfig, SpargeConfig, SVG1Config, SVG2Config
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState
from svg.kernels.common import target

LAYOUT = TokenLayout(3, 3, 4, 5, "last")
SPARSE = {
    "svg1": SVG1Config(density=0.6, block_size=4, sample_rows=6, warmup_steps=0, warmup_layers=0),
    "svg2": SVG2Config(
        top_p=0.6, num_q_clusters=5, num_k_clusters=9, first_iterations=4, warmup_steps=0, warmup_layers=0
    ),
    "sparge": SpargeConfig(cdf=0.6, simthresh=0.1, warmup_steps=0, warmup_layers=0),
}


small_blocks = sparge_blocks(8, 4)


@pytest.fixture(params=SPARSE.values(), ids=SPARSE.keys())
def config(request):
    return request.param


def steps_of(make_qkv, config, layout=LAYOUT, steps=4, branches=("cond", "uncond"), state=None, batch=1, layers=2):
    """Outputs of a run [steps, branches, layers][B, S, H, D], inputs depending on step, branch and layer."""
    state = state or RunState(config, layers)
    state.begin_run()
    outs = []
    for step in range(steps):
        for branch in branches:
            state.begin_forward(step, steps, branch, layout)
            for layer in range(layers):
                seed = 1000 * step + 10 * layer + (branch == "uncond")
                outs.append(attend(*make_qkv(layout, batch=batch, seed=seed), state, layer))
    return torch.stack(outs).unflatten(0, (steps, len(branches), layers))


def test_warmup_is_dense_and_recorded(make_qkv):
    config = SVG1Config(density=0.6, block_size=4, warmup_steps=0.5, warmup_layers=0.25)
    state = RunState(config, 4)
    steps_of(make_qkv, config, state=state, steps=3, layers=4)
    assert len(state.records) == 3 * 2 * 4
    for record in state.records:
        assert record.dense == (record.step < 2 or record.layer < 1)
        assert record.density.shape == (1, 3) and record.density.le(1).all()
        assert (record.kind is None) == record.dense
        assert record.density.eq(1).all() == record.dense
        assert record.seconds > 0


def test_warmup_calls_equal_dense(make_qkv, make_state, make_mask):
    qkv, mask = make_qkv(LAYOUT), make_mask(LAYOUT)
    warm = make_state(SVG1Config(warmup_steps=0.6), LAYOUT, step=5)
    dense = make_state(DenseConfig(), LAYOUT, step=5)
    assert torch.equal(attend(*qkv, warm, 3, mask), attend(*qkv, dense, 3, mask))
    assert dense.records[0].dense


def test_timing_can_be_off(make_qkv, make_state, config):
    state = make_state(config, LAYOUT)
    state.timing = False
    attend(*make_qkv(LAYOUT), state, 2)
    assert state.records[0].seconds is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_shape_are_kept(make_qkv, make_state, config, dtype):
    out = attend(*make_qkv(LAYOUT, dtype=dtype), make_state(config, LAYOUT), 2)
    assert out.shape == (2, 41, 3, 16) and out.dtype == dtype and out.isfinite().all()


def test_same_seed_is_bit_equal_and_the_global_generator_untouched(make_qkv, config):
    first = steps_of(make_qkv, config)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(steps_of(make_qkv, config), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_differs(make_qkv):
    config = SPARSE["svg2"].to_dict()
    del config["method"]
    other = SVG2Config(**{**config, "seed": 1})
    assert not torch.equal(steps_of(make_qkv, other), steps_of(make_qkv, SPARSE["svg2"]))


def test_an_interrupted_run_does_not_disturb_the_next(make_qkv, config):
    fresh = steps_of(make_qkv, config)
    state = RunState(config, 2)
    state.begin_run()
    state.begin_forward(0, 4, "cond", LAYOUT)
    attend(*make_qkv(LAYOUT, batch=1, seed=77), state, 0)
    state._sums.add(torch.tensor([torch.nan, 0, 0]), partial(state._refuse_not_finite, 0))  # of a forward nobody read
    assert torch.equal(steps_of(make_qkv, config, state=state), fresh)
    assert len(state.records) == 4 * 2 * 2


def test_branches_are_apart(make_qkv, config):
    both = steps_of(make_qkv, config)
    for i, branch in enumerate(("cond", "uncond")):
        alone = steps_of(make_qkv, config, branches=(branch,))
        assert torch.equal(alone[:, 0], both[:, i])


def test_two_states_are_independent(make_qkv, config):
    alone = steps_of(make_qkv, config, branches=("cond",), layers=1)
    one, two = RunState(config, 1), RunState(config, 1)
    for step in range(4):
        for state, shift in ((one, 0), (two, 5)):
            state.begin_forward(step, 4, "cond", LAYOUT)
            out = attend(*make_qkv(LAYOUT, batch=1, seed=1000 * step + shift), state, 0)
            if state is one:
                assert torch.equal(out, alone[step, 0, 0])


@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_is_its_samples(make_qkv, config, make_mask, padded):
    mask = make_mask(LAYOUT) if padded else None
    together, apart = RunState(config, 1), [RunState(config, 1) for _ in range(2)]
    for step in range(3):
        qkv = make_qkv(LAYOUT, batch=2, seed=step)
        together.begin_forward(step, 3, "cond", LAYOUT)
        both = attend(*qkv, together, 0, mask)
        for b, state in enumerate(apart):
            state.begin_forward(step, 3, "cond", LAYOUT)
            one = attend(*(x[b : b + 1] for x in qkv), state, 0, None if mask is None else mask[b : b + 1])
            torch.testing.assert_close(both[b : b + 1], one, atol=1e-5, rtol=0)
            torch.testing.assert_close(together.records[-1].density[b], state.records[-1].density[0])


def test_a_new_shape_within_a_run_starts_over(make_qkv, config):
    other = TokenLayout(2, 4, 4)
    fresh = RunState(config, 1)
    fresh.begin_forward(1, 2, "cond", other)
    expected = attend(*make_qkv(other, batch=1), fresh, 0)
    state = RunState(config, 1)
    state.begin_forward(0, 2, "cond", LAYOUT)
    attend(*make_qkv(LAYOUT, batch=2), state, 0)
    state.begin_forward(1, 2, "cond", other)
    assert torch.equal(attend(*make_qkv(other, batch=1), state, 0), expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_text_is_seen_by_nobody(layout, config, make_qkv, make_mask, make_state, side):
    mask = make_mask(layout, side=side)
    if mask is None:
        pytest.skip("no text, no padding")
    q, k, v = make_qkv(layout)
    out = attend(q, k, v, make_state(config, layout), 2, mask)
    for b in range(2):
        padding = torch.arange(layout.text_tokens)[~mask[b]] + layout.text_slice.start
        k[b, padding], v[b, padding] = 50.0, 1e4
    assert torch.equal(attend(q, k, v, make_state(config, layout), 2, mask), out)


def test_text_rows_are_dense(layout, config, make_qkv, make_mask, make_state):
    mask, qkv = make_mask(layout), make_qkv(layout)
    sparse = attend(*qkv, make_state(config, layout), 2, mask)[:, layout.text_slice]
    dense = attend(*qkv, make_state(DenseConfig(), layout), 2, mask)[:, layout.text_slice]
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=0)


def test_generators_are_private_to_layer_and_branch(make_state):
    def draws(seed):
        state = make_state(DenseConfig(seed=seed), LAYOUT)
        out = []
        for branch in ("cond", "uncond"):
            state.begin_forward(5, 10, branch, LAYOUT)
            out += [torch.rand(1, generator=state.generator(layer, "cpu")).item() for layer in (0, 1)]
            assert state.generator(0, "cpu") is state.generator(0, "cpu")
        return out

    assert draws(0) == draws(0)
    assert len({*draws(0), *draws(1)}) == 8


def test_an_empty_prompt(config, make_qkv, make_state):
    mask = torch.tensor([[False] * 5, [True] * 5])
    out = attend(*make_qkv(LAYOUT), make_state(config, LAYOUT), 2, mask)
    dense = attend(*make_qkv(LAYOUT), make_state(DenseConfig(), LAYOUT), 2, mask)
    torch.testing.assert_close(out[:, LAYOUT.text_slice], dense[:, LAYOUT.text_slice], atol=1e-5, rtol=0)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_names_tensor_layer_and_step(make_qkv, make_state, config, name, value):
    qkv = dict(zip("qkv", make_qkv(LAYOUT)))
    qkv[name][1, 7, 2, 3] = value
    with pytest.raises(
        FloatingPointError, match=f"{name} must be finite.*transformer layer 3, step 5 of 10, branch cond"
    ):
        attend(**qkv, state=make_state(config, LAYOUT), layer=3)


def test_non_finite_check_can_be_off(make_qkv, make_state):
    q, k, v = make_qkv(LAYOUT)
    q[0, 0] = torch.nan
    assert attend(q, k, v, make_state(DenseConfig(check_finite=False), LAYOUT), 3).isnan().any()


@pytest.mark.parametrize("read", ["begin_forward", "end_run"])
def test_flags_of_a_gpu_forward_are_read_after_it(make_state, read):
    state = make_state(DenseConfig(), LAYOUT)
    for layer, sums in ((1, [1.0, 2.0, 3.0]), (2, [1.0, torch.inf, 3.0])):
        state._sums.add(torch.tensor(sums), partial(state._refuse_not_finite, layer))
    with pytest.raises(FloatingPointError, match="k must be finite.*layer 2, step 5 of 10, branch cond"):
        state.begin_forward(6, 10, "uncond", LAYOUT) if read == "begin_forward" else state.end_run()
    state.end_run()  # said once


def test_large_finite_inputs_pass(make_qkv, make_state):
    state = make_state(DenseConfig(), LAYOUT)
    q, k, v = (x.sign() * 6e4 for x in make_qkv(LAYOUT, dtype=torch.float16))
    attend(q, k, v, state, 0)


def test_a_sparse_call_on_a_gpu_refuses_gradients(make_qkv, make_state, config, monkeypatch):
    monkeypatch.setattr(target, "use_triton", lambda x: True)
    config = dataclasses.replace(config, check_finite=False)  # a kernel, which nothing runs here
    q, k, v = make_qkv(LAYOUT)
    with pytest.raises(NotImplementedError, match=f"{config.method} attention has no backward pass"):
        attend(q.requires_grad_(), k, v, make_state(config, LAYOUT), 2)


def test_gradients_flow_on_a_cpu(make_qkv, make_state, config):
    q, k, v = make_qkv(LAYOUT)
    attend(q.requires_grad_(), k, v, make_state(config, LAYOUT), 2).sum().backward()
    assert q.grad.isfinite().all() and q.grad.any()


def test_inference_mode_leaves_nothing_behind_that_breaks_training(make_qkv, make_state, config):
    layout = TokenLayout(3, 2, 7)  # a grid that no other test puts into the caches
    with torch.inference_mode():
        attend(*make_qkv(layout), make_state(config, layout), 2)
    q, k, v = make_qkv(layout)
    attend(q.requires_grad_(), k, v, make_state(config, layout), 2).sum().backward()
    assert q.grad.any()


def test_attend_is_opaque_to_torch_compile(make_qkv, make_state, config):
    qkv = make_qkv(LAYOUT)
    state, compiled_state = make_state(config, LAYOUT), make_state(config, LAYOUT)

    def block(q, k, v, state):
        return attend(2 * q, k, v, state, 2) + 1

    compiled = torch.compile(block, backend="eager")
    assert torch.equal(compiled(*qkv, compiled_state), block(*qkv, state))
    assert len(compiled_state.records) == 1


def test_bad_calls_say_what_is_wrong(make_qkv, make_state, make_mask):
    q, k, v = make_qkv(LAYOUT)
    state = make_state(DenseConfig(), LAYOUT)
    with pytest.raises(RuntimeError, match="begin_forward"):
        attend(q, k, v, RunState(DenseConfig(), 4), 0)
    with pytest.raises(ValueError, match="one shape"):
        attend(q, k[:, 1:], v, state, 0)
    with pytest.raises(ValueError, match="layout's 41 tokens in dimension 1, got 40"):
        attend(q[:, 1:], k[:, 1:], v[:, 1:], state, 0)
    with pytest.raises(ValueError, match=r"text_mask must be bool \[2, 5\]"):
        attend(q, k, v, state, 0, make_mask(LAYOUT)[:, 1:])
    with pytest.raises(ValueError, match=r"layer must be in \[0, 4\), got 4"):
        attend(q, k, v, state, 4)
    with pytest.raises(ValueError, match="step must be in"):
        state.begin_forward(10, 10, "cond", LAYOUT)
    with pytest.raises(ValueError, match="num_layers must be >= 1"):
        RunState(DenseConfig(), 0)


def test_dense_backends(make_qkv, make_mask, masked_attention):
    q, k, v = (x.transpose(1, 2) for x in make_qkv(LAYOUT))
    mask = torch.cat([torch.ones(2, 36, dtype=torch.bool), make_mask(LAYOUT)], 1)
    for backend in ("auto", "math", "flash"):
        out = dense_attention(q, k, v, mask, backend)
        for b in range(2):
            expected = masked_attention(q[b, 1], k[b, 1], v[b, 1], mask[b])
            torch.testing.assert_close(out[b, 1].double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="dense_backend 'cudnn' cannot run q .* on cpu with a key mask; use 'auto'"):
        dense_attention(q, k, v, mask, "cudnn")
    with pytest.raises(ValueError, match="dense_backend must be one of auto"):
        dense_attention(q, k, v, backend="fastest")


@pytest.mark.parametrize(("arch", "first"), [(80, "FLASH"), (89, "FLASH"), (90, "CUDNN"), (100, "CUDNN")])
def test_dense_priority_by_architecture(monkeypatch, arch, first):
    from svg.methods import dense

    monkeypatch.setattr(target, "arch", lambda device: arch)
    names = [backend.name for backend in dense._priority(torch.device("cuda"))]
    assert names[0].startswith(first) and sorted(names) == sorted(b.name for b in dense._NAMED.values())
