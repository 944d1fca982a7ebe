"""What users do besides: caches, offloading, fused projections, LoRA, compilation, other backends."""

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import LayerSkipConfig, apply_layer_skip

import svg
from svg.config import DenseConfig, NearConfig, SVG1Config, SVG2Config
from svg.engine.state import RunState
from svg.pipelines.attach import attached, transformers_of
from svg.pipelines.caches import enable_cache

SPARSE = SVG2Config(
    top_p=0.5, num_q_clusters=4, num_k_clusters=6, first_iterations=5, warmup_steps=0.2, warmup_layers=0.0
)


def steps_of(pipe, name="transformer"):
    return sorted({record.step for record in attached(pipe)[name].state.records})


def attributes(pipe):
    return {name: set(vars(module)) for name, module in transformers_of(pipe).items()}


def test_attach_and_restore_leave_no_attribute_before_any_run(load):
    pipe = load("wan_2_2")
    before = attributes(pipe)
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in transformers_of(pipe).items()}
    svg.accelerate(pipe, SPARSE)
    assert attributes(pipe) != before
    svg.restore(svg.restore(pipe))
    assert attributes(pipe) == before
    assert hooks == {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in transformers_of(pipe).items()}


def test_accelerating_again_replaces_the_method(load, run):
    pipe = load("wan")
    original = [block.attn1.processor for block in pipe.transformer.blocks]
    dense = run(pipe)
    svg.accelerate(pipe, SPARSE)
    svg.accelerate(pipe, {"method": "svg1", "density": 1.0, "block_size": 4, "warmup_steps": 0.0})
    torch.testing.assert_close(run(pipe), dense, rtol=0, atol=1e-4)
    assert svg.report(pipe)["config"]["method"] == "svg1"
    svg.accelerate(pipe, "tiny-wan")
    assert isinstance(attached(pipe)["transformer"].state.config, NearConfig)
    svg.accelerate(pipe, "tiny-wan:svg1")
    assert isinstance(attached(pipe)["transformer"].state.config, SVG1Config)
    svg.restore(pipe)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == original
    assert torch.equal(run(pipe), dense)


@pytest.mark.parametrize("threshold, skips", [(0.0, False), (1e6, True)])
@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("name", ["wan", "wan_i2v", "hunyuan"])
def test_first_block_cache(load, run, name, cache_first, threshold, skips):
    """With a threshold of 0 nothing is skipped; with a huge one only the first step is whole. Steps are right in both."""
    pipe = load(name)
    alone = run(svg.accelerate(pipe, SPARSE))
    if not cache_first:
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    else:
        svg.restore(pipe)
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
        svg.accelerate(pipe, SPARSE)
    for _ in range(2):
        cached = run(pipe)
        records = attached(pipe)["transformer"].state.records
        assert steps_of(pipe) == [0, 1, 2, 3, 4]
        assert all(record.dense == (record.step == 0) for record in records)
        assert torch.equal(cached, alone) != skips
        assert any(record.layer > 0 and record.step > 0 for record in records) != skips
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe), alone)


@pytest.mark.parametrize("cache_first", [True, False])
def test_sea_cache(load, run, cache_first):
    """Its first and last step are whole; between them it skips two in a row, and counts nothing for svg."""
    pipe = load("wan")
    alone = run(svg.accelerate(pipe, SPARSE))
    svg.restore(pipe)
    actions = lambda: enable_cache(pipe, "seacache=1e6", 5), lambda: svg.accelerate(pipe, SPARSE)
    for action in actions if cache_first else actions[::-1]:
        action()
    assert not torch.equal(run(pipe), alone) and steps_of(pipe) == [0, 3, 4]
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe), alone)


def test_sea_cache_is_refused_where_it_would_do_nothing(load):
    pipe = load("hunyuan")
    with pytest.raises(ValueError, match="seacache must be left out for HunyuanVideoPipeline"):
        enable_cache(pipe, "seacache", 5)
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
@pytest.mark.parametrize("offload_first", [True, False])
def test_offloading(load, run, offload, offload_first):
    """Accelerate takes its own wrapper off and on again after every run: ours must survive that, and restore must too."""
    pipe = load("wan")
    plain = run(pipe)
    sparse = run(svg.accelerate(load("wan"), SPARSE))
    enable = {
        "model": lambda: pipe.enable_model_cpu_offload(device="cpu"),
        # What enable_sequential_cpu_offload does to each component (on a CPU, Accelerate fails in the text encoder).
        "sequential": lambda: cpu_offload(pipe.transformer, torch.device("cpu")),
        "group": lambda: pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        ),
    }[offload]
    for action in (enable, lambda: svg.accelerate(pipe, SPARSE))[:: 1 if offload_first else -1]:
        action()
    # Weights that moved lie at other addresses, and a CPU's sums may then differ in the last bit.
    for _ in range(2):
        torch.testing.assert_close(run(pipe), sparse, rtol=0, atol=1e-5)
        assert steps_of(pipe) == [0, 1, 2, 3, 4]
    svg.restore(pipe)
    for _ in range(2):
        torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)
    if offload != "group":
        assert hasattr(pipe.transformer, "_hf_hook") and hasattr(pipe.transformer, "_old_forward")  # still offloaded


@pytest.mark.parametrize("name", ["wan", "cogvideox_2b"])
def test_fused_projections(load, run, name):
    pipe = load(name)
    plain = run(pipe)
    with torch.no_grad():
        pipe.transformer.fuse_qkv_projections()
    fused = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    svg.accelerate(pipe, DenseConfig())
    torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)
    svg.restore(pipe)
    assert [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")] == fused
    with torch.no_grad():
        pipe.transformer.unfuse_qkv_projections()
    svg.accelerate(pipe, DenseConfig())
    torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)


def test_fusing_the_projections_of_an_accelerated_wan(load, run):
    pipe = load("wan")
    plain = run(pipe)
    svg.accelerate(pipe, DenseConfig())
    with torch.no_grad():
        pipe.transformer.fuse_qkv_projections()
    assert pipe.transformer.blocks[0].attn1.fused_projections
    torch.testing.assert_close(run(pipe), plain, rtol=0, atol=1e-5)


def test_replaced_processors_are_noticed(load, run):
    """CogVideoX's fuse_qkv_projections sets other processors: going on without sparse attention would be silent."""
    pipe = svg.accelerate(load("cogvideox_2b"), SPARSE)
    with torch.no_grad():
        pipe.transformer.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="FusedCogVideoXAttnProcessor2_0 in layer 0; call svg.accelerate"):
        run(pipe)
    run(svg.accelerate(pipe, SPARSE))
    assert svg.report(pipe)["transformers"]["transformer"]["calls"]["sparse"] > 0


@pytest.mark.parametrize("attach_first", [True, False])
def test_lora(load, run, attach_first):
    import peft  # in the extra `test`: without it this must fail, not skip

    settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)

    def with_lora(pipe):
        torch.manual_seed(5)
        pipe.transformer.add_adapter(settings)

    pipe = load("wan")
    plain = run(pipe)
    with_lora(pipe)
    stock = run(pipe)
    assert (stock - plain).abs().max() > 1e-3
    ours = load("wan")
    for action in (lambda: svg.accelerate(ours, DenseConfig()), lambda: with_lora(ours))[:: 1 if attach_first else -1]:
        action()
    torch.testing.assert_close(run(ours), stock, rtol=0, atol=1e-5)
    ours.transformer.disable_adapters()
    torch.testing.assert_close(run(ours), plain, rtol=0, atol=1e-5)


def test_compiled_blocks(load, run):
    """Dynamo breaks its graphs at attend; the rest of a block is compiled."""
    pipe = load("wan")
    sparse = run(svg.accelerate(pipe, SPARSE))
    pipe.transformer.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(run(pipe), sparse, rtol=0, atol=1e-4)
    assert svg.report(pipe)["transformers"]["transformer"]["calls"]["total"] == 30
    torch._dynamo.reset()


def test_a_compiled_transformer_is_looked_into(load, run):
    pipe = load("wan")
    sparse = run(svg.accelerate(pipe, SPARSE))
    svg.restore(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(run(svg.accelerate(pipe, SPARSE)), sparse, rtol=0, atol=1e-4)
    torch._dynamo.reset()


def test_layer_skip(load, run):
    pipe = svg.accelerate(load("wan"), SPARSE)
    whole = run(pipe)
    skip = LayerSkipConfig(indices=[1], fqn="blocks", skip_attention=True, skip_ff=False, skip_attention_scores=False)
    apply_layer_skip(pipe.transformer, skip)
    assert not torch.equal(run(pipe), whole)
    assert {record.layer for record in attached(pipe)["transformer"].state.records} == {0, 2}


def test_an_attention_mask_in_wan_self_attention_is_refused(load):
    pipe = svg.accelerate(load("wan"), SPARSE)
    attn = pipe.transformer.blocks[0].attn1
    with pytest.raises(NotImplementedError, match="attention_mask must be None in Wan"):
        attn(torch.zeros(1, 4, 32), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_nan_is_named(load, run):
    pipe = svg.accelerate(load("wan"), SPARSE)
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_v.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="v must be finite.*transformer layer 1, step 0 of 5, branch cond"):
        run(pipe)


def test_the_last_forward_is_checked_too(load, run, monkeypatch):
    """On a GPU the flags of a forward are read at the next one, those of the last when the pipeline is done."""
    pipe = svg.accelerate(load("wan_2_2"), SPARSE)
    ended = []
    monkeypatch.setattr(RunState, "end_run", lambda state: ended.append((state.name, state.step)))
    run(pipe, steps=6)
    assert sorted(ended) == [("transformer", 2), ("transformer_2", 5)]


def test_training_state_and_saving_are_untouched(load, tmp_path):
    pipe = load("wan")
    before = pipe.transformer.state_dict().keys()
    svg.accelerate(pipe, SPARSE)
    assert pipe.transformer.state_dict().keys() == before
    pipe.save_pretrained(tmp_path / "saved")
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved"), diffusers.WanPipeline)


def test_nothing_keeps_a_pipeline_alive(load, run):
    import gc
    import weakref

    pipe = svg.accelerate(load("wan"), SPARSE)
    run(pipe)
    gone = weakref.ref(pipe), weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
