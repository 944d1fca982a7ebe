"""Every supported transformer class, tiny and random, against Diffusers: density 1, every method, grids, restore."""

import diffusers
import pytest
import torch
from sparge_blocks import sparge_blocks
from tiny_transformers import FAMILIES

import svg
from svg.config import DenseConfig, NearConfig, Sage2Config, SpargeConfig, SVG1Config, SVG2Config
from svg.pipelines.attach import attached
from svg.pipelines.linears import QuantizedLinear
from svg.pipelines.refused import REFUSED
from svg.pipelines.registry import MODELS

WARMUP = dict(warmup_steps=0.0, warmup_layers=0.0)
NEAR = dict(granule=8, rows=64, pool=2, cluster_tokens=8, query_cluster_tokens=8, first_iterations=5)
FULL = {
    "dense": DenseConfig(),
    "fused": DenseConfig(fused=True),
    "svg1": SVG1Config(density=1.0, block_size=4, sample_rows=8, **WARMUP),
    "svg2": SVG2Config(top_p=1.0, num_q_clusters=4, num_k_clusters=6, first_iterations=5, **WARMUP),
    "sparge": SpargeConfig(topk=1.0, **WARMUP),
    "near": NearConfig(budget=1.0, **NEAR, **WARMUP),
}
SPARSE = {
    "svg1": SVG1Config(density=0.5, block_size=4, sample_rows=8, **WARMUP),
    "svg2": SVG2Config(top_p=0.4, num_q_clusters=4, num_k_clusters=6, first_iterations=5, **WARMUP),
    "sparge": SpargeConfig(topk=0.4, **WARMUP),
    "near": NearConfig(budget=0.9, **NEAR, **WARMUP),
    "sage2": Sage2Config(**WARMUP),
}
SIZE = (5, 4, 6)
ODD = [(3, 4, 10), (7, 6, 4), (2, 14, 6)]


small_blocks = sparge_blocks(6, 3)


def made(name, size=SIZE):
    torch.manual_seed(len(name))
    family = FAMILIES[name]
    transformer = family.make().eval()
    for parameter in transformer.parameters():  # some start at zero, which would hide the blocks
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return transformer, family.inputs(family.batch, *size)


def outputs(transformer, inputs, branch="cond", step=0):
    context = transformer.cache_context if hasattr(transformer, "cache_context") else diffusers_context(transformer)
    with torch.no_grad(), context(branch, step_index=step, num_inference_steps=4):
        out = transformer(**inputs, return_dict=False)
    return torch.cat([x.flatten() for x in flat(out)])


def diffusers_context(transformer):
    return lambda name, **where: diffusers.models.cache_utils.CacheMixin.cache_context(transformer, name, **where)


def flat(out):
    for x in out if isinstance(out, (list, tuple)) else [out]:
        if torch.is_tensor(x):
            yield x
        elif x is not None:
            yield from flat(x)


def state_of(transformer):
    return attached(transformer)["transformer"].state


def test_every_supported_class_is_tested():
    assert {family.kind for family in FAMILIES.values()} | {"CogVideoXTransformer3DModel"} == set(MODELS)


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("name", FAMILIES)
def test_density_one_equals_stock_and_restore_is_exact(name, method):
    transformer, inputs = made(name)
    before = {key: module.processor for key, module in transformer.named_modules() if hasattr(module, "processor")}
    stock = outputs(transformer, inputs)
    assert stock.isfinite().all()
    svg.accelerate(transformer, FULL[method])
    torch.testing.assert_close(outputs(transformer, inputs), stock, rtol=0, atol=1e-5)
    state = state_of(transformer)
    assert len(state.records) == state.num_layers > 0
    assert all(record.dense == (method in ("dense", "fused")) for record in state.records)
    svg.restore(transformer)
    after = {key: module.processor for key, module in transformer.named_modules() if hasattr(module, "processor")}
    assert after == before and torch.equal(outputs(transformer, inputs), stock)


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name not in ("allegro", "minimax_h3")]
)  # widths of no 16
def test_linears_in_8_bits_and_back(name):
    transformer, inputs = made(name)
    stock = outputs(transformer, inputs)
    found = {}
    for which in ("feed_forward", "all"):
        svg.accelerate(transformer, DenseConfig(linears=which, fused=True))
        found[which] = {key for key, module in transformer.named_modules() if isinstance(module, QuantizedLinear)}
        assert 0 < (outputs(transformer, inputs) - stock).norm() < 0.04 * stock.norm()
    assert found["feed_forward"] < found["all"] and not any("norm" in key or "cross" in key for key in found["all"])
    svg.restore(transformer)
    assert torch.equal(outputs(transformer, inputs), stock)


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_runs_and_repeats(name, method):
    transformer, inputs = made(name)
    stock = outputs(transformer, inputs)
    svg.accelerate(transformer, SPARSE[method])
    first = [outputs(transformer, inputs, branch, step) for step in (0, 1) for branch in ("cond", "uncond")]
    found = state_of(transformer).records
    assert all(record.density.min() > 0 and record.density.mean() <= 1 for record in found)
    assert method == "sage2" or any(record.density.min() < 1 for record in found)
    assert all(x.isfinite().all() for x in first) and (first[0] - stock).abs().max() > 1e-7
    svg.pipelines.reset(transformer)
    alone = [outputs(transformer, inputs, "cond", step) for step in (0, 1)]  # branches share nothing
    assert torch.equal(alone[0], first[0]) and torch.equal(alone[1], first[2])


@pytest.mark.parametrize("size", [SIZE, *ODD], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", FAMILIES)
def test_grid(name, size):
    family = FAMILIES[name]
    transformer, inputs = made(name, size)
    svg.accelerate(transformer, DenseConfig())
    outputs(transformer, inputs)
    layout = state_of(transformer).layout
    assert (layout.frames, layout.height, layout.width) == tuple(n // p for n, p in zip(size, family.patch))
    assert layout.text_position == family.position
    if family.text_tokens is not None:
        assert layout.text_tokens == family.text_tokens


# family, latent frames x rows x columns, grid: the settings people run
SETTINGS = [
    ("wan", (21, 60, 104), (21, 30, 52)),
    ("wan", (21, 90, 160), (21, 45, 80)),
    ("wan", (31, 44, 80), (31, 22, 40)),  # 2.2 5B, 121 frames at 704p
    ("wan", (16, 60, 104), (16, 30, 52)),
    ("wan_vace", (21, 104, 60), (21, 52, 30)),
    ("wan_animate", (21, 90, 160), (21, 45, 80)),
    ("chronoedit", (8, 90, 160), (8, 45, 80)),
    ("skyreels_v2", (25, 68, 120), (25, 34, 60)),
    ("anyflow", (21, 60, 104), (21, 30, 52)),
    ("hunyuan_video", (33, 90, 160), (33, 45, 80)),
    ("hunyuan_video", (33, 160, 90), (33, 80, 45)),
    ("hunyuan_video_1_5", (31, 30, 53), (31, 30, 53)),
    ("ltx", (21, 16, 22), (21, 16, 22)),
    ("ltx2", (16, 16, 24), (16, 16, 24)),
    ("mochi", (4, 60, 106), (4, 30, 53)),
    ("cosmos", (16, 88, 160), (16, 44, 80)),
    ("cosmos_2_5", (24, 88, 160), (24, 44, 80)),
    ("allegro", (22, 90, 160), (22, 45, 80)),
    ("minimax_h3", (32, 48, 84), (32, 24, 42)),
    ("consisid", (13, 60, 90), (13, 30, 45)),
]


@pytest.mark.parametrize("name, latents, grid", SETTINGS)
def test_the_grids_of_what_people_run(name, latents, grid):
    family = FAMILIES[name]
    layout = MODELS[family.kind].layout(family.make().config, family.inputs(1, *latents))
    assert (layout.frames, layout.height, layout.width) == grid


@pytest.mark.parametrize("name, position", [("ltx", "first"), ("ltx2", "last")])
def test_conditions_of_a_packed_sequence_count_as_text(name, position):
    """Keyframes and references stand before the video's tokens in LTX-Video, after them in LTX-2."""
    family = FAMILIES[name]
    inputs = family.inputs(1, *SIZE)
    inputs["hidden_states"] = torch.randn(1, inputs["hidden_states"].shape[1] + 11, 4)
    layout = MODELS[family.kind].layout(family.make().config, inputs)
    assert (layout.text_tokens, layout.text_position) == (11, position)


def test_hunyuan_video_1_5_has_no_mask_of_all_pairs(monkeypatch):
    """Diffusers expands its padding mask to S x S in every layer: 12.9 GB at 720p."""
    transformer, inputs = made("hunyuan_video_1_5")
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, *args, attn_mask=None, **options):
        seen.append((query.shape, attn_mask))
        return original(query, *args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    outputs(transformer, inputs)
    tokens = 5 * 4 * 6 + 7 + 4 + 3
    assert any(mask.shape[-2:] == (tokens, tokens) for shape, mask in seen if mask is not None and shape[2] == tokens)
    seen.clear()
    outputs(svg.accelerate(transformer, DenseConfig()), inputs)
    ours = [mask.shape for shape, mask in seen if shape[2] == tokens]
    assert ours == [(2, 1, 1, tokens)] * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_depends_on_attention(name, monkeypatch):
    """Without this, equality would say nothing."""
    transformer, inputs = made(name)
    stock = outputs(transformer, inputs)
    monkeypatch.setattr("svg.pipelines.processor.attend_uncompiled", lambda q, k, v, *args, **kwargs: v)
    off = outputs(svg.accelerate(transformer, DenseConfig()), inputs)
    assert (off - stock).abs().max() > 1e-3


def test_a_causal_skyreels_is_refused_with_the_reason():
    transformer = FAMILIES["skyreels_v2"].make(num_frame_per_block=5)
    inputs = FAMILIES["skyreels_v2"].inputs(1, *SIZE)
    svg.accelerate(transformer, DenseConfig())
    with pytest.raises(NotImplementedError, match="attention_mask must be None .*causal or autoregressive"):
        outputs(transformer, inputs)


def test_a_sequence_of_two_videos_is_refused_in_minimax_h3():
    transformer, inputs = made("minimax_h3")
    inputs["position_ids"] = inputs["position_ids"].flip(0)
    svg.accelerate(transformer, DenseConfig())
    with pytest.raises(NotImplementedError, match="must be one video, frame by frame"):
        outputs(transformer, inputs)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name):
    kind = getattr(diffusers, name)
    with pytest.raises(ValueError, match=f"transformer must not be {name}: .*run it without svg"):
        svg.accelerate(kind.__new__(kind), DenseConfig())
