import math

import pytest
import torch

from svg.kernels import block_statistics, block_statistics_reference, sparge_block_map
from svg.kernels.common import target
from svg.kernels.selection.sparge import BlockStatistics

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")


def gram(rows):
    """Mean of the Gram matrix of rows of length 1, written out; a zero row has no direction."""
    units = [row / row.norm() if row.norm() > 0 else row for row in rows.double()]
    return sum((a @ b).item() for a in units for b in units) / len(units) ** 2


def of(x, order=None, size=16):
    return block_statistics(x, size, order)


@pytest.mark.parametrize("S", [1, 15, 16, 17, 63, 65])
@pytest.mark.parametrize("ordered", [False, True])
def test_statistics_match_the_definition(S, ordered):
    x = torch.randn(2, S, 3, 40).add(0.5).transpose(1, 2)
    order = torch.randperm(S).int() if ordered else None
    means, similarity = of(x, order)
    assert means.dtype == similarity.dtype == torch.float32
    assert means.shape == (2, 3, -(-S // 16), 40) and similarity.shape == means.shape[:3]
    for b, h in ((0, 0), (1, 2)):
        rows = x[b, h] if order is None else x[b, h, order.long()]
        for i, block in enumerate(rows.split(16)):
            torch.testing.assert_close(means[b, h, i].double(), block.double().mean(0), rtol=1e-5, atol=1e-6)
            assert similarity[b, h, i].item() == pytest.approx(gram(block), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_statistics_of_every_dtype_and_head_dim(dtype):
    for D in (64, 96, 128):
        x = (torch.randn(1, 100, 2, D) + 2 * torch.randn(D)).to(dtype).transpose(1, 2)
        found, exact = block_statistics(x, 64), block_statistics_reference(x.double(), 64)
        for ours, right in zip(found, exact):
            torch.testing.assert_close(ours.double(), right, rtol=2e-5, atol=2e-5)


def test_zero_rows_are_similar_to_nothing():
    x = torch.ones(1, 1, 48, 8)
    x[0, 0, 16:32] = 0
    x[0, 0, 32:40] = 0
    means, similarity = of(x)
    assert similarity[0, 0].tolist() == pytest.approx([1.0, 0.0, 0.25])
    assert means.isfinite().all()


def row_of(scores, similar, cdf, topk, sink, q_similar):
    """The definition of one row, in Python floats: set of selected key blocks."""
    everything = set(range(len(scores)))
    if not q_similar:
        return everything
    open_ = [j for j in everything if similar[j]]
    weights = {j: math.exp(scores[j] - max(scores)) for j in open_}
    total, mass, kept = sum(weights.values()), 0.0, set()
    for rank, j in enumerate(sorted(open_, key=lambda j: (-weights[j], j))):
        mass += weights[j] / total
        if rank > 0 and not (rank < int(topk * len(scores)) and (mass <= cdf or cdf >= 1)):
            break
        kept.add(j)
    return kept | {j for j in everything if not similar[j]} | ({0} if sink else set())


def problem(Nq=5, Nk=21, D=32, heads=3):
    """Statistics with similarities on both sides of one half."""
    shape = (2, heads)
    return (
        BlockStatistics(torch.randn(*shape, Nq, D), torch.rand(*shape, Nq)),
        BlockStatistics(torch.randn(*shape, Nk, D), torch.rand(*shape, Nk)),
    )


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    ("cdf", "topk", "simthresh"),
    [
        ([0.5, 0.9, 0.2], 1.0, [-1.0, 0.3, 0.6]),
        ([1.0] * 3, 0.29, [-0.1, -0.1, 0.5]),
        ([0.01] * 3, 0.5, [0.4] * 3),
        (None, 0.4, [0.2] * 3),
    ],
)
def test_selection_matches_the_definition(cdf, topk, simthresh, sink):
    q, k = problem()
    limits = {"cdf": None if cdf is None else torch.tensor(cdf), "simthresh": torch.tensor(simthresh), "topk": topk}
    cdf = cdf or [1.0] * 3
    found = sparge_block_map(q, k, **limits, attention_sink=sink, sm_scale=0.3)
    scores = (q.means.double() @ k.means.double().transpose(2, 3) * 0.3).tolist()
    for b in range(2):
        for h in range(3):
            similar = (k.similarity[b, h] > simthresh[h]).tolist()
            for i in range(5):
                q_similar = q.similarity[b, h, i] > simthresh[h]
                expected = row_of(scores[b][h][i], similar, cdf[h], topk, sink, q_similar)
                assert set(found[b, h, i].nonzero().squeeze(1).tolist()) == expected


def one_row(scores, cdf=None, topk=1.0, similar=None, simthresh=-0.1):
    q = BlockStatistics(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1))
    similarity = torch.ones(len(scores)) if similar is None else torch.tensor(similar, dtype=torch.float32)
    k = BlockStatistics(torch.tensor(scores, dtype=torch.float32).view(1, 1, -1, 1), similarity.view(1, 1, -1))
    limits = {"simthresh": torch.tensor([simthresh]), "topk": topk}
    limits["cdf"] = None if cdf is None else torch.tensor([cdf])
    return sparge_block_map(q, k, **limits, sm_scale=1.0)[0, 0, 0].tolist()


def test_kept_mass_stays_below_cdf_and_one_block_always_stays():
    scores = [math.log(p) for p in (0.2, 0.5, 0.3)]
    assert one_row(scores, 0.3) == [False, True, False]
    assert one_row(scores, 0.79) == [False, True, False]
    assert one_row(scores, 0.81) == [False, True, True]
    assert one_row(scores, 1.0) == [True, True, True]


def test_topk_rounds_down_and_keeps_one():
    scores = [float(j) for j in range(10)]
    assert [sum(one_row(scores, topk=topk)) for topk in (0.01, 0.19, 0.3, 0.35, 0.99, 1.0)] == [1, 1, 3, 3, 9, 10]


def test_equal_scores_go_to_the_lowest_index():
    assert one_row([0.0] * 20, cdf=0.48) == [j < 9 for j in range(20)]
    assert one_row([0.0, -0.0] * 10, topk=0.35) == [j < 7 for j in range(20)]
    assert one_row([1.0, 2.0, 1.0, 1.0, 3.0], topk=0.6) == [True, True, False, False, True]


def test_scores_of_every_sign_rank_in_order():
    scores = [-1.0, 0.0, 1e-30, 2.0, -30.0, 1e38, -1e38]
    order = [5, 3, 2, 1, 0, 4, 6]
    for count in range(1, 8):
        kept = one_row(scores, topk=count / 7)
        assert [j for j in range(7) if kept[j]] == sorted(order[:count])


def test_blocks_that_are_not_similar_are_computed_whole():
    assert one_row([5.0, 1.0, 0.0], 0.5, similar=[0.1, 1, 1], simthresh=0.5) == [True, True, False]
    assert one_row([5.0, 1.0, 0.0], 0.5, similar=[0.1] * 3, simthresh=0.5) == [True] * 3  # no softmax of nothing
    assert one_row([5.0, 1.0, 0.0], 0.5, similar=[0.5] * 3, simthresh=0.5) == [True] * 3  # not above


def test_all_zero_inputs():
    zero = BlockStatistics(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4))
    limits = {"simthresh": torch.tensor([-0.1, 0.0]), "cdf": torch.tensor([0.6, 0.6]), "sm_scale": 1.0}
    found = sparge_block_map(zero, zero, **limits)
    assert found[0, 0].tolist() == [[True, True, False, False]] * 4 and found[0, 1].all()


@pytest.mark.parametrize(
    ("match", "changed"),
    [
        (r"topk must be in \(0, 1\], got 0", {"topk": 0.0}),
        (r"cdf must be fp32 \[H\] = \[3\], got torch.float32 \(2,\)", {"cdf": torch.ones(2)}),
        (r"simthresh must be fp32 \[H\] = \[3\], got torch.float64", {"simthresh": torch.ones(3).double()}),
        ("of the same heads", {"k_blocks": problem(heads=2)[1]}),
    ],
)
def test_wrong_arguments_are_named(match, changed):
    q, k = problem()
    named = {"q_blocks": q, "k_blocks": k, "cdf": torch.ones(3), "simthresh": torch.ones(3), "sm_scale": 1.0}
    with pytest.raises(ValueError, match=match):
        sparge_block_map(**named | changed)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "x must be", (torch.ones(1, 2, 3), 16)),
        (ValueError, "block_size must be at least 1", (torch.ones(1, 1, 2, 3), 0)),
        (ValueError, r"order must be \[S\] = \[2\]", (torch.ones(1, 1, 2, 3), 1, torch.zeros(3).int())),
        (ValueError, "contiguous in its last dim", (torch.ones(1, 1, 3, 2).transpose(2, 3), 1)),
        (TypeError, "floating point", (torch.ones(1, 1, 2, 3).int(), 1)),
    ],
)
def test_wrong_tokens_are_named(error, match, arguments):
    with pytest.raises(error, match=match):
        block_statistics(*arguments)


@in_interpreter
def test_limits_of_the_kernels_are_named():
    with pytest.raises(NotImplementedError, match="head dim must be at most 128"):
        block_statistics(torch.ones(1, 1, 2, 129), 1)
    with pytest.raises(NotImplementedError, match="no backward pass"):
        block_statistics(torch.ones(1, 1, 2, 8, requires_grad=True), 1)
    many = BlockStatistics(torch.ones(1, 1, 8193, 1), torch.ones(1, 1, 8193))
    with pytest.raises(NotImplementedError, match="at most 8192 key blocks"):
        sparge_block_map(many, many, cdf=torch.ones(1), simthresh=torch.zeros(1), sm_scale=1.0)
