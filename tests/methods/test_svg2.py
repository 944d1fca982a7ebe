import dataclasses
import math

import pytest
import torch
from attention_fixtures import dense_output

from svg.attend import attend, dense_attention
from svg.config import SVG2Config
from svg.engine.execute import execute
from svg.engine.layout import TokenLayout
from svg.engine.state import LayerState, RunState
from svg.methods.dense import key_mask
from svg.methods.svg2 import plan as svg2

LAYOUT = TokenLayout(3, 3, 4, 5, "last")
SMALL = {"num_q_clusters": 5, "num_k_clusters": 9, "first_iterations": 4, "warmup_steps": 0, "warmup_layers": 0}


def lloyd(x, centroids, iterations):
    """x [V, D], centroids [C, D] -> labels (list), centroids; an empty cluster keeps its centroid."""
    centroids = [c.clone() for c in centroids]
    for _ in range(iterations):
        labels = []
        for token in x:
            distances = [(token - c).square().sum().item() for c in centroids]
            labels.append(distances.index(min(distances)))
        for c in range(len(centroids)):
            members = [x[i] for i in range(len(x)) if labels[i] == c]
            if members:
                centroids[c] = sum(members) / len(members)
    return labels, torch.stack(centroids)


def selected(q_centroid, k_centroids, counts, config, dim):
    """Key clusters that one query cluster keeps."""
    logits = [q_centroid.dot(c).item() / math.sqrt(dim) for c in k_centroids]
    weights = [n * math.exp(x - max(logits)) for n, x in zip(counts, logits)]
    order = sorted(range(len(weights)), key=lambda j: -weights[j])
    kept, before = set(), 0.0
    for rank, j in enumerate(order):
        if before <= config.top_p or rank < math.ceil(config.min_k_ratio * len(weights)):
            kept.add(j)
        before += weights[j] / sum(weights)
    return kept


class BruteForce:
    """One (sample, head) of SVG2 over the steps of a run, token by token in float64."""

    def __init__(self, config, layout, q_tokens, k_tokens):
        self.config, self.layout = config, layout
        self.tokens = {"q": q_tokens, "k": k_tokens}
        self.centroids = {}

    def cluster(self, name, x):
        start = self.centroids.get(name, x[self.tokens[name]])
        rounds = self.config.iterations if name in self.centroids else self.config.first_iterations
        labels, self.centroids[name] = lloyd(x, start, rounds)
        return labels

    def token_map(self, q, k, prompt):
        layout = self.layout
        q_labels = self.cluster("q", q[layout.video_slice].double())
        k_labels = self.cluster("k", k[layout.video_slice].double())
        counts = [k_labels.count(c) for c in range(len(self.centroids["k"]))]
        seen = torch.zeros(layout.total_tokens, layout.total_tokens, dtype=torch.bool)
        start, text = layout.video_slice.start, layout.text_slice.start
        for c, centroid in enumerate(self.centroids["q"]):
            kept = selected(centroid, self.centroids["k"], counts, self.config, q.shape[-1])
            columns = [start + j for j, label in enumerate(k_labels) if label in kept]
            for i in (i for i, label in enumerate(q_labels) if label == c):
                seen[start + i, columns] = True
        seen[layout.text_slice] = True
        for i, real in enumerate(prompt):
            seen[:, text + i] = real
        return seen


def draws(state, layout, config):
    generator = torch.Generator().manual_seed(state.layer(2).seed)
    video = layout.video_tokens
    counts = (min(config.num_q_clusters, video), min(config.num_k_clusters, video))
    return [torch.randperm(video, generator=generator)[:count] for count in counts]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_three_steps_equal_brute_force(layout, top_p, padded, make_qkv, make_mask, masked_attention):
    config = SVG2Config(**SMALL, top_p=top_p, min_k_ratio=0.2)
    mask = make_mask(layout) if padded else None
    state = RunState(config, 4)
    state.begin_forward(0, 3, "cond", layout)
    tokens = draws(state, layout, config)
    heads = [[BruteForce(config, layout, *tokens) for _ in range(2)] for _ in range(2)]
    for step in range(3):
        q, k, v = make_qkv(layout, heads=2, dim=8, seed=step)
        state.begin_forward(step, 3, "cond", layout)
        out = attend(q, k, v, state, 2, mask)
        for b in range(2):
            prompt = [True] * layout.text_tokens if mask is None else mask[b].tolist()
            for h in range(2):
                seen = heads[b][h].token_map(q[b, :, h], k[b, :, h], prompt)
                expected = masked_attention(q[b, :, h], k[b, :, h], v[b, :, h], seen)
                torch.testing.assert_close(out[b, :, h].double(), expected, atol=2e-5, rtol=0)
                visible = layout.total_tokens * (layout.video_tokens + sum(prompt))
                assert state.records[-1].density[b, h].item() == pytest.approx(seen.sum().item() / visible, rel=1e-6)


def test_iterations_first_then_warm_start(monkeypatch, make_qkv):
    calls = []
    real = svg2.kmeans

    def spy(x, centroids, iterations):
        result = real(x, centroids, iterations)
        calls.append((iterations, centroids, result[1]))
        return result

    monkeypatch.setattr(svg2, "kmeans", spy)
    config = SVG2Config(**SMALL, iterations=2)
    state = RunState(config, 4)
    for step in range(3):
        for branch in ("cond", "uncond"):
            state.begin_forward(step, 3, branch, LAYOUT)
            attend(*make_qkv(LAYOUT, seed=step), state, 2)
    assert [rounds for rounds, _, _ in calls] == [3, 1] * 4 + [2] * 8  # the order is made before the first's last round
    warm = [call for call in calls if call[0] != 3]
    for i in range(4, 12):
        assert warm[i][1] is warm[i - 4][2]  # q and k of two branches: each from its own previous step
    state.begin_run()
    state.begin_forward(0, 3, "cond", LAYOUT)
    attend(*make_qkv(LAYOUT), state, 2)
    assert [rounds for rounds, _, _ in calls[-4:]] == [3, 1, 3, 1]


def test_init_tokens_do_not_depend_on_the_batch(monkeypatch, make_qkv):
    starts = []
    real = svg2.kmeans
    monkeypatch.setattr(svg2, "kmeans", lambda x, c, i: starts.extend([(x, c)] * (i == 3)) or real(x, c, i))
    for batch in (1, 3):
        q, k, v = (x.transpose(1, 2) for x in make_qkv(LAYOUT, batch=batch))
        svg2.plan(q, k, v, SVG2Config(**SMALL), LayerState(0, "cond", 7), LAYOUT)
    chosen = [(x[0, 0, :, None] == c[0, 0]).all(-1).float().argmax(0) for x, c in starts]
    assert torch.equal(chosen[0], chosen[2]) and torch.equal(chosen[1], chosen[3])
    assert chosen[0].unique().numel() == 5 and chosen[1].unique().numel() == 9


def test_order_is_kept_over_calls(make_qkv):
    """Neighbouring clusters are alike after the first call, and centroids keep their places after later ones."""
    config, memory = SVG2Config(num_q_clusters=5, num_k_clusters=20, first_iterations=3), LayerState(0, "cond", 7)
    q, k, v = (x.transpose(1, 2) for x in make_qkv(TokenLayout(5, 6, 7)))
    svg2.plan(q, k, v, config, memory, TokenLayout(5, 6, 7))
    first = memory.cache["k_centroids"]
    steps = (first[:, :, 1:] - first[:, :, :-1]).norm(dim=-1).mean(-1)
    apart = torch.cdist(first, first).mean((-1, -2))
    assert (steps < 0.8 * apart).all()
    svg2.plan(q, k, v, config, memory, TokenLayout(5, 6, 7))
    moved = torch.cdist(memory.cache["k_centroids"], first)
    assert (moved.argmin(-1) == torch.arange(20)).float().mean() > 0.9


@pytest.mark.parametrize("text", ["none", "first", "last"])
def test_tiles_in_cluster_order(text, make_qkv, make_mask, monkeypatch):
    monkeypatch.setattr(svg2, "Q_TILE", 16)
    monkeypatch.setattr(svg2, "K_TILE", 8)
    layout = TokenLayout(3, 4, 5, 0 if text == "none" else 6, text)  # 60 = 3 * 16 + 12 = 7 * 8 + 4
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout, heads=2))
    mask = make_mask(layout)
    config = SVG2Config(**SMALL, selection="tiles", top_p=0.6, min_k_ratio=0.0)
    plan = svg2.plan(q, k, v, config, LayerState(0, "cond", 7), layout, mask)
    tiles, q_tiles, k_tiles = plan.block_map, plan.q_sizes[0].tolist(), plan.k_sizes[0].tolist()
    assert q_tiles[:4] == [16, 16, 16, 12] and k_tiles[:8] == [8] * 7 + [4]
    video = layout.video_slice
    for b, h in ((0, 0), (1, 1)):
        order = plan.q_permutation[b, h].long(), plan.k_permutation[b, h].long()
        assert all(sorted(side.tolist()) == list(range(layout.total_tokens)) for side in order)
        for i in range(4):  # the definition: tile means, equal sizes but the last
            rows = order[0][16 * i : min(16 * i + 16, 60)]
            assert ((rows >= video.start) & (rows < video.stop)).all()
            means = torch.stack([k[b, h, part].mean(0) for part in order[1][:60].split(8)])
            logits = means @ q[b, h, rows].mean(0) * q.shape[-1] ** -0.5 + torch.tensor([8.0] * 7 + [4]).log()
            weight, heaviest = logits.softmax(-1).sort(descending=True)
            kept = heaviest[weight.cumsum(0) - weight <= 0.6]
            assert set(tiles[2 * b + h, i, :8].nonzero().squeeze(1).tolist()) == set(kept.tolist())
    state = RunState(SVG2Config(**SMALL, selection="tiles", top_p=1.0), 1)
    state.begin_forward(0, 1, "cond", layout)
    inputs = [x.transpose(1, 2) for x in (q, k, v)]
    out = attend(*inputs, state, 0, mask)
    dense = dense_attention(q, k, v, key_mask(layout, mask)).transpose(1, 2)
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0)


def test_more_clusters_than_tokens(make_qkv):
    layout = TokenLayout(1, 2, 3, 2, "first")
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout))
    plan = svg2.plan(q, k, v, SVG2Config(), LayerState(0, "cond", 7), layout)
    assert plan.block_map.shape == (6, 8, 8)
    assert plan.density().le(1).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_top_p_one_is_dense(layout, side, make_mask, make_qkv, make_state):
    mask, qkv = make_mask(layout, side=side), make_qkv(layout)
    state = make_state(SVG2Config(**SMALL, top_p=1.0), layout)
    out = attend(*qkv, state, 2, mask)
    torch.testing.assert_close(out, dense_output(qkv, layout, mask), atol=1e-5, rtol=0)
    assert state.records[-1].density.eq(1).all()


def test_min_k_ratio_is_a_floor(make_qkv):
    q, k, v = (10 * x.transpose(1, 2) for x in make_qkv(TokenLayout(3, 3, 4)))
    densities = []
    for ratio in (0.0, 0.5, 1.0):
        config = SVG2Config(**SMALL, top_p=0.01, min_k_ratio=ratio)
        plan = svg2.plan(q, k, v, config, LayerState(0, "cond", 7), TokenLayout(3, 3, 4))
        least = max(1, math.ceil(ratio * 9))
        filled = (plan.k_sizes > 0).sum(-1, keepdim=True)
        assert (plan.block_map.sum(-1) >= torch.minimum(filled, torch.tensor(least))).all()
        densities.append(plan.density().mean().item())
    assert densities[0] < densities[1] < densities[2] == 1


@pytest.mark.parametrize("padded", [False, True])
def test_budget_caps_density(layout, padded, make_qkv, make_mask):
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout))
    text = 1 - layout.video_tokens**2 / layout.total_tokens**2
    free = svg2.plan(q, k, v, SVG2Config(**SMALL, top_p=0.95), LayerState(0, "cond", 7), layout).density()
    for budget in (text + 0.6 * (1 - text), text + 0.4 * (1 - text)):
        config = SVG2Config(**SMALL, top_p=0.95, budget=budget)
        mask = make_mask(layout) if padded else None
        plan = svg2.plan(q, k, v, config, LayerState(0, "cond", 7), layout, mask)
        assert (plan.density() <= budget + 1e-6).all()
        assert plan.density().mean() < free.mean()


def test_budget_below_the_text_alone_raises(make_qkv):
    q, k, v = (x.transpose(1, 2) for x in make_qkv(LAYOUT))
    with pytest.raises(ValueError, match="budget must be above 0.22.*got 0.1; raise it"):
        svg2.plan(q, k, v, SVG2Config(**SMALL, budget=0.1), LayerState(0, "cond", 7), LAYOUT)


@pytest.mark.parametrize("selection", ["clusters", "tiles"])
def test_compensation_counts_every_left_out_block_as_its_mean(layout, selection, make_qkv, make_mask, monkeypatch):
    monkeypatch.setattr(svg2, "Q_TILE", 8)
    monkeypatch.setattr(svg2, "K_TILE", 4)
    config = SVG2Config(**SMALL, top_p=0.3, min_k_ratio=0.0, selection=selection, compensate=True)
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout, heads=2))
    mask = make_mask(layout)
    memory = LayerState(0, "cond", 7)
    plan = svg2.plan(q, k, v, config, memory, layout, mask)
    out = execute(plan, q, k, v)
    b, h, m = 1, 0, 2
    q_order, k_order = plan.q_permutation[b, h].long(), plan.k_permutation[b, h].long()
    q_blocks, k_blocks = (x.split(n[m].tolist()) for x, n in ((q_order, plan.q_sizes), (k_order, plan.k_sizes)))
    counted = 0
    for i, rows in enumerate(q_blocks):
        weights, values = [], []
        for j, keys in enumerate(k_blocks):
            if plan.block_map[m, i, j]:
                weights.append((q[b, h, rows] @ k[b, h, keys].T * q.shape[-1] ** -0.5).exp())
                values.append(v[b, h, keys])
            elif len(keys) and j < plan.tail.k.shape[2]:
                mean = k[b, h, keys].mean(0, keepdim=True)
                weights.append((q[b, h, rows] @ mean.T * q.shape[-1] ** -0.5).exp() * len(keys))
                values.append(v[b, h, keys].mean(0, keepdim=True))
                counted += len(rows)
        weight = torch.cat(weights, 1)
        expected = weight / weight.sum(1, keepdim=True) @ torch.cat(values)
        torch.testing.assert_close(out[b, h, rows], expected, atol=1e-5, rtol=1e-4)
    without = dataclasses.replace(plan, tail=None)
    extra = (plan.density() - without.density())[b, h].item() * layout.total_tokens * plan.visible_keys[m].item()
    assert counted > 0 and extra == pytest.approx(counted, abs=0.01)


def test_compensation_at_full_density_is_dense(layout, make_qkv, make_mask):
    state = RunState(SVG2Config(**SMALL, top_p=1.0, compensate=True), 1)
    state.begin_forward(0, 1, "cond", layout)
    inputs, mask = make_qkv(layout), make_mask(layout)
    dense = dense_attention(*(x.transpose(1, 2) for x in inputs), key_mask(layout, mask)).transpose(1, 2)
    torch.testing.assert_close(attend(*inputs, state, 0, mask), dense, atol=2e-5, rtol=0)


def one_call(inputs, mask, layout, **settings):
    state = RunState(SVG2Config(**{**SMALL, "top_p": 0.4, "min_k_ratio": 0.0, **settings}), 1)
    state.begin_forward(0, 1, "cond", layout)
    return attend(*inputs, state, 0, mask), state


@pytest.mark.parametrize("selection", ["clusters", "tiles"])
@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp8-acc16", "int8-fp16"])
def test_compensation_in_8_bits(layout, make_qkv, make_mask, precision, selection, monkeypatch):
    monkeypatch.setattr(svg2, "Q_TILE", 8)
    monkeypatch.setattr(svg2, "K_TILE", 4)
    inputs, mask = make_qkv(layout), make_mask(layout)
    settings, close = {"precision": precision, "selection": selection}, 0.02 if precision == "int8-fp16" else 0.06
    native, exact = one_call(inputs, mask, layout, compensate=True, selection=selection)
    plain, _ = one_call(inputs, mask, layout, **settings)
    out, state = one_call(inputs, mask, layout, compensate=True, **settings)
    for sample in range(2):
        error = torch.linalg.norm((out - native)[sample])
        assert 0 < error < close * torch.linalg.norm(native[sample])
        assert error < 0.2 * torch.linalg.norm((plain - native)[sample])
    assert torch.equal(out, one_call(inputs, mask, layout, compensate=True, **settings)[0])
    assert torch.equal(state.records[-1].density, exact.records[-1].density)
    assert not state.records[-1].guarded.failed.any()


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp8-acc16", "int8-fp16"])
def test_compensation_in_8_bits_at_full_density_adds_nothing(layout, make_qkv, make_mask, precision):
    inputs, mask = make_qkv(layout), make_mask(layout)
    dense = dense_attention(*(x.transpose(1, 2) for x in inputs), key_mask(layout, mask)).transpose(1, 2)
    out, plain = (
        one_call(inputs, mask, layout, top_p=1.0, precision=precision, compensate=c)[0] for c in (True, False)
    )
    assert torch.equal(out, plain)
    assert torch.linalg.norm(out - dense) < (0.02 if precision == "int8-fp16" else 0.06) * torch.linalg.norm(dense)


def test_compensation_in_8_bits_is_probed_and_repaired(layout, make_qkv, make_mask):
    inputs, mask = make_qkv(layout), make_mask(layout)
    native, _ = one_call(inputs, mask, layout, compensate=True)
    for settings in ({}, {"selection": "tiles"}):
        options = {"compensate": True, "precision": "int8-fp8", "probe_every": 1, **settings}
        assert not one_call(inputs, mask, layout, tolerance=0.2, **options)[1].records[-1].guarded.failed.any()
    repaired, state = one_call(inputs, mask, layout, **{**options, "selection": "clusters", "tolerance": 1e-9})
    assert state.records[-1].guarded.failed.any()
    failed = state.records[-1].guarded.failed != 0  # [B, H]
    torch.testing.assert_close(repaired.transpose(1, 2)[failed], native.transpose(1, 2)[failed], rtol=1e-5, atol=1e-5)
