"""near: whole calls of the method through `attend`, against dense attention and against brute force."""

import dataclasses
import math

import pytest
import torch

from svg.attend import attend
from svg.config import NearConfig
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState
from svg.methods.near.plan import exact_share

LAYOUTS = [
    TokenLayout(5, 8, 9),
    TokenLayout(3, 7, 9, 21, "last"),
    TokenLayout(3, 7, 9, 21, "first"),
    TokenLayout(1, 3, 3),
]
COLD = {"warmup_steps": 0.0, "warmup_layers": 0.0, "first_iterations": 4, "early": 0.0}


def inputs(layout, seed=0, heads=3, dim=32, noise=0.5):
    """q, k, v [2, S, heads, dim] around a dozen meanings, and a mask of the second sample's shorter prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = layout.total_tokens
    meanings = 1.5 * torch.randn(12, dim, generator=generator)
    kind = torch.randint(0, 12, (2, tokens), generator=generator)
    q, k, v = (
        meanings[kind][:, :, None] + noise * torch.randn(2, tokens, heads, dim, generator=generator) for _ in "qkv"
    )
    mask = None
    if layout.text_tokens:
        mask = torch.ones(2, layout.text_tokens, dtype=torch.bool)
        mask[1, 9:] = False
    return q, k, v, mask


def dense(q, k, v, mask, layout):
    seen = torch.ones(q.shape[0], 1, 1, q.shape[1], dtype=torch.bool)
    if mask is not None:
        seen[:, 0, 0, layout.text_slice] = mask
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen).transpose(1, 2)


def run(config, layout, calls=1, seed=0, **options):
    """Output and record of the last of some calls in a row on the same inputs, and what dense attention gives."""
    q, k, v, mask = inputs(layout, seed, **options)
    state = RunState(config, 1)
    for step in range(calls):
        state.begin_forward(step, 4, "cond", layout)
        out = attend(q, k, v, state, 0, mask)
    return out, state.records[-1], dense(q, k, v, mask, layout)


def error(out, exact):
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_budget_is_dense_attention(layout):
    out, record, exact = run(NearConfig(budget=1.0, **COLD), layout)
    assert error(out, exact) < 1e-5 and record.density.allclose(torch.ones(()))


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("options", [{}, {"query_order": "hilbert"}, {"refresh": 3}, {"granule": 8, "pool": 1}])
def test_a_budget_is_kept_and_better_than_none(layout, options):
    config = NearConfig(budget=0.6, rows=64, cluster_tokens=16, query_cluster_tokens=32, **COLD, **options)
    out, record, exact = run(config, layout, calls=2, noise=0.15)
    assert (record.density.mean(1) <= 0.6).all()  # of all heads of a sample together
    assert (record.density > 0.1).all()
    _, _, _, mask = inputs(layout)
    least = exact_share(0.6, config, layout)
    assert 0 < least < 0.6
    assert error(out, exact) < 0.2
    assert record.reused == ("refresh" in options and mask is None)


def test_means_stand_exactly_for_keys_that_are_equal():
    layout = TokenLayout(4, 8, 8)
    q = inputs(layout)[0]
    kind = torch.arange(256) // 64
    meanings = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(1))
    k = meanings[kind][None].expand(2, -1, -1, -1).contiguous()  # whatever granule a key is in, all in it are equal
    state = RunState(NearConfig(budget=0.2, cluster_tokens=16, **COLD), 1)
    state.begin_forward(0, 4, "cond", layout)
    v = k * 0.7
    out = attend(q, k, v, state, 0, None)
    assert error(out, dense(q, k, v, None, layout)) < 1e-4


def test_runs_are_bit_equal_and_branches_independent():
    layout = LAYOUTS[0]
    config = NearConfig(budget=0.4, rows=64, **COLD)
    first, second = run(config, layout, calls=2)[0], run(config, layout, calls=2)[0]
    assert torch.equal(first, second)
    q, k, v, _ = inputs(layout)
    other = inputs(layout, seed=1)
    state = RunState(config, 1)
    for step in range(2):
        for branch, (a, b, c) in (("cond", (q, k, v)), ("uncond", other[:3])):
            state.begin_forward(step, 4, branch, layout)
            out = attend(a, b, c, state, 0, None)
            if branch == "cond":
                mixed = out
    assert torch.equal(first, mixed)


def test_a_sample_does_not_depend_on_the_others():
    layout = LAYOUTS[0]
    q, k, v, _ = inputs(layout)
    config = NearConfig(budget=0.4, rows=64, **COLD)

    def alone(index):
        state = RunState(config, 1)
        state.begin_forward(0, 4, "cond", layout)
        return attend(*(x[index] for x in (q, k, v)), state, 0, None)

    assert torch.allclose(alone(slice(0, 2))[:1], alone(slice(0, 1)), atol=1e-6)


@pytest.mark.parametrize(("warm_up", "first", "last"), [(0.0, 0.85, 0.26), (0.2, 0.6, 0.33)])
def test_early_steps_compute_more_and_the_mean_is_kept(warm_up, first, last):
    config = NearConfig(budget=0.4, **(COLD | {"warmup_steps": warm_up, "early": 0.5}))
    dense = round(warm_up * 10)
    budgets = [config.at_step(step, 10).budget for step in range(dense, 10)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] > first and budgets[-1] < last
    assert sum(budgets) / len(budgets) == pytest.approx(0.4)
    if dense:
        assert config.at_step(dense - 1, 10) is config  # a warm-up step computes all
    state = RunState(config, 1)
    q, k, v, _ = inputs(LAYOUTS[0])
    for step in (dense, 9):
        state.begin_forward(step, 10, "cond", LAYOUTS[0])
        attend(q, k, v, state, 0, None)
    early, late = (record.density.mean() for record in state.records)
    assert first - 0.1 < early <= budgets[0] and last - 0.1 < late <= budgets[-1]


@pytest.mark.parametrize("refresh", [2, 3, 50])
def test_steps_that_share_lists_have_the_mean_of_their_budgets(refresh):
    config = NearConfig(budget=0.4, refresh=refresh, **(COLD | {"warmup_steps": 0.2}))
    alone = [dataclasses.replace(config, refresh=1).at_step(step, 20).budget for step in range(4, 20)]
    shared = [config.at_step(step, 20).budget for step in range(4, 20)]
    for first in range(0, 16, refresh):
        group = alone[first : first + refresh]
        assert shared[first : first + refresh] == pytest.approx([sum(group) / len(group)] * len(group))
    assert sum(shared) / 16 == pytest.approx(0.4)


def test_few_steps_have_the_same_budget():
    config = NearConfig(budget=0.4, early=0.5)
    assert all(config.at_step(step, 8) is config for step in range(8))
    assert config.at_step(2, 9).budget > config.budget > config.at_step(8, 9).budget


def test_early_steps_compute_everything_at_most_and_every_budget_has_a_schedule():
    for budget, steps in ((0.07, 9), (0.25, 50), (0.9, 50), (1.0, 12)):
        config = NearConfig(budget=budget, **(COLD | {"early": 0.9}))
        budgets = [config.at_step(step, steps).budget for step in range(steps)]
        assert max(budgets) <= 1 and min(budgets) > 1 / 16
        assert sum(budgets) / steps == pytest.approx(budget)


@pytest.mark.parametrize("text", [0, 40, 200])
def test_late_steps_keep_what_text_and_means_take(text):
    """What early steps get is of what is left: a budget that a run can keep, each of its steps can."""
    layout = TokenLayout(9, 16, 16, text, "last" if text else "none")
    config = NearConfig(budget=0.3, **(COLD | {"early": 0.9}))
    steps = [config.at_step(step, 20, (layout.video_tokens, layout.total_tokens)) for step in range(20)]
    assert sum(one.budget for one in steps) / 20 == pytest.approx(0.3)
    shares = [exact_share(one.budget, one, layout) for one in steps]  # raises where nothing is left
    assert shares[0] > 3 * shares[-1] > 0


def test_early_steps_of_heads_with_budgets_of_their_own():
    config = NearConfig(head_budget=[[0.3, 1.0]], **(COLD | {"early": 0.5}))
    tables = [config.at_step(step, 10).head_budget[0] for step in range(10)]
    assert all(table[1] == 1 for table in tables) and tables[0][0] > 0.5 > 0.2 > tables[-1][0]
    assert sum(table[0] for table in tables) / 10 == pytest.approx(0.3)


def test_heads_with_budgets_of_their_own():
    layout = LAYOUTS[0]
    config = NearConfig(rows=64, head_budget=[[0.3, 0.6, 1.0]], **COLD)
    out, record, exact = run(config, layout)
    means = record.density.mean(0)
    assert means[0] <= 0.3 < means[1] <= 0.6 and means[2] == 1
    assert error(out[:, :, 2], exact[:, :, 2]) < 1e-5
    assert error(out[:, :, 1], exact[:, :, 1]) < error(out[:, :, 0], exact[:, :, 0])


def test_text_queries_see_everything():
    layout = LAYOUTS[1]
    out, _, exact = run(NearConfig(budget=0.5, **COLD), layout)
    assert error(out[:, layout.text_slice], exact[:, layout.text_slice]) < 1e-5


def test_a_budget_that_the_means_and_the_text_eat_up_is_refused():
    layout = TokenLayout(1, 8, 8, 64, "last")
    with pytest.raises(
        ValueError, match=r"budget must be above 0.7\d*, the share of the means of 16 keys each and of 64 text"
    ):
        run(NearConfig(budget=0.5, **COLD), layout)


def test_more_budget_is_closer():
    errors = []
    for budget in (0.15, 0.3, 0.6):
        out, _, exact = run(NearConfig(budget=budget, rows=64, cluster_tokens=16, **COLD), TokenLayout(6, 8, 12))
        errors.append(error(out, exact))
    assert errors == sorted(errors, reverse=True) and not math.isnan(errors[0])


def two_branches(config, layout=LAYOUTS[0], seed=0, mask=None, layouts=None):
    """Outputs of a step's two branches, whose queries and keys are almost the same, and dense ones."""
    q, k, v, _ = inputs(layout, seed)
    near = [x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in (q, k, v)]
    state = RunState(config, 1)
    out, exact = [], []
    for branch, part in (("cond", (q, k, v)), ("uncond", near)):
        state.begin_forward(0, 4, branch, layout)
        out.append(attend(*part, state, 0, mask))
        exact.append(dense(*part, mask, layout))
    return out, exact, state


def test_branches_share_a_choice_and_guidance_does_not_multiply_what_it_leaves_out():
    config = NearConfig(budget=0.35, rows=64, cluster_tokens=16, query_cluster_tokens=32, **COLD)
    errors = {}
    for share in (True, False):
        (cond, uncond), (exact_cond, exact_uncond), state = two_branches(
            dataclasses.replace(config, share_branches=share)
        )
        assert [record.reused for record in state.records] == [False, share]
        errors[share] = error(uncond + 4 * (cond - uncond), exact_uncond + 4 * (exact_cond - exact_uncond))
        assert error(uncond, exact_uncond) < 0.3
    assert errors[True] < 0.6 * errors[False]


def test_what_branches_share_ends_with_the_step_and_is_not_kept_for_one_branch():
    config = NearConfig(budget=0.4, rows=64, **COLD)
    layout = LAYOUTS[0]
    q, k, v, _ = inputs(layout)
    state = RunState(config, 1)
    for step, branches in enumerate((("cond",), ("cond", "uncond"), ("cond", "uncond"), ("cond",))):
        for branch in branches:
            state.begin_forward(step, 4, branch, layout)
            attend(q, k, v, state, 0, None)
            assert (state.layer(0).step is None) == (step == 1)
    reused = [(record.step, record.branch) for record in state.records if record.reused]
    assert reused == [(2, "uncond")]


def test_branches_choose_for_themselves_where_masks_or_settings_differ():
    layout = next(layout for layout in LAYOUTS if layout.text_tokens)
    config = NearConfig(budget=0.6, rows=64, **COLD)
    mask = torch.arange(layout.text_tokens).expand(2, -1) < layout.text_tokens - 1
    assert not any(record.reused for record in two_branches(config, layout, mask=mask)[2].records)
    q, k, v, _ = inputs(layout)
    state = RunState(config, 1)
    state.begin_forward(0, 4, "cond", layout)
    attend(q, k, v, state, 0, None)
    state.begin_forward(0, 4, "uncond", layout)
    state.config = dataclasses.replace(config, budget=0.55)
    attend(q, k, v, state, 0, None)
    assert not state.records[-1].reused


def test_branches_in_one_batch_get_what_branches_in_turn_get():
    config = NearConfig(budget=0.35, rows=64, cluster_tokens=16, query_cluster_tokens=32, **COLD)
    layout = LAYOUTS[0]
    (cond, uncond), _, _ = two_branches(config)
    q, k, v, _ = inputs(layout)
    near = [x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in (q, k, v)]
    state = RunState(config, 1)
    state.begin_forward(0, 4, "cond", layout, halves=True)
    out = attend(*(torch.cat(pair) for pair in zip(near, (q, k, v))), state, 0, None)
    torch.testing.assert_close(out, torch.cat([uncond, cond]), rtol=1e-5, atol=1e-6)
    density = state.records[0].density
    assert torch.equal(density[:2], density[2:]) and (density.mean(1) <= 0.35).all()
    state.begin_forward(1, 4, "cond", layout)  # guidance has ended: the batch is four samples
    attend(*(torch.cat(pair) for pair in zip(near, (q, k, v))), state, 0, None)
    assert not torch.equal(state.records[1].density[:2], state.records[1].density[2:])


def test_a_video_that_is_too_short_for_any_budget_is_told_so():
    with pytest.raises(ValueError, match="budget must be 1 at 8 tokens.*use dense attention"):
        exact_share(0.9, NearConfig(**COLD), TokenLayout(1, 2, 4))
    assert exact_share(1.0, NearConfig(**COLD), TokenLayout(1, 2, 4)) == 1.0


def test_a_layer_whose_heads_have_one_budget_shares_a_threshold():
    layout = LAYOUTS[0]
    one = NearConfig(budget=0.35, rows=64, **COLD)
    table = dataclasses.replace(one, budget=0.9, head_budget=((0.35, 0.35, 0.35),))
    apart = dataclasses.replace(one, head_budget=((0.35, 0.35, 0.3501),))
    outputs = [run(config, layout)[0] for config in (one, table, apart)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
