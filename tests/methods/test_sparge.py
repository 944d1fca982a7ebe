import math

import pytest
import torch
from sparge_blocks import sparge_blocks

from svg.attend import attend, dense_attention
from svg.config import SpargeConfig
from svg.engine.layout import TokenLayout
from svg.engine.state import LayerState, RunState
from svg.methods.dense import key_mask
from svg.methods.sparge import plan as sparge
from svg.methods.sparge.thresholds_file import Thresholds, read_layers, save_thresholds
from svg.methods.video_order import hilbert_index, video_order

ALWAYS = {"warmup_steps": 0, "warmup_layers": 0}
Q, K = 8, 4


small_blocks = sparge_blocks(Q, K, autouse=False)


def gram_mean(rows):
    units = [row / row.norm() for row in rows]
    return sum((a @ b).item() for a in units for b in units) / len(units) ** 2


def brute_force(q, k, layout, prompt, order, config):
    """The S x S map of one sample and head, block by block from the definition."""
    video = [layout.video_slice.start + i for i in order.tolist()]
    q_blocks, k_blocks = ([video[i : i + n] for i in range(0, len(video), n)] for n in (Q, K))
    similar = [gram_mean(k[block].double()) > config.simthresh for block in k_blocks]
    seen = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.bool)
    for rows in q_blocks:
        kept = {j for j in range(len(k_blocks)) if not similar[j]} | ({0} if config.attention_sink else set())
        if gram_mean(q[rows].double()) > config.simthresh:
            scores = {
                j: (q[rows].double().mean(0) @ k[block].double().mean(0)).item() / math.sqrt(q.shape[-1])
                for j, block in enumerate(k_blocks) if similar[j]
            }  # fmt: skip
            total, mass = sum(math.exp(score) for score in scores.values()), 0.0
            for rank, j in enumerate(sorted(scores, key=lambda j: -scores[j])):
                mass += math.exp(scores[j]) / total
                if rank > 0 and (mass > (config.cdf or 2) or rank >= int((config.topk or 2) * len(k_blocks))):
                    break
                kept.add(j)
        else:
            kept = range(len(k_blocks))
        for j in kept:
            seen[torch.tensor(rows)[:, None], k_blocks[j]] = True
    seen[layout.text_slice] = True
    for i, real in enumerate(prompt):
        seen[:, layout.text_slice.start + i] = real
    return seen


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 0.4},
        {"cdf": 0.5, "order": "rowmajor"},
        {"cdf": 0.7, "simthresh": 0.45, "attention_sink": True},
        {"topk": 0.2, "simthresh": 0.5, "order": "rowmajor"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_calls_equal_brute_force(layout, settings, padded, small_blocks, make_qkv, make_mask, masked_attention):
    config = SpargeConfig(**ALWAYS, **settings)
    mask = make_mask(layout) if padded else None
    state = RunState(config, 4)
    state.begin_forward(0, 1, "cond", layout)
    q, k, v = make_qkv(layout, heads=2, dim=8)
    out = attend(q, k, v, state, 2, mask)
    order = video_order(layout, config.order)
    for b in range(2):
        prompt = [True] * layout.text_tokens if mask is None else mask[b].tolist()
        for h in range(2):
            seen = brute_force(q[b, :, h], k[b, :, h], layout, prompt, order, config)
            expected = masked_attention(q[b, :, h], k[b, :, h], v[b, :, h], seen)
            torch.testing.assert_close(out[b, :, h].double(), expected, atol=2e-5, rtol=0)
            visible = layout.total_tokens * (layout.video_tokens + sum(prompt))
            assert state.records[-1].density[b, h].item() == pytest.approx(seen.sum().item() / visible, rel=1e-6)


@pytest.mark.parametrize(
    "settings", [{"topk": 1.0}, {"cdf": 1.0, "order": "rowmajor"}, {"topk": 0.1, "simthresh": 0.99}]
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_density_one_is_dense(layout, side, settings, small_blocks, make_mask, make_qkv, make_state):
    mask, qkv = make_mask(layout, side=side), make_qkv(layout)
    state = make_state(SpargeConfig(**ALWAYS, **settings), layout)
    out = attend(*qkv, state, 2, mask)
    dense = dense_attention(*(x.transpose(1, 2) for x in qkv), key_mask(layout, mask)).transpose(1, 2)
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=0)
    assert state.records[-1].density.eq(1).all()


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp16"])
def test_quantised_calls_plan_alike(precision, layout, small_blocks, make_qkv, make_state, make_mask):
    qkv, mask = make_qkv(layout, dtype=torch.bfloat16), make_mask(layout)
    states = [make_state(SpargeConfig(**ALWAYS, topk=0.5, precision=p), layout) for p in ("native", precision)]
    expected, out = (attend(*qkv, state, 2, mask).float() for state in states)
    assert torch.equal(states[0].records[0].density, states[1].records[0].density)
    assert 0 < (out - expected).norm() / expected.norm() < (0.06 if precision == "int8-fp8" else 0.02)


def test_blocks_of_zeros_give_finite_outputs(small_blocks, make_qkv, make_state):
    layout = TokenLayout(3, 2, 5)
    q, k, v = make_qkv(layout)
    for settings in ({"cdf": 0.5}, {"topk": 0.3, "simthresh": 0.0}):
        for zeroed in (q, k, v):
            inputs = [x * (x is not zeroed) for x in (q, k, v)]
            out = attend(*inputs, make_state(SpargeConfig(**ALWAYS, **settings), layout), 2)
            assert out.isfinite().all()


def test_pv_threshold_skips_what_adds_little(make_qkv, make_state):
    """A filter that never applies changes nothing, one of 20 powers of two next to nothing, one of 0 something."""
    layout = TokenLayout(4, 8, 16)
    q, k, v = make_qkv(layout, batch=1)
    outs = {}
    for limit in (None, 1e30, 20.0, 0.0):
        config = SpargeConfig(**ALWAYS, topk=0.7, precision="int8-fp16", pv_threshold=limit, order="rowmajor")
        k_steps = k + torch.linspace(0, 6, 8).flip(0).repeat_interleave(64)[:, None, None] * q.mean((0, 1)).sign()
        outs[limit] = attend(3 * q, k_steps, v, make_state(config, layout), 2)
    change = {limit: (out - outs[None]).norm() / outs[None].norm() for limit, out in outs.items()}
    assert change[1e30] < 1e-3 and change[20.0] < 2e-3 < change[0.0]


def test_whole_numbers_are_numbers(make_qkv, make_state):
    config = SpargeConfig(**ALWAYS, cdf=1, simthresh=0, pv_threshold=10, precision="int8-fp16")
    state = make_state(config, TokenLayout(2, 3, 4))
    assert attend(*make_qkv(TokenLayout(2, 3, 4)), state, 2).isfinite().all()


def write(path, heads=3, layer=2, order="hilbert", sink=False, **values):
    filled = {"simthresh": -1.0, "cdf": 0.5, "pv_threshold": torch.inf} | values
    layers = {
        ("transformer", layer): Thresholds(
            **{k: torch.tensor([v] * heads) if isinstance(v, float) else v for k, v in filled.items()}
        )
    }
    save_thresholds(path, layers, {"order": order, "attention_sink": sink})
    return str(path)


def test_thresholds_of_each_head(tmp_path, small_blocks, make_qkv, make_state):
    layout = TokenLayout(3, 4, 5)
    path = write(tmp_path / "t", cdf=torch.tensor([0.2, 0.6, 1.0]), simthresh=torch.tensor([-1.0, 0.4, -1.0]))
    qkv = make_qkv(layout)
    tuned = make_state(SpargeConfig(**ALWAYS, thresholds=path), layout)
    out = attend(*qkv, tuned, 2)
    for head, (cdf, simthresh) in enumerate(((0.2, -1.0), (0.6, 0.4), (1.0, -1.0))):
        alone = make_state(SpargeConfig(**ALWAYS, cdf=cdf, simthresh=simthresh), layout)
        assert torch.equal(attend(*qkv, alone, 2)[:, :, head], out[:, :, head])
        assert torch.equal(alone.records[0].density[:, head], tuned.records[0].density[:, head])
    assert read_layers(path)["transformer", 2].cdf.tolist() == pytest.approx([0.2, 0.6, 1.0])


def test_the_filter_of_a_file_is_for_8_bits_only(tmp_path, make_qkv):
    layout = TokenLayout(2, 4, 5)
    path = write(tmp_path / "t", pv_threshold=3.0)
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout))
    for precision, limits in (("native", None), ("int8-fp8", [3.0] * 3)):
        config = SpargeConfig(thresholds=path, precision=precision)
        found = sparge.plan(q, k, v, config, LayerState(2, "cond", 0), layout).pv_threshold
        assert (found if found is None else found.tolist()) == limits
    assert (
        sparge.plan(q, k, v, SpargeConfig(precision="int8-fp8"), LayerState(2, "cond", 0), layout).pv_threshold is None
    )


def test_thresholds_that_do_not_fit_are_named(tmp_path, make_qkv, make_state):
    layout = TokenLayout(2, 4, 5)
    path = write(tmp_path / "t")
    (tmp_path / "text").write_text("hello")
    cases = [
        ({"thresholds": str(tmp_path / "none")}, "must be a file, got .*none, which is not there"),
        ({"thresholds": str(tmp_path / "text")}, "a whole safetensors file"),
        ({"thresholds": path, "order": "rowmajor"}, "order must be 'hilbert'.*got 'rowmajor'"),
        ({"thresholds": path, "attention_sink": True}, "attention_sink must be False"),
        ({"thresholds": write(tmp_path / "o", layer=1)}, "must have layer 2 of transformer, got .* with transformer 1"),
        ({"thresholds": write(tmp_path / "h", heads=5)}, "must be of 3 heads, got 5"),
    ]
    for settings, words in cases:
        with pytest.raises(ValueError, match=words):
            attend(*make_qkv(layout), make_state(SpargeConfig(**ALWAYS, **settings), layout), 2)
    second = RunState(SpargeConfig(**ALWAYS, thresholds=path), 4, "transformer_2")
    second.begin_forward(0, 1, "cond", layout)
    with pytest.raises(ValueError, match="must have layer 2 of transformer_2, got .* with transformer 2"):
        attend(*make_qkv(layout), second, 2)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_hilbert_curve_visits_every_place_of_a_cube_in_steps_of_one(side):
    place = torch.cartesian_prod(*[torch.arange(side)] * 3).view(-1, 3)
    index = hilbert_index(place.T)
    assert sorted(index.tolist()) == list(range(side**3))
    steps = place[index.argsort()].diff(dim=0).abs().sum(1)
    assert (steps == 1).all()


def test_order_of_any_grid_is_a_permutation_that_keeps_neighbours_together():
    layout = TokenLayout(5, 9, 16, 3, "last")
    order = video_order(layout, "hilbert")
    assert sorted(order.tolist()) == list(range(layout.video_tokens)) and order[0] == 0
    place = torch.cartesian_prod(*(torch.arange(n) for n in (5, 9, 16))).float()

    def spread(order):
        return torch.stack([block.std(0).square().sum() for block in place[order].split(64)[:-1]]).mean()

    assert spread(order) < 0.3 * spread(video_order(layout, "rowmajor"))
    with pytest.raises(ValueError, match="order must be one of hilbert, rowmajor, got 'zigzag'"):
        video_order(layout, "zigzag")


def test_video_of_fewer_tokens_than_a_block(make_qkv, make_state):
    layout = TokenLayout(1, 2, 3, 2, "first")
    state = make_state(SpargeConfig(**ALWAYS, topk=0.1), layout)
    attend(*make_qkv(layout), state, 2)
    assert state.records[0].density.eq(1).all()  # one block, which always stays
