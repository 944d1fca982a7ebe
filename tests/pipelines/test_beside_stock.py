"""What was once silently wrong beside the stock pipeline: what others store, take, wrap, copy or swap."""

import copy
import pickle
import sys
import time
import warnings

import diffusers
import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import svg
from svg.config import DenseConfig, NearConfig, SpargeConfig, SVG2Config
from svg.engine.layout import TokenLayout
from svg.engine.records import AttentionRecord
from svg.engine.state import RunState
from svg.engine.summary import summarize
from svg.pipelines.attach import attached, transformers_of
from svg.pipelines.processor import register_skip

SPARSE = SVG2Config(
    top_p=0.5, num_q_clusters=4, num_k_clusters=6, first_iterations=5, warmup_steps=0.2, warmup_layers=0.0
)
WARM = SVG2Config(
    top_p=0.5, num_q_clusters=4, num_k_clusters=6, first_iterations=5, warmup_steps=0.4, warmup_layers=0.0
)


@pytest.fixture(autouse=True)
def native_backend():
    """`set_attention_backend` also sets one for the whole process, and nothing takes it back."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def processors(transformer):
    return [module.processor for module in transformer.modules() if hasattr(module, "processor")]


def steps_of(pipe):
    return sorted({record.step for record in attached(pipe)["transformer"].state.records})


class Parallel:
    """Stands for what `enable_parallelism` puts on processors."""


def test_what_diffusers_stored_on_our_processors_goes_to_the_originals(load):
    """`enable_parallelism` and `set_attention_backend` while attached, then restore: nothing they set may vanish."""
    pipe = svg.accelerate(load("wan"), SPARSE)
    config = Parallel()
    pipe.transformer.set_attention_backend("_native_math")
    for processor in processors(pipe.transformer):
        processor._parallel_config = config
    svg.restore(pipe)
    for processor in processors(pipe.transformer):
        assert type(processor) is WanAttnProcessor
        assert processor._parallel_config is config and processor._attention_backend == "_native_math"


def test_what_diffusers_stored_on_the_originals_is_taken_over(load):
    pipe = load("wan")
    pipe.transformer.set_attention_backend("_native_math")
    svg.accelerate(pipe, SPARSE)
    assert all(processor._attention_backend == "_native_math" for processor in processors(pipe.transformer))


def test_processors_that_unfuse_would_put_back_are_not_ours(load, run):
    """CogVideoX keeps the processors it finds when it fuses: ours, if it was attached."""
    pipe = load("cogvideox_2b")
    plain = run(pipe)
    before = processors(pipe.transformer)
    svg.accelerate(pipe, SPARSE)
    with torch.no_grad():
        pipe.transformer.fuse_qkv_projections()
    svg.restore(pipe)
    with torch.no_grad():
        pipe.transformer.unfuse_qkv_projections()
    assert processors(pipe.transformer) == before
    torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)


def test_a_deep_copy_follows_its_own_scheduler(load, run):
    pipe = svg.accelerate(load("wan_i2v"), SPARSE)  # passes no step_index
    plain = run(pipe, steps=4)
    run(pipe, steps=3)
    double = copy.deepcopy(pipe)
    mine, theirs = attached(pipe)["transformer"], attached(double)["transformer"]
    assert mine.state is not theirs.state and not theirs.state.records
    assert all(processor.state is theirs.state for processor in theirs.processors)
    for _ in range(2):
        torch.testing.assert_close(run(double, steps=4), plain, rtol=0, atol=1e-5)
        assert steps_of(double) == [0, 1, 2, 3] and theirs.state.num_steps == 4
    assert steps_of(pipe) == [0, 1, 2] and mine.state.num_steps == 3
    svg.restore(double)
    assert torch.equal(run(pipe, steps=4), plain)


def test_a_deep_copy_of_an_accelerated_pipe_is_restored_exactly(load, run):
    pipe = load("wan")
    plain = run(pipe)
    double = svg.restore(copy.deepcopy(svg.accelerate(pipe, SPARSE)))
    torch.testing.assert_close(run(double), plain, rtol=0, atol=1e-5)  # its weights lie elsewhere
    assert (run(pipe) - plain).abs().max() > 1e-4


def test_a_second_pipeline_with_a_scheduler_of_its_own(load, run):
    """It shares the transformer that the first one was accelerated with."""
    pipe = svg.accelerate(load("wan_i2v"), WARM)
    run(pipe, steps=2)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = diffusers.WanImageToVideoPipeline(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    for steps in (5, 4):
        run(other, steps=steps)
        state = attached(other)["transformer"].state
        assert steps_of(other) == list(range(steps)) and state.num_steps == steps
        assert {record.step for record in state.records if record.dense} == {0, 1}


def test_skipped_scores_are_skipped_by_sparse_calls(load, run):
    """Perturbed attention guidance replaces attention by its values, whatever would have computed it."""
    register_skip(WanAttnProcessor, lambda module, hidden_states, *args, **kwargs: hidden_states)
    skip = LayerSkipConfig(
        indices=[0, 1, 2], fqn="blocks", skip_attention=False, skip_ff=False, skip_attention_scores=True
    )
    stock = load("wan")
    apply_layer_skip(stock.transformer, skip)
    plain = run(stock)
    pipe = svg.accelerate(load("wan"), SPARSE)
    apply_layer_skip(pipe.transformer, skip)
    torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)
    assert not attached(pipe)["transformer"].state.records


@pytest.mark.parametrize("name", ["first_block_cache", "group", "layer_skip"])
def test_a_fused_forward_that_was_wrapped_is_stock_after_restore(load, run, name, monkeypatch):
    pipe = load("wan")
    plain = run(pipe)
    svg.accelerate(pipe, DenseConfig(fused=True))
    transformer = pipe.transformer
    if name == "first_block_cache":
        transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    elif name == "group":
        transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    else:
        skip = LayerSkipConfig(indices=[1], fqn="blocks", dropout=0.0)
        apply_layer_skip(transformer, skip)
    svg.restore(pipe)
    monkeypatch.setattr("svg.pipelines.fused_blocks.modulate", None)  # a fused forward would fail
    torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [SPARSE, SpargeConfig()], ids=lambda config: config.method)
def test_gradient_checkpointing_through_a_sparse_method_is_refused(load, config):
    pipe = svg.accelerate(load("wan"), config)
    pipe.transformer.enable_gradient_checkpointing()
    inputs = torch.randn(1, 16, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 7, 32)
    with pipe.transformer.cache_context("cond", step_index=0, num_inference_steps=1):
        with pytest.raises(NotImplementedError, match="gradient checkpointing must be off with .*int8_training"):
            pipe.transformer(*inputs)
        with torch.no_grad():
            pipe.transformer(*inputs)


def test_gradient_checkpointing_with_dense_gives_the_stock_gradients(load):
    inputs = torch.randn(1, 16, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 7, 32)
    found = []
    for accelerated in (False, True):
        pipe = load("wan")
        pipe.transformer.enable_gradient_checkpointing()
        if accelerated:
            svg.accelerate(pipe, DenseConfig())
        pipe.transformer.train()
        with pipe.transformer.cache_context("cond", step_index=0, num_inference_steps=1):
            pipe.transformer(*inputs)[0].square().mean().backward()
        found.append(pipe.transformer.blocks[0].attn1.to_q.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


class Mine(WanAttnProcessor):
    """A processor of the user's own."""


def test_a_processor_of_the_users_own_is_refused(load):
    pipe = load("wan")
    mine = Mine()
    pipe.transformer.blocks[1].attn1.set_processor(mine)
    with pytest.raises(ValueError, match="processors must be Diffusers' own .* got .*Mine"):
        svg.accelerate(pipe, SPARSE)
    assert pipe.transformer.blocks[1].attn1.processor is mine
    pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
    svg.accelerate(svg.accelerate(pipe, SPARSE), DenseConfig())


@pytest.mark.parametrize("backend, ours", [("native", "auto"), ("_native_math", "math"), ("_native_flash", "flash")])
@pytest.mark.parametrize("when", ["before", "after", "global"])
def test_a_diffusers_attention_backend_is_kept(load, run, monkeypatch, backend, ours, when):
    used = []
    module = sys.modules["svg.attend"]
    original = module.dense_attention

    def spy(q, k, v, key_mask, backend):
        used.append(backend)
        return original(q, k, v, key_mask)

    monkeypatch.setattr(module, "dense_attention", spy)
    pipe = load("wan")
    if when == "before":
        pipe.transformer.set_attention_backend(backend)
    svg.accelerate(pipe, SPARSE)
    if when == "after":
        pipe.transformer.set_attention_backend(backend)
    if when == "global":
        with attention_backend(backend):
            run(pipe)
    else:
        run(pipe)
    assert set(used) == {ours}


def test_a_diffusers_attention_backend_that_cannot_be_kept_is_refused(load, run):
    pipe = load("wan")
    pipe.transformer.set_attention_backend("flex")
    with pytest.raises(
        ValueError, match="got 'flex'; call transformer.set_attention_backend.'native'. .*dense_backend"
    ):
        svg.accelerate(pipe, SPARSE)
    pipe.transformer.set_attention_backend("native")
    svg.accelerate(pipe, SPARSE)
    pipe.transformer.reset_attention_backend()
    with attention_backend("flex"), pytest.raises(ValueError, match="got 'flex'"):
        run(pipe)
    pipe.transformer.set_attention_backend("_native_math")
    with pytest.raises(ValueError, match="dense_backend must be auto or math .* got 'flash'"):
        svg.accelerate(pipe, DenseConfig(dense_backend="flash"))


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox_2b"])
def test_a_swapped_transformer_does_not_run_dense_in_silence(load, run, name):
    pipe, other = load(name), load(name).transformer
    plain = run(pipe)
    svg.accelerate(pipe, SPARSE)
    original, pipe.transformer = pipe.transformer, other
    with pytest.raises(RuntimeError, match="pipe.transformer must stay the transformer that svg.accelerate was given"):
        run(pipe)
    run(svg.accelerate(pipe, SPARSE))
    svg.restore(pipe)
    assert torch.equal(run(pipe), plain) and "progress_bar" not in vars(pipe)
    assert "_diffusers_hook" in vars(original)  # it was taken out of the pipe with our hook, and keeps it


@pytest.mark.parametrize("named", [True, False])
def test_a_loop_of_ones_own_with_a_single_step_begins_a_run_every_time(load, named):
    pipe = svg.accelerate(load("wan"), SVG2Config(top_p=0.5, warmup_steps=0.0, warmup_layers=0.0))
    pipe.scheduler.set_timesteps(1)
    hook = attached(pipe)["transformer"]
    text = torch.randn(2, 1, 7, 32)
    for seed in range(3):
        torch.manual_seed(seed)
        latents = torch.randn(1, 16, 3, 4, 6)
        for name, prompt in zip(("cond", "uncond"), text):
            with torch.no_grad():
                if named:
                    with pipe.transformer.cache_context(name, step_index=0, num_inference_steps=1):
                        pipe.transformer(latents, pipe.scheduler.timesteps[:1], prompt)
                else:
                    pipe.transformer(latents, pipe.scheduler.timesteps[:1], prompt)
        assert len(hook.state.records) == 2 * 3  # branches x layers, of this run only
        assert len({record.branch for record in hook.state.records}) == 2


@pytest.mark.parametrize("name", ["wan", "wan_i2v", "cogvideox_2b"])
def test_a_forward_outside_any_run_has_no_step(load, run, name):
    pipe = svg.accelerate(load(name), SPARSE)
    config = pipe.transformer.config
    inputs = dict(encoder_hidden_states=torch.randn(1, 16, 32), timestep=torch.tensor([500]))
    if name == "cogvideox_2b":
        inputs["hidden_states"] = torch.randn(1, 3, 4, 4, 6)
    else:
        inputs["hidden_states"] = torch.randn(1, config.in_channels, 3, 4, 6)

    def alone(timestep):
        with torch.no_grad():
            pipe.transformer(**{**inputs, "timestep": timestep})

    with pytest.raises(
        RuntimeError, match="the step must be known .* neither a cache context nor a scheduler tells it"
    ):
        alone(torch.tensor([500]))
    run(pipe)
    records = attached(pipe)["transformer"].state.records
    before = list(records)
    with pytest.raises(RuntimeError, match="the step must be known .* after the end of a run"):
        alone(pipe.scheduler.timesteps[2:3])
    assert records == before
    run(pipe)


def test_autocast(load, run):
    pipe = load("hunyuan")
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(pipe)
        svg.accelerate(pipe, DenseConfig())
        torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)
        run(svg.accelerate(pipe, SPARSE))


def test_an_accelerated_transformer_can_be_pickled(load, run):
    pipe = svg.accelerate(load("wan"), SPARSE)
    expected = run(pipe)
    pipe.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    torch.testing.assert_close(run(pipe), expected, rtol=0, atol=1e-5)  # its weights lie elsewhere
    svg.restore(pipe)
    assert all(type(processor) is WanAttnProcessor for processor in processors(pipe.transformer))


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_patched_forward(load, run, monkeypatch, where):
    pipe = load("wan")
    kind, original = type(pipe.transformer), type(pipe.transformer).forward
    expected = run(svg.accelerate(load("wan"), SPARSE))
    svg.accelerate(pipe, SPARSE)
    if where == "class":
        monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
        svg.accelerate(pipe, SPARSE)
    else:
        pipe.transformer.forward = lambda *args, **kwargs: original(pipe.transformer, *args, **kwargs)
    assert torch.equal(run(pipe), expected)


def test_one_transformer_in_both_slots(load, run):
    pipe = load("wan_2_2")
    pipe.transformer_2 = pipe.transformer
    plain = run(pipe, steps=6)
    before = processors(pipe.transformer)
    torch.testing.assert_close(run(svg.accelerate(pipe, DenseConfig()), steps=6), plain, rtol=0, atol=1e-5)
    assert list(transformers_of(pipe)) == ["transformer"] == list(svg.report(pipe)["transformers"])
    assert steps_of(pipe) == list(range(6))
    svg.restore(pipe)
    assert processors(pipe.transformer) == before and torch.equal(run(pipe, steps=6), plain)


def video_to_video(pipe, strength):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(
            video=torch.rand(1, 9, 3, 32, 48), prompt="a dog", height=32, width=48, num_inference_steps=5,
            strength=strength, output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return [str(warning.message) for warning in caught if "warm-up" in str(warning.message)]


def test_a_run_that_starts_after_its_warm_up_says_so(load):
    parts = load("wan").components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = diffusers.WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    svg.accelerate(pipe, SPARSE)
    assert video_to_video(pipe, 1.0) == []
    (message,) = video_to_video(pipe, 0.6)
    assert "begins at step 2 of 5, after its warm-up" in message
    svg.accelerate(pipe, DenseConfig())
    assert video_to_video(pipe, 0.6) == []


def test_attaching_to_and_reporting_on_a_large_transformer_is_quick():
    """Wan 14B's shape without its numbers; a report on as many calls as 25 steps of it make."""
    with torch.device("meta"):
        transformer = diffusers.WanTransformer3DModel()
    began = time.thread_time()
    svg.accelerate(transformer, NearConfig())
    svg.restore(transformer)
    state = RunState(NearConfig(), num_layers=40)
    for step in range(25):
        for branch in ("cond", "uncond"):
            state.begin_forward(step, 25, branch, TokenLayout(21, 45, 80))
            state.records += [AttentionRecord(step, n, branch, torch.ones(1, 40), None, False, None) for n in range(40)]
    summarize(state)
    assert time.thread_time() - began < 1.0
