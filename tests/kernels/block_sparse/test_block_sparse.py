import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from svg.kernels import block_sparse_attention, block_sparse_attention_reference
from svg.kernels.block_sparse import triton as block_sparse
from svg.kernels.common import target

# Uneven, with empty clusters and tails: the last number of a row is what is left of S.
Q_SIZES = ([100, 0, 20, 9], [0, 1, 1, 61], [63, 48, 0, 0])
K_SIZES = ([10, 0, 0, 40, 7, 1], [0, 33, 0, 30, 0, 0], [1, 1, 1, 60, 0, 48])
in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")


def problem(S, D=64, dtype=torch.float32, B=2, H=2, density=0.5):
    """q, k, v as views of [B, S, H, D], two maps for B x H heads, and a permutation a head."""
    q, k, v = (torch.randn(B, S, H, D).to(dtype).transpose(1, 2) for _ in range(3))
    q_sizes, k_sizes = cut(Q_SIZES, S), cut(K_SIZES, S)
    block_map = torch.rand(2, q_sizes.shape[1], k_sizes.shape[1]) < density
    block_map[0, 0] = False  # sees nothing
    block_map[0, 2:] |= torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.bool)  # neighbours, which become one run
    index = torch.arange(B * H, dtype=torch.int32).view(B, H) % 2
    permutation = torch.rand(B, H, S).argsort(-1).to(torch.int32)
    return (q, k, v, block_map, q_sizes, k_sizes), {"map_index": index, "q_permutation": permutation}


def cut(rows, S):
    """The first two rows whose cumulated sizes are clipped to S, the remainder in the last cluster."""
    ends = torch.tensor(rows[:2]).cumsum(1).clamp(max=S)
    ends[:, -1] = S
    return torch.diff(ends, prepend=torch.zeros_like(ends[:, :1])).to(torch.int32)


def brute_force(arguments, plan, dtype=torch.float64):
    """Dense softmax under a token mask, from the definition; also the log-sum-exp."""
    q, k, v, block_map, q_sizes, k_sizes = arguments
    out = torch.zeros(q.shape, dtype=dtype)
    lse = torch.empty(q.shape[:3], dtype=dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            m = plan["map_index"][b, h]
            mask = block_map[m].repeat_interleave(q_sizes[m], 0).repeat_interleave(k_sizes[m], 1)  # [S, Sk]
            if plan.get("q_permutation") is not None:
                mask = mask[plan["q_permutation"][b, h].long().argsort()]
            scores = q[b, h].to(dtype) @ k[b, h].to(dtype).T * plan.get("sm_scale", q.shape[-1] ** -0.5)
            lse[b, h] = scores.double().masked_fill(~mask, -torch.inf).logsumexp(-1).to(dtype)
            seen = mask.any(1)
            weights = scores[seen].masked_fill(~mask[seen], -torch.inf).softmax(-1)
            out[b, h, seen] = weights @ v[b, h].to(dtype)
    return out, lse


def assert_matches_definition(arguments, plan):
    """The error against fp64 stays within twice the error of the plain computation in the inputs' dtype."""
    out, lse = block_sparse_attention(*arguments, **plan, return_lse=True)
    q = arguments[0]
    exact, exact_lse = brute_force(arguments, plan)
    plain, _ = brute_force(arguments, plan, q.dtype)
    allowed = 2 * (plain - exact).abs().max() + 1e-6
    assert out.dtype == q.dtype and out.stride() == q.stride() and lse.dtype == torch.float32
    assert (out - exact).abs().max() <= allowed
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("S", [63, 111, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_odd_lengths(S, dtype):
    assert_matches_definition(*problem(S, dtype=dtype))


@pytest.mark.parametrize("D", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(D, dtype):
    assert_matches_definition(*problem(129, D, dtype, B=1))


@in_interpreter
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("D", [96, 128])
def test_every_way_to_launch(tma, D, monkeypatch):
    monkeypatch.setitem(block_sparse.LAUNCH[90], (2, 128), block_sparse.Launch(64, 32, 4, 2, tma))
    assert_matches_definition(*problem(129, D, torch.bfloat16))
    (q, *rest), plan = problem(129, D, torch.float16)
    assert_matches_definition((q * 20, *rest), plan)  # maxima that rise by more than 2^8


@in_interpreter
def test_rows_that_no_descriptor_can_address():
    """Rows of 130 elements: 260 bytes, no multiple of 16."""
    arguments, plan = problem(63, 64, torch.bfloat16)
    k, v = (F.pad(x, (0, 66)).contiguous()[..., :64] for x in arguments[1:3])
    assert k.stride(2) == 130 and not target.fits_descriptor(k)
    assert_matches_definition((arguments[0], k, v, *arguments[3:]), plan)


def tail_of(arguments, plan, clusters):
    """Random means and sizes for the first clusters, counted where they are not selected; one of them is empty."""
    q, _, _, block_map, *_ = arguments
    B, H, _, D = q.shape
    means = (torch.randn(B, H, clusters, D).to(q.dtype) for _ in range(2))
    sizes = torch.randint(1, 60, (clusters,)).float()
    sizes[-1] = 0
    chosen = torch.rand(*block_map.shape[:2], clusters) < 0.4
    chosen[1, 1] = True  # nothing is left to stand for
    return block_sparse.Tail(*means, torch.where(chosen, -torch.inf, sizes.log()))


def brute_force_with_tail(arguments, plan, tail):
    """The tail as further keys of dense attention with a bias, in fp64."""
    q, k, v, block_map, q_sizes, k_sizes = arguments
    keys, values = (torch.cat(pair, 2).double() for pair in ((k, tail.k), (v, tail.v)))
    logits = q.double() @ keys.mT * q.shape[-1] ** -0.5
    order = plan["q_permutation"].long().argsort(-1)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            m = plan["map_index"][b, h]
            mask = block_map[m].repeat_interleave(k_sizes[m], 1)
            bias = torch.cat([torch.where(mask, 0.0, -torch.inf), tail.bias[m]], 1).repeat_interleave(q_sizes[m], 0)
            logits[b, h] += bias[order[b, h]]
    return logits.softmax(-1).nan_to_num(0) @ values, logits.logsumexp(-1)


@pytest.mark.parametrize("clusters", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tail(clusters, dtype):
    arguments, plan = problem(111, dtype=dtype)
    tail = tail_of(arguments, plan, clusters)
    out, lse = block_sparse_attention(*arguments, **plan, tail=tail, return_lse=True)
    exact, exact_lse = brute_force_with_tail(arguments, plan, tail)
    assert (out - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


def test_tail_of_single_keys_is_dense_attention():
    """Nothing selected and one key a cluster: every key is its own mean."""
    (q, k, v, block_map, q_sizes, k_sizes), plan = problem(63)
    bias = torch.zeros(*block_map.shape[:2], 63)
    out = block_sparse_attention(
        q, k, v, torch.zeros_like(block_map), q_sizes, k_sizes, **plan, tail=block_sparse.Tail(k, v, bias)
    )
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_tail_that_does_not_fit_is_refused():
    arguments, plan = problem(63)
    tail = tail_of(arguments, plan, 5)
    with pytest.raises(ValueError, match="tail must hold"):
        block_sparse_attention(*arguments, **plan, tail=tail._replace(bias=tail.bias[:, :-1]))
    with pytest.raises(TypeError, match="tail must hold"):
        block_sparse_attention(*arguments, **plan, tail=tail._replace(bias=tail.bias.half()))


def test_given_scale_and_no_permutation():
    arguments, plan = problem(129)
    del plan["q_permutation"]
    assert_matches_definition(arguments, plan | {"sm_scale": 0.5})


def test_one_permutation_expanded_over_heads_int64():
    arguments, plan = problem(111)
    plan["q_permutation"] = torch.randperm(111).expand(2, 2, 111)
    plan["map_index"] = plan["map_index"].long()
    assert_matches_definition(arguments, plan)


def test_more_keys_than_queries():
    arguments, plan = problem(63)
    keys, _ = problem(129)
    assert_matches_definition((arguments[0], *keys[1:3], arguments[3], arguments[4], keys[5]), plan)


@pytest.mark.parametrize("clusters", [1, 6])
def test_density_one_equals_dense(clusters):
    (q, k, v, _, _, _), plan = problem(129)
    sizes = torch.tensor([[129]] if clusters == 1 else [[100, 0, 20, 3, 0, 6]], dtype=torch.int32)
    block_map = torch.ones(1, clusters, clusters, dtype=torch.bool)
    out = block_sparse_attention(
        q, k, v, block_map, sizes, sizes, map_index=torch.zeros(2, 2, dtype=torch.int32),
        q_permutation=plan["q_permutation"],
    )  # fmt: skip
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=2e-6)


def test_many_small_runs_fill_the_tile_list():
    k_sizes = torch.full((1, 131), 1, dtype=torch.int32)
    k_sizes[0, 64] = 65
    q_sizes = torch.tensor([[100, 95]], dtype=torch.int32)
    (q, k, v, *_), _ = problem(195, B=1)
    block_map = torch.zeros(1, 2, 131, dtype=torch.bool)
    block_map[:, 0, ::2] = True  # every run is one cluster: the most tiles there can be
    block_map[:, 1, 1::2] = True
    index = torch.zeros(1, 2, dtype=torch.int32)
    assert_matches_definition((q, k, v, block_map, q_sizes, k_sizes), {"map_index": index})


def test_text_clusters():
    """Video clusters, then a prompt cluster everybody sees, then padding nobody sees but which sees all real keys."""
    sizes = torch.tensor([[40, 30, 30, 20, 9]], dtype=torch.int32)
    block_map = torch.eye(5, dtype=torch.bool)[None].clone()
    block_map[:, :, 3] = True
    block_map[:, 3:, :4] = True
    block_map[:, :, 4] = False
    (q, k, v, *_), plan = problem(129)
    assert_matches_definition(
        (q, k, v, block_map, sizes, sizes), plan | {"map_index": torch.zeros(2, 2, dtype=torch.int32)}
    )


def test_nothing_selected_gives_zeros():
    (q, k, v, block_map, q_sizes, k_sizes), plan = problem(111)
    out, lse = block_sparse_attention(q, k, v, torch.zeros_like(block_map), q_sizes, k_sizes, **plan, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_selected_but_empty_clusters_give_zeros():
    (q, k, v, block_map, q_sizes, k_sizes), plan = problem(111)
    out = block_sparse_attention(q, k, v, (k_sizes == 0)[:, None, :].expand_as(block_map), q_sizes, k_sizes, **plan)
    assert (out == 0).all()


def test_huge_scores_stay_finite():
    arguments, plan = problem(111)
    q, k, *rest = arguments
    out, lse = block_sparse_attention(q * 100, k * 100, *rest, **plan, return_lse=True)
    exact, exact_lse = brute_force((q * 100, k * 100, *rest), plan)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-2)  # scores near 1e5 are known to about 0.01
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-2)


def test_two_runs_are_bit_equal():
    arguments, plan = problem(129, dtype=torch.bfloat16)
    assert torch.equal(block_sparse_attention(*arguments, **plan), block_sparse_attention(*arguments, **plan))


def test_inputs_are_not_changed():
    arguments, plan = problem(111)
    before = [x.clone() for x in (*arguments, *plan.values())]
    block_sparse_attention(*arguments, **plan)
    assert all(torch.equal(a, b) for a, b in zip(before, (*arguments, *plan.values()), strict=True))


@pytest.mark.skipif(target.INTERPRETED, reason="about the reference")
def test_reference_memory_is_linear():
    class LargestTensor(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.numel())
            return result

    S, C = 4096, 32
    q, k, v = torch.randn(3, 1, 1, S, 16).unbind(0)
    sizes = torch.full((1, C), S // C, dtype=torch.int32)
    block_map = torch.rand(1, C, C) < 0.5
    with LargestTensor() as largest:
        block_sparse_attention_reference(
            q, k, v, block_map, sizes, sizes, map_index=torch.zeros(1, 1, dtype=torch.int32)
        )
    assert largest.size <= S * C


def with_change(**changed):
    (q, k, v, block_map, q_sizes, k_sizes), plan = problem(63)
    named = {"q": q, "k": k, "v": v, "block_map": block_map, "q_sizes": q_sizes, "k_sizes": k_sizes} | plan
    return named | {name: change(named) for name, change in changed.items()}


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (ValueError, r"k, v \[B, H, Sk, D\]", {"k": lambda a: a["k"][:, :1]}),
        (TypeError, "share one dtype", {"v": lambda a: a["v"].half()}),
        (
            ValueError,
            "q must be contiguous in its last dim",
            {"q": lambda a: a["q"].repeat_interleave(2, -1)[..., ::2]},
        ),
        (ValueError, "block_map must be bool", {"block_map": lambda a: a["block_map"].float()}),
        (ValueError, "q_sizes", {"q_sizes": lambda a: a["q_sizes"][:, :2]}),
        (ValueError, "k_sizes must sum to 63", {"k_sizes": lambda a: a["k_sizes"] + 1}),
        (ValueError, r"map_index must be \[B, H\]", {"map_index": lambda a: a["map_index"][:1]}),
        (ValueError, "q_permutation must be", {"q_permutation": lambda a: a["q_permutation"][:, :1]}),
        (ValueError, "sm_scale must be positive", {"sm_scale": lambda a: -1.0}),
    ],
)
def test_wrong_arguments_are_named(error, match, changed):
    with pytest.raises(error, match=match):
        block_sparse_attention(**with_change(**changed))


@in_interpreter
def test_limits_of_the_kernel_are_named():
    wide = {name: lambda a, name=name: torch.zeros(2, 2, 63, 160) for name in "qkv"}
    with pytest.raises(NotImplementedError, match="head dim must be at most 128, got 160"):
        block_sparse_attention(**with_change(**wide))
    double = {name: lambda a, name=name: a[name].double() for name in "qkv"}
    with pytest.raises(TypeError, match="fp16, bf16 or fp32"):
        block_sparse_attention(**with_change(**double))
    with pytest.raises(NotImplementedError, match="no backward pass"):
        block_sparse_attention(**with_change(v=lambda a: a["v"].clone().requires_grad_()))
