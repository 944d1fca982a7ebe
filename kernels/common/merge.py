"""One attention of two: outputs over two sets of keys, put together by their log-sum-exps.

    out = (e^lse out + e^lse' out') / (e^lse + e^lse')

Source: the rule by which FlashAttention joins blocks (arXiv 2205.14135, section 3.1).
"""

import torch

from . import target
from .launch import LaunchTable
from .target import tl, triton

# arch -> (rows a program, warps); memory-bound
LAUNCH = LaunchTable({80: (32, 4), 89: (32, 4), 90: (32, 4), 100: (32, 4), 120: (32, 4)})


def merge_attention(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Make `out` the attention over its keys and the other's together.

    Args:
        out: [B, H, S, D], last dim contiguous; changed in place.
        lse: fp32 [B, H, S], its log-sum-exp, natural log; -inf where it saw no key.
        other, other_lse: the same of the other keys; other in out's dtype.

    Raises:
        ValueError: shapes or dtypes disagree.
        NotImplementedError: a gradient would be needed on the Triton path.
    """
    if other.shape != out.shape or other.dtype != out.dtype or not lse.shape == other_lse.shape == out.shape[:3]:
        raise ValueError(
            f"out and other must be [B, H, S, D] of one dtype with lse [B, H, S], got {tuple(out.shape)} {out.dtype}, "
            f"{tuple(other.shape)} {other.dtype}, {tuple(lse.shape)}, {tuple(other_lse.shape)}: pass two calls' results"
        )
    op = _launch if target.use_triton(out) else merge_attention_reference
    op(out, lse, other, other_lse)


def merge_attention_reference(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Specification of `merge_attention` in plain torch; same arguments."""
    # Of two -inf the sigmoid is NaN, and both outputs are zeros.
    share = torch.sigmoid(lse - other_lse).nan_to_num(0.0)[..., None]
    wide = torch.promote_types(out.dtype, torch.float32)
    out.copy_(share * out.to(wide) + (1 - share) * other.to(wide))


def _launch(out, lse, other, other_lse):
    target.refuse_gradients("merge_attention", out, other)
    B, H, S, D = out.shape
    block_s, num_warps = LAUNCH.row(out.device)
    with target.on_device(out):
        _merge_kernel[(triton.cdiv(S, block_s), B * H)](
            out, lse.contiguous(), other, other_lse.contiguous(), H, S, *out.stride()[:3], *other.stride()[:3],
            D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_S=block_s, num_warps=num_warps,
        )  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def _merge_kernel(
    out, lse, other, other_lse, H, S, stride_ob, stride_oh, stride_os, stride_xb, stride_xh, stride_xs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    token = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    inside = token < S
    one = tl.load(lse + bh * S + token, mask=inside, other=0.0)
    two = tl.load(other_lse + bh * S + token, mask=inside, other=0.0)
    share = tl.where(one == float("-inf"), 0.0, 1 / (1 + tl.exp(two - one)))[:, None]
    mask = inside[:, None] & (offs_d < D)[None, :]
    goal = out + b * stride_ob + h * stride_oh + token[:, None] * stride_os + offs_d[None, :]
    source = other + b * stride_xb + h * stride_xh + token[:, None] * stride_xs + offs_d[None, :]
    x = tl.load(goal, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    tl.store(goal, (share * x + (1 - share) * y).to(out.dtype.element_ty), mask=mask)
