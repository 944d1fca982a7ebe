"""Whether the tensors of an attention fit together."""

import torch

from ..quantize.tokens import padded_head_dim


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, mask: torch.Tensor | None = None
) -> None:
    """Raises where the tensors of a quantised attention do not fit together.

    Args:
        q: [B, H, S, D].
        k, v: [B, Hkv, Sk, D].
        sm_scale: softmax scale.
        mask: bool [B or 1, H or 1, S or 1, Sk], or None.

    Raises:
        ValueError: shapes disagree, a tensor has no tokens, or sm_scale is not positive.
        TypeError: dtypes are mixed, or the mask is not bool.
        NotImplementedError: head dim above 128.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            "q must be [B, H, S, D] and k, v [B, Hkv, Sk, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: reshape them"
        )
    if 0 in q.shape or 0 in k.shape or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k's heads must divide q's and no dimension may be empty, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: convert them")
    if not sm_scale > 0:
        raise ValueError(f"sm_scale must be positive, got {sm_scale}: scale q instead")
    padded_head_dim(q.shape[-1])
    if mask is not None:
        _check_mask(mask, (*q.shape[:3], k.shape[2]))


def _check_mask(mask: torch.Tensor, full: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a query sees a key, got {mask.dtype}: compare it first")
    if mask.dim() != 4 or mask.shape[3] != full[3] or any(n not in (1, m) for n, m in zip(mask.shape, full)):
        raise ValueError(
            f"mask must be [B, H, S, Sk] = {full} with 1 in place of B, H or S where they share it, "
            f"got {tuple(mask.shape)}: reshape it"
        )
