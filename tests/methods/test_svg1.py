import dataclasses
from functools import cache

import pytest
import torch
from attention_fixtures import dense_output

from svg.attend import attend
from svg.config import SVG1Config
from svg.engine.execute import execute
from svg.engine.layout import TokenLayout
from svg.engine.state import LayerState
from svg.kernels.selection import probe
from svg.methods.svg1 import plan as svg1

CPU = torch.device("cpu")


def plan_of(maps, index):
    """The plan of heads [B, H] with these indices into the maps."""
    return svg1.Plan(
        q_permutation=maps.q_permutation[index], k_permutation=maps.k_permutation[index], q_sizes=maps.q_sizes,
        k_sizes=maps.k_sizes, block_map=maps.block_map, map_index=index.int(), visible_keys=maps.visible_keys,
    )  # fmt: skip


@cache  # heads and densities look at the same maps
def brute_force_map(layout, kind, width, block_size, prompt):
    """The token map of svg1.py's docstring, token by token; prompt: bools of the text tokens."""
    frame, video = layout.tokens_per_frame, layout.video_tokens

    def coordinate(token):
        t, p = divmod(token, frame)
        return p * layout.frames + t if kind == svg1.TEMPORAL else token

    def chunks(tokens, size):
        tokens = sorted(tokens, key=coordinate)
        return [tokens[i : i + size] for i in range(0, len(tokens), size)]

    def span(block):
        return min(map(coordinate, block)), max(map(coordinate, block))

    seen = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.bool)
    start, text = layout.video_slice.start, layout.text_slice.start
    for rows in chunks(range(video), 2 * block_size):
        q_low, q_high = span(rows)
        for columns in chunks(range(frame, video), block_size):
            k_low, k_high = span(columns)
            if max(k_low - q_high, q_low - k_high) <= width:
                for row in rows:
                    seen[start + row, [start + column for column in columns]] = True
    seen[:, start : start + frame] = True
    seen[layout.text_slice] = True
    for i, real in enumerate(prompt):
        seen[:, text + i] = real
    return seen


def brute_force_width(layout, kind, density, block_size, prompt):
    widths = [0]
    for width in range(layout.video_tokens):
        seen = brute_force_map(layout, kind, width, block_size, prompt)
        if measured(seen, layout, prompt) <= density:
            widths.append(width)
    return max(widths)


def measured(seen, layout, prompt):
    return seen.sum().item() / (layout.total_tokens * (layout.video_tokens + sum(prompt)))


def make_plan(qkv, config, layout, mask=None, seed=3):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return svg1.plan(q, k, v, config, LayerState(0, "cond", seed), layout, mask)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("density", [0.1, 0.45, 0.7, 1.0])
def test_map_is_the_widest_band_within_the_density(layout, density, side, make_mask, make_qkv, token_map):
    mask = make_mask(layout, side=side)
    config = SVG1Config(density=density, block_size=4, sample_rows=8)
    plan = make_plan(make_qkv(layout, heads=6), config, layout, mask)
    densities = plan.density()
    for b in range(2):
        prompt = () if mask is None else tuple(mask[b].tolist())
        for h in range(6):
            kind = plan.kind[b, h].item()
            width = brute_force_width(layout, kind, density, 4, prompt)
            expected = brute_force_map(layout, kind, width, 4, prompt)
            assert torch.equal(token_map(plan, b, h), expected)
            assert densities[b, h].item() == pytest.approx(measured(expected, layout, prompt), rel=1e-6)


def test_no_mask_is_an_all_true_mask(make_qkv):
    layout = TokenLayout(3, 3, 3, 5, "last")
    qkv, config = make_qkv(layout), SVG1Config(density=0.6, block_size=4, sample_rows=8)
    alone = make_plan(qkv, config, layout)
    masked = make_plan(qkv, config, layout, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(alone.kind, masked.kind)
    assert torch.equal(alone.density(), masked.density())
    q, k, v = (x.transpose(1, 2) for x in qkv)
    # Not bit for bit: heads that share a map are computed together, and the samples' maps are separate with a mask.
    torch.testing.assert_close(execute(alone, q, k, v), execute(masked, q, k, v), rtol=1e-5, atol=1e-6)


def test_both_kinds_occur_and_execute_as_their_maps_say(layout, make_mask, make_qkv, token_map, masked_attention):
    mask = make_mask(layout)
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout))
    shape = q.shape[:2]
    for kind in (svg1.SPATIAL, svg1.TEMPORAL):
        maps = svg1.band_maps(layout, 0.6, 4, CPU, mask)
        samples = 0 if mask is None else torch.arange(2)[:, None]
        index = torch.full(shape, kind) + 2 * samples
        plan = plan_of(maps, index)
        out = execute(plan, q, k, v)
        for b in range(2):
            for h in range(3):
                expected = masked_attention(q[b, h], k[b, h], v[b, h], token_map(plan, b, h))
                torch.testing.assert_close(out[b, h].double(), expected, atol=2e-5, rtol=0)


def test_profiled_mask_is_the_executed_mask(layout, make_mask, token_map):
    mask = make_mask(layout)
    maps = svg1.band_maps(layout, 0.6, 4, CPU, mask)
    rows = torch.arange(layout.video_tokens)
    profiled = svg1.row_masks(maps, rows, layout, 4)  # [N, 2, V, S]
    for n in range(profiled.shape[0]):
        for kind in (svg1.SPATIAL, svg1.TEMPORAL):
            index = torch.full((1, 1), 2 * n + kind)
            plan = plan_of(maps, index)
            assert torch.equal(profiled[n, kind], token_map(plan, 0, 0)[layout.video_slice])


def test_kind_is_the_brute_force_choice(layout, make_mask, make_qkv, masked_attention):
    mask, qkv = make_mask(layout), make_qkv(layout, heads=8)
    config = SVG1Config(density=0.5, block_size=4, sample_rows=10_000)  # every row
    plan = make_plan(qkv, config, layout, mask)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    video = layout.video_slice
    for b in range(2):
        prompt = () if mask is None else tuple(mask[b].tolist())
        visible = torch.ones(layout.total_tokens, dtype=torch.bool)
        visible[layout.text_slice] = torch.tensor(prompt, dtype=torch.bool)
        for h in range(8):
            full = masked_attention(q[b, h], k[b, h], v[b, h], visible)[video]
            errors = []
            for kind in (svg1.SPATIAL, svg1.TEMPORAL):
                width = brute_force_width(layout, kind, 0.5, 4, prompt)
                seen = brute_force_map(layout, kind, width, 4, prompt)
                out = masked_attention(q[b, h], k[b, h], v[b, h], seen)[video]
                errors.append((out - full).square().mean().item())
            if errors[0] == pytest.approx(errors[1], rel=1e-4, abs=1e-9):
                assert errors[0] > 1e-12 or plan.kind[b, h] == svg1.SPATIAL
            else:
                assert plan.kind[b, h] == int(errors[1] < errors[0])


def test_constructed_heads_are_told_apart():
    layout = TokenLayout(8, 6, 6)
    token = torch.arange(layout.video_tokens)
    t, p = token // 36, token % 36

    def place(x, n):  # unit vectors that only match the same place
        return torch.nn.functional.one_hot(x, n).float() * 12

    by_frame = torch.nn.functional.pad(place(t, 8), (0, 28))
    by_place = place(p, 36)
    q = torch.stack([by_frame, by_place, by_place, by_frame], 1)[None]  # [1, S, 4, 36]
    v = torch.randn(1, layout.video_tokens, 4, 36, generator=torch.Generator().manual_seed(0))
    plan = make_plan((q, q, v), SVG1Config(density=0.4, block_size=8, sample_rows=64), layout)
    assert plan.kind.tolist() == [[svg1.SPATIAL, svg1.TEMPORAL, svg1.TEMPORAL, svg1.SPATIAL]]


def test_a_tie_is_spatial():
    layout = TokenLayout(3, 2, 5)
    x = torch.zeros(1, 30, 2, 8)
    assert make_plan((x, x, x), SVG1Config(density=0.5, block_size=4), layout).kind.eq(svg1.SPATIAL).all()


def test_chunks_of_heads_do_not_change_the_choice(monkeypatch, make_qkv):
    layout = TokenLayout(3, 2, 5)
    qkv, config = make_qkv(layout, heads=7), SVG1Config(density=0.5, block_size=4)
    whole = make_plan(qkv, config, layout).kind
    monkeypatch.setattr(probe, "CHUNK_BYTES", 1)
    assert torch.equal(make_plan(qkv, config, layout).kind, whole)


@pytest.mark.parametrize(("video", "count"), [(75_600, 64), (1_600, 64), (65, 64), (30, 64), (1, 1)])
def test_rows_cover_the_whole_video_and_are_drawn_anew(video, count):
    generator = torch.Generator().manual_seed(0)
    draws = [svg1.sample_rows(video, count, generator) for _ in range(3)]
    for rows in draws:
        assert rows.unique().numel() == rows.numel() == min(count, video)
        assert rows.min() >= 0 and rows.max() < video
        gaps = torch.cat([torch.tensor([-1]), rows, torch.tensor([video])]).diff()
        assert gaps.max() <= 2 * -(-video // min(count, video))
    if video > 2 * count:
        assert not torch.equal(draws[0], draws[1])


def test_density_of_the_golden_part_alone_is_reported(make_qkv):
    layout = TokenLayout(4, 2, 3, 7, "first")
    plan = make_plan(make_qkv(layout), SVG1Config(density=0.01, block_size=4), layout)
    assert (plan.density() > 0.3).all()  # sink and text are far above one percent, and it is not hidden


def test_full_size_grid_hits_its_target():
    layout = TokenLayout(21, 45, 80)
    maps = svg1.band_maps(layout, 0.3, 64, CPU)
    area = torch.where(maps.block_map, maps.k_sizes[:, None], 0).sum(-1).mul(maps.q_sizes).sum(-1)
    density = area / layout.total_tokens**2
    assert ((density <= 0.3) & (density > 0.297)).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_density_one_is_dense(layout, side, make_mask, make_qkv, make_state):
    mask, qkv = make_mask(layout, side=side), make_qkv(layout)
    state = make_state(SVG1Config(density=1.0, block_size=4), layout)
    out = attend(*qkv, state, 2, mask)
    torch.testing.assert_close(out, dense_output(qkv, layout, mask), atol=1e-5, rtol=0)
    assert state.records[-1].density.eq(1).all() and not state.records[-1].dense


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_density_that_maps_know_is_that_of_the_plan(layout, make_qkv, make_mask, make_state, side):
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout))
    table = ((0.4, 0.7, 0.9),) * 4
    for config in (SVG1Config(density=0.5, block_size=4), SVG1Config(head_density=table, block_size=4)):
        for mask in (None, make_mask(layout, side=side)):
            plan = svg1.plan(q, k, v, config, make_state(config, layout).layer(1), layout, mask)
            assert torch.equal(plan.density(), dataclasses.replace(plan, share=None).density())
