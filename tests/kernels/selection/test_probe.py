import pytest
import torch

from svg.kernels import probe_attention
from svg.kernels.selection import probe


def problem(S, D=64, dtype=torch.float32, t=17, B=2, H=3, samples=2):
    q, k, v = (torch.randn(B, n, H, D).to(dtype).transpose(1, 2) for n in (t, S, S))
    return q, k, v, torch.rand(samples, 2, t, S) < 0.3, torch.rand(B, S) < 0.9


def definition(q, k, v, masks, visible):
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros(*q.shape[:2], 3, *q.shape[2:], dtype=torch.float64)
    for b in range(q.shape[0]):
        both = masks[min(b, masks.shape[0] - 1)]
        for i, mask in enumerate((visible[b].expand(both.shape[1:]), *both)):
            logits = q[b] @ k[b].mT * q.shape[-1] ** -0.5
            some = mask.any(-1)
            out[b, :, i, some] = logits[:, some].masked_fill(~mask[some], -torch.inf).softmax(-1) @ v[b]
    return out


@pytest.mark.parametrize("S", [63, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_and_both_masks(S, dtype):
    arguments = problem(S, dtype=dtype)
    out = probe_attention(*arguments)
    assert out.dtype == torch.float32
    # Inputs are exact in fp32, and weights keep 16 bits: finer than a 16-bit result could be.
    torch.testing.assert_close(out.double(), definition(*arguments), rtol=0, atol=1e-4)


@pytest.mark.parametrize("D", [16, 96, 128])
def test_head_dims_and_more_rows_than_a_tile(D):
    arguments = problem(70, D, torch.bfloat16, t=70, B=1, samples=1)
    torch.testing.assert_close(probe_attention(*arguments).double(), definition(*arguments), rtol=0, atol=1e-4)


@pytest.mark.parametrize("programs", [1, 40, 4000])
def test_stretches_of_keys_are_merged(programs, monkeypatch):
    monkeypatch.setattr(probe, "PROGRAMS_PER_SM", programs)
    monkeypatch.setattr(probe, "CHUNK_BYTES", programs << 10)
    arguments = problem(260, dtype=torch.float16, B=1, samples=1)
    arguments[3][0, 0, :, :200] = False  # a stretch in which a mask sees nothing
    torch.testing.assert_close(probe_attention(*arguments).double(), definition(*arguments), rtol=0, atol=1e-4)


def test_a_row_that_sees_nothing_gives_zeros():
    q, k, v, masks, visible = problem(63)
    masks[0, 1, 3] = False
    out = probe_attention(q, k, v, masks)
    assert (out[0, :, 2, 3] == 0).all() and out.isfinite().all()
    torch.testing.assert_close(out.double(), definition(q, k, v, masks, torch.ones_like(visible)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seen", [True, False])
def test_heads_with_masks_of_their_own(seen):
    q, k, v, _, _ = problem(70, dtype=torch.bfloat16)
    masks, visible = torch.rand(5, 2, 17, 70) < 0.3, torch.rand(5, 70) < 0.9
    index = torch.tensor([[4, 0, 2], [1, 1, 3]], dtype=torch.int32)
    out = probe_attention(q, k, v, masks, visible if seen else None, mask_index=index)
    for b in range(2):
        for h in range(3):
            n = index[b, h, None].long()
            rows = visible[n] if seen else torch.ones(1, 70, dtype=torch.bool)
            expected = definition(*(x[b : b + 1, h : h + 1] for x in (q, k, v)), masks[n], rows)
            torch.testing.assert_close(out[b : b + 1, h : h + 1].double(), expected, rtol=0, atol=1e-4)


def test_wrong_arguments_are_named():
    q, k, v, masks, visible = problem(63)
    with pytest.raises(ValueError, match=r"masks must be bool \[1 or B, 2, t, S\]"):
        probe_attention(q, k, v, masks[:, :1])
    with pytest.raises(ValueError, match=r"visible must be bool \[B, S\]"):
        probe_attention(q, k, v, masks, visible[:1])
    with pytest.raises(ValueError, match=r"mask_index must be int32 \(2, 3\)"):
        probe_attention(q, k, v, masks, visible, mask_index=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"k, v \[B, H, S, D\]"):
        probe_attention(q[:, :1], k, v, masks)
