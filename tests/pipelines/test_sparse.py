"""The sparse methods inside real pipelines: what must equal dense, what must repeat, what must stay apart."""

import pytest
import torch
from sparge_blocks import sparge_blocks

import svg
from svg.config import DenseConfig, SpargeConfig, SVG1Config, SVG2Config
from svg.pipelines.attach import attached

FULL = {
    "svg1": SVG1Config(density=1.0, block_size=4, sample_rows=8, warmup_steps=0.0, warmup_layers=0.0),
    "svg2": SVG2Config(
        top_p=1.0, num_q_clusters=4, num_k_clusters=6, first_iterations=5, warmup_steps=0.0, warmup_layers=0.0
    ),
    "sparge": SpargeConfig(topk=1.0, warmup_steps=0.0, warmup_layers=0.0),
}
SPARSE = {
    "svg1": SVG1Config(density=0.6, block_size=4, sample_rows=8, warmup_steps=0.2, warmup_layers=0.0),
    "svg2": SVG2Config(
        top_p=0.5, num_q_clusters=4, num_k_clusters=6, first_iterations=5, warmup_steps=0.2, warmup_layers=0.0
    ),
    "sparge": SpargeConfig(topk=0.5, warmup_steps=0.2, warmup_layers=0.0),
}
PROMPTS = ["a red ball moves right", "a blue cat and a green dog moves slowly left over the water"]
NAMES = ["wan", "wan_2_2", "wan_i2v", "hunyuan", "cogvideox_2b", "cogvideox_1_5"]


small_blocks = sparge_blocks(6, 3)


@pytest.fixture
def run_dense(load, run, name):
    """A pipeline and what it makes by itself."""
    pipe = load(name)
    return pipe, run(pipe)


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("name", NAMES)
def test_full_budget_equals_dense(run, run_dense, method):
    pipe, dense = run_dense
    full = run(svg.accelerate(pipe, FULL[method]))
    torch.testing.assert_close(full, dense, rtol=0, atol=1e-4)
    for part in svg.report(pipe)["transformers"].values():
        assert part["calls"]["dense"] == 0 and part["calls"]["sparse"] > 0
        assert part["density"]["all_calls"] == pytest.approx(1.0)


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("name", NAMES)
def test_same_seed_twice_is_bit_equal_and_sparse(load, run, run_dense, name, method):
    pipe, dense = run_dense
    first = run(svg.accelerate(pipe, SPARSE[method]))
    torch.rand(7)  # the global generator is no part of the result
    assert torch.equal(run(pipe), first)
    assert (first - dense).abs().max() > 1e-4
    parts = svg.report(pipe)["transformers"].values()
    assert all(part["density"]["sparse_calls"] < 1 for part in parts if part["calls"]["sparse"])
    other = load(name)
    assert torch.equal(run(svg.accelerate(other, SPARSE[method])), first)


@pytest.mark.parametrize("method", SPARSE)
def test_the_global_generator_is_left_alone(load, run, method):
    pipe = svg.accelerate(load("wan"), SPARSE[method])
    before = torch.get_rng_state()
    run(pipe)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("name", ["wan", "wan_2_2", "wan_i2v", "hunyuan", "cogvideox_1_5"])
@pytest.mark.parametrize("how, at", [("flag", 2), ("exception", 2), ("exception", 0)])
def test_an_interrupted_run_does_not_disturb_the_next(load, run, name, method, how, at):
    pipe = svg.accelerate(load(name), SPARSE[method])
    fresh = run(pipe)
    fresh_report = _untimed(svg.report(pipe))

    def stop(pipe, step, timestep, tensors):
        if step == at and how == "exception":
            raise KeyboardInterrupt
        pipe._interrupt = step == at
        return tensors

    if how == "exception":
        with pytest.raises(KeyboardInterrupt):
            run(pipe, seed=1, callback_on_step_end=stop)
    else:
        run(pipe, seed=1, callback_on_step_end=stop)
    assert torch.equal(run(pipe), fresh)
    assert _untimed(svg.report(pipe)) == fresh_report


@pytest.mark.parametrize("method", SPARSE)
def test_an_error_inside_the_transformer_does_not_disturb_the_next_run(load, run, method):
    pipe = svg.accelerate(load("wan"), SPARSE[method])
    fresh = run(pipe)
    block, calls = pipe.transformer.blocks[1], []

    def fail(module, args):
        calls.append(None)
        if len(calls) == 4:  # the uncond forward of the second step
            raise MemoryError

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        run(pipe, seed=1)
    handle.remove()
    assert torch.equal(run(pipe), fresh)


@pytest.mark.parametrize("method", SPARSE)
def test_cond_and_uncond_share_nothing(load, run, method):
    pipe = svg.accelerate(load("wan"), SPARSE[method])
    transformer = pipe.transformer
    torch.manual_seed(0)
    latents, cond, uncond = torch.randn(5, 1, 16, 5, 4, 6), torch.randn(1, 8, 32), torch.randn(1, 8, 32)

    def cond_outputs(with_uncond):
        svg.pipelines.reset(pipe)
        outputs = []
        for step in range(5):
            for branch, text in (("cond", cond), ("uncond", uncond))[: 1 + with_uncond]:
                with torch.no_grad(), transformer.cache_context(branch, step_index=step, num_inference_steps=5):
                    out = transformer(latents[step], torch.tensor([900.0 - step]), text, return_dict=False)[0]
                if branch == "cond":
                    outputs.append(out)
        return torch.stack(outputs)

    assert torch.equal(cond_outputs(True), cond_outputs(False))
    run(pipe)
    hook = attached(pipe)["transformer"]
    assert {(record.layer, record.branch) for record in hook.state.records} == {
        (layer, branch) for layer in range(3) for branch in ("cond", "uncond")
    }
    states = [hook.state._layers[0, branch] for branch in ("cond", "uncond")]
    tensors = [{tensor.data_ptr() for tensor in state.cache.values()} for state in states]
    assert states[0].seed != states[1].seed and not tensors[0] & tensors[1]


@pytest.mark.parametrize("config", [DenseConfig(), *SPARSE.values()], ids=lambda config: config.method)
@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox_2b"])
def test_a_batch_of_two_prompts_is_the_two_alone(load, run, name, config):
    pipe = svg.accelerate(load(name), config)
    alone = [run(pipe, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(2)]
    both = run(pipe, PROMPTS, generator=generators)
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "wan_i2v", "hunyuan"])
def test_two_pipes_at_once(load, run, name):
    one = svg.accelerate(load(name), SPARSE["svg1"])
    two = svg.accelerate(load("wan"), SPARSE["svg2"])
    alone = run(one), run(two, seed=3)
    inner = []

    def between(pipe, step, timestep, tensors):
        if step == 2:
            inner.append(run(two, seed=3))
        return {}

    assert torch.equal(run(one, callback_on_step_end=between), alone[0])
    assert torch.equal(inner[0], alone[1])
    svg.restore(one)
    assert torch.equal(run(two, seed=3), alone[1])


def _untimed(report):
    return {
        name: {key: value for key, value in part.items() if not key.endswith("seconds")}
        for name, part in report["transformers"].items()
    }
