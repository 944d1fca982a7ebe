import pytest
import torch
from quantised_inputs import cosine, exact, outliers

from svg.kernels.common import target
from svg.kernels.dense_quantised.varlen import segment_means, varlen_attention

in_interpreter = pytest.mark.skipif(not target.INTERPRETED, reason="a limit of the Triton kernel only")
BAR = 0.9995  # a row that sees one key has all of the 2.6 % by which e4m3 rounds it
LENGTHS = ([65, 1, 129, 200], [130, 63, 1, 257])


def packed(q_lengths, k_lengths, D=64, H=4, kv_heads=2, dtype=torch.bfloat16):
    """Sequences of their own distributions, [H, T, D] views of [T, H, D], and where each ends."""
    parts = [outliers(s, sk, D, dtype, H=H, kv_heads=kv_heads) for s, sk in zip(q_lengths, k_lengths)]
    q, k, v = (torch.cat([part[i][0].transpose(0, 1) for part in parts]).transpose(0, 1) for i in range(3))
    ends = [torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (q_lengths, k_lengths)]
    return q, k, v, *ends


def each(q, k, v, q_ends, k_ends, **options):
    """Exact attention, one sequence after the other."""
    parts = [
        exact(q[None, :, a:b], k[None, :, c:d], v[None, :, c:d], **options)
        for a, b, c, d in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:])
    ]
    return torch.cat([out[0] for out, _ in parts], 1), torch.cat([lse[0] for _, lse in parts], 1)


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp8-acc16", "int8-fp16"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_each_sequence_by_itself(precision, is_causal):
    arguments = packed(*LENGTHS)
    out, lse = varlen_attention(*arguments, precision=precision, is_causal=is_causal, return_lse=True)
    right, right_lse = each(*arguments, is_causal=is_causal)
    assert out.shape == right.shape and out.dtype == torch.bfloat16 and out.stride() == arguments[0].stride()
    assert cosine(out, right) >= BAR
    assert (lse - right_lse).abs().mean() < 0.01


@pytest.mark.parametrize("lengths", [([70], [70]), ([0, 5, 0, 64], [3, 0, 0, 65]), ([1] * 20, [1] * 20)])
def test_few_many_and_empty_sequences(lengths):
    arguments = packed(*lengths)
    out, lse = varlen_attention(*arguments, smooth_v=True, return_lse=True)
    right, right_lse = each(*arguments)
    assert cosine(out, right) >= BAR
    seen = right_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen) and (out[~seen] == 0).all()
    assert (lse - right_lse)[seen].abs().mean() < 0.01


def test_smoothing_in_each_sequence_matters():
    """A mean over all sequences leaves each its own bias, which eats the range of INT8."""
    q, k, v, q_ends, k_ends = packed([64, 64], [128, 128], dtype=torch.float32)
    k = k.clone()
    k[:, :128] += 40
    k[:, 128:] -= 40
    right, _ = each(q, k, v, q_ends, k_ends)
    with_it, without = (
        (varlen_attention(q, k, v, q_ends, k_ends, precision="int8-fp16", smooth_k=smooth) - right).norm()
        for smooth in (True, False)
    )
    assert with_it < 0.3 * without


@in_interpreter
def test_segment_means():
    x, ends = torch.randn(3, 200, 48), torch.tensor([0, 70, 70, 200], dtype=torch.int32)
    right = torch.stack([x[:, :70].mean(1), torch.zeros(3, 48), x[:, 70:].mean(1)])
    torch.testing.assert_close(segment_means(x, ends), right)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"q_ends and k_ends must be \[n \+ 1\]", {"q_ends": torch.tensor([0, 5])}),
        (ValueError, "k_ends must rise from 0 to the 13 tokens", {"k_ends": torch.tensor([0, 9, 12])}),
        (TypeError, "q_ends must be int32 or int64", {"q_ends": torch.tensor([0.0, 3.0, 8.0])}),
        (ValueError, "precision must be one of int8-fp8", {"precision": "int4-fp8"}),
        (ValueError, "smooth_v needs FP8", {"smooth_v": True, "precision": "int8-fp16"}),
        (TypeError, "unexpected keyword argument", {"max_seqlen_q": 8}),
    ],
)
def test_wrong_arguments_are_named(error, match, change):
    names = ("q", "k", "v", "q_ends", "k_ends")
    with pytest.raises(error, match=match):
        varlen_attention(**dict(zip(names, packed([3, 5], [9, 4]), strict=True)) | change)
