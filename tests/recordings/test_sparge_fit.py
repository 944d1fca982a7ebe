"""Thresholds from recorded calls: prefix sums against attention run once a candidate."""

import dataclasses

import pytest
import torch

from svg.config import SpargeConfig
from svg.engine.layout import TokenLayout
from svg.kernels.block_sparse_quantised.reference import skipped_tiles
from svg.kernels.selection.sparge import block_statistics, sparge_block_map
from svg.methods.sparge.plan import K_BLOCK, Q_BLOCK, video_blocks
from svg.recordings.sparge_fit import (
    SIMTHRESH,
    Sampling,
    _kept,
    filter_curves,
    fit_filter,
    fit_selection,
    prepare,
    selection_curves,
    split_output,
)

WHOLE = Sampling(blocks=99, rows=128)  # everything is looked at
LAYOUTS = [TokenLayout(3, 9, 11), TokenLayout(3, 9, 11, 70, "last"), TokenLayout(3, 9, 11, 5, "first")]


def problem(layout, make_qkv, order="hilbert", sink=False, sampling=WHOLE, sharp=1.5):
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout, batch=2, heads=2))
    mask = None
    if layout.text_tokens:
        mask = torch.arange(layout.text_tokens) < torch.tensor([[3], [layout.text_tokens]])
    config = SpargeConfig(order=order, attention_sink=sink)
    return (q * sharp, k, v, mask), prepare(q * sharp, k, v, layout, mask, config, sampling)


def stepped(make_qkv):
    """Calls in which whole blocks of keys score far below others, by different amounts: 512 tokens, whole groups of rows."""
    layout = TokenLayout(4, 8, 16)
    q, k, v = (x.transpose(1, 2) for x in make_qkv(layout, batch=2, heads=1))
    height = torch.tensor([3.0, 5, 2, 0, 4.5, 1, 4, 6]).repeat_interleave(64)
    q, k = (
        torch.cat([x, extra.expand_as(x[..., :1])], -1) for x, extra in ((q, torch.tensor(4.0)), (k, height[:, None]))
    )
    return prepare(q, k, torch.cat([v, v[..., :1]], -1), layout, None, SpargeConfig(order="rowmajor"), WHOLE)


def attention(q, k, v, seen):
    """Rows of one head under a token map, in fp64."""
    scores = (q.double() @ k.double().T * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v.double()


def brute_force(call, head, simthresh, cdf):
    """Relative L1 and density of one candidate, by attention with the map of the public selection."""
    real, there = call.rows.flatten() >= 0, call.there.flatten()
    rows = call.q[head, call.rows.flatten()[real]]
    keys, values = (x[head].flatten(0, 1)[there] for x in (call.k, call.v))
    kept = _kept(call, head, simthresh, cdf)
    seen = kept.repeat_interleave(call.rows.shape[1], 0)[real].repeat_interleave(call.there.shape[1], 1)[:, there]
    exact = attention(rows, keys, values, torch.ones_like(seen))
    error = (attention(rows, keys, values, seen) - exact).abs().sum() / exact.abs().sum()
    return error.item(), (kept * call.there.sum(1)).sum(1).float().mean().item() / there.sum().item()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no text", "text last", "text first"])
@pytest.mark.parametrize("order", ["hilbert", "rowmajor"])
def test_kept_blocks_are_those_of_the_method(layout, order, make_qkv):
    for sink in (False, True):
        (q, k, _, _), calls = problem(layout, make_qkv, order, sink)
        curve = video_blocks(layout, order, q.device).order
        blocks = [block_statistics(x[:, :, layout.video_slice], n, curve) for x, n in ((q, Q_BLOCK), (k, K_BLOCK))]
        for simthresh, cdf in ((-1.0, 0.5), (0.2, 0.8), (0.3, 1.0)):
            limits = {"cdf": torch.full((2,), cdf), "simthresh": torch.full((2,), simthresh)}
            expected = sparge_block_map(*blocks, **limits, attention_sink=sink, sm_scale=q.shape[-1] ** -0.5)
            for b, h in ((0, 0), (1, 1)):
                kept = _kept(calls[b], h, simthresh, cdf)
                assert torch.equal(kept[:, : expected.shape[-1]], expected[b, h])
                assert kept[:, expected.shape[-1] :].all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["no text", "text last", "text first"])
def test_selection_curves_equal_attention_run_for_each_candidate(layout, make_qkv):
    _, calls = problem(layout, make_qkv, sink=True)
    for call in calls:
        curves = selection_curves(call, 1, WHOLE)
        for index in (0, 4, 6):  # simthresh -1, 3/16, 5/16: similarities lie around 0.25
            for cdf in (0.3, 0.6, 0.9, 1.0):
                limit = cdf if cdf < 1 else 1e30
                count = (curves.at[index] <= limit).sum(-1, keepdim=True).clamp_min(1)
                error = curves.error[index].gather(-1, count).sum().item() / curves.norm
                size = curves.size[index].gather(-1, count).mean().item() / curves.keys
                expected = brute_force(call, 1, SIMTHRESH[index], cdf)
                assert (error, size) == pytest.approx(expected, abs=2e-5)


def test_split_output_adds_up_and_sampled_rows_are_the_same_rows(make_qkv):
    (q, k, v, _), calls = problem(LAYOUTS[1], make_qkv)
    parts = split_output(calls[0], 0, 128)
    keys = torch.arange(q.shape[2])[: LAYOUTS[1].video_tokens + 3]
    rows = calls[0].rows.flatten()
    rows = rows[rows >= 0]
    exact = attention(q[0, 0, rows], k[0, 0, keys], v[0, 0, keys], torch.ones(len(rows), len(keys), dtype=torch.bool))
    torch.testing.assert_close(parts.dense[parts.real].double(), exact, rtol=1e-4, atol=1e-5)
    few = split_output(calls[0], 0, 4)
    torch.testing.assert_close(few.dense, parts.dense[:, [0, 42, 85, 127]])


def test_fit_selection_finds_the_sparsest_within_the_bound(make_qkv):
    """Against every simthresh and a fine grid of cdf, in two calls at once."""
    _, calls = problem(TokenLayout(4, 9, 11), make_qkv)
    simthresh, cdf, density = fit_selection([selection_curves(call, 0, WHOLE) for call in calls], 0.2)
    found = [brute_force(call, 0, simthresh, cdf) for call in calls]
    assert max(error for error, _ in found) < 0.2 and density == pytest.approx(
        sum(size for _, size in found) / 2, abs=1e-5
    )
    assert density < 0.95
    for other in SIMTHRESH[:8]:  # above 0.4 nothing is similar
        for step in range(1, 17):
            candidate = [brute_force(call, 0, other, step / 16) for call in calls]
            if max(error for error, _ in candidate) < 0.2:
                assert sum(size for _, size in candidate) / 2 >= density - 1e-5


def test_a_bound_that_nothing_meets_keeps_everything(make_qkv):
    _, calls = problem(LAYOUTS[0], make_qkv)
    simthresh, cdf, density = fit_selection([selection_curves(calls[0], 0, WHOLE)], 1e-9)
    assert density == 1 and brute_force(calls[0], 0, simthresh, cdf)[0] == 0


@pytest.mark.parametrize("cdf", [0.97, 1.0])
def test_filter_curves_equal_attention_without_the_skipped_tiles(cdf, make_qkv):
    call = stepped(make_qkv)[1]
    curves = filter_curves(call, 0, WHOLE, -1.0, cdf)
    kept = _kept(call, 0, -1.0, cdf)
    keys, values = call.k[0].flatten(0, 1), call.v[0].flatten(0, 1)
    skips = 0
    for limit in (0.0, 2.0, 5.0, 8.0):
        count = (curves.at < -limit).sum(-1, keepdim=True)
        error, size = (curve.gather(-1, count).sum().item() for curve in (curves.error, curves.size))
        expected = left = norm = 0
        for i, rows in enumerate(call.rows):
            selected = kept[i].repeat_interleave(64)
            for group in rows.split(64):
                q = call.q[0, group].double()
                scores = q @ keys.double().T * q.shape[-1] ** -0.5
                p = scores[:, selected].softmax(-1)
                tiles = skipped_tiles(scores[:, selected] * 1.4426950408889634, limit).repeat_interleave(64)
                exact = scores.softmax(-1) @ values.double()
                expected += (p[:, ~tiles] @ values[selected][~tiles].double() - exact).abs().sum().item()
                left, norm = left + (~tiles).sum().item(), norm + exact.abs().sum().item()
                skips += tiles.sum().item()
        assert curves.norm == pytest.approx(norm, rel=1e-5)
        assert error / norm == pytest.approx(expected / norm, abs=1e-5) and size == left
    assert skips > 0


def test_fit_filter_stays_within_the_bound(make_qkv):
    calls = stepped(make_qkv)
    curves = [filter_curves(call, 0, WHOLE, -1.0, 1.0) for call in calls]
    limit, stays = fit_filter(curves, 0.001)
    assert 0 < limit < 50 and 0 < stays < 1
    for bound_by, at_least in ((limit, 0.0), (limit - 0.1, 0.001)):
        errors = []
        for c in curves:
            count = (c.at < -bound_by).sum(-1, keepdim=True)
            errors.append(c.error.gather(-1, count).sum().item() / c.norm)
        assert max(errors) >= at_least and (max(errors) < 0.001) == (bound_by == limit)
    assert fit_filter([c._replace(at=torch.full_like(c.at, torch.inf)) for c in curves], 0.5) == (0.0, 1.0)
    assert fit_filter([c._replace(error=c.error + c.norm) for c in curves], 0.01) == (torch.inf, 1.0)


@pytest.mark.parametrize("change", [{"blocks": 0}, {"rows": 0}, {"rows": 3}, {"rows": 130}])
def test_wrong_sampling_is_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(Sampling(), **change)
