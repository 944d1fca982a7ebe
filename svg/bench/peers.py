"""Other packages' kernels, measured beside ours when they are installed; none is a dependency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """One package.

    Args:
        distribution: its name in the package index.
        dense: (q, k, v [B, H, S, D]) -> a call to time.
        block_sparse: (q, sorted k, sorted v, plan) -> a call to time; planning and sorting q not counted.
        kmeans: (x, centroids, iterations) -> a call to time.
        whole_blocks: precision -> (q, k, v, index int32 [1, H, blocks, kept]) -> a call to time on blocks of 128 x 128.
        errors: what it raises where it cannot run.
    """

    distribution: str
    dense: Callable | None = None
    block_sparse: Callable | None = None
    kmeans: Callable | None = None
    whole_blocks: Mapping[str, Callable] = field(default_factory=dict)
    errors: tuple[type[Exception], ...] = (ImportError, RuntimeError, ValueError, TypeError, AssertionError)

    def version(self) -> str | None:
        """Installed version, or None."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Callable:
    from sageattention import sageattn

    return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, plan) -> Callable:
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    heads, dim = q.shape[1], q.shape[-1]
    maps = plan.map_index[0].long()
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=q.device)
    wrapper = VariableBlockSparseAttentionWrapper(workspace, backend="auto")
    wrapper.plan(
        block_mask_map=plan.block_map[maps], block_row_sz=plan.q_sizes[maps], block_col_sz=plan.k_sizes[maps],
        num_qo_heads=heads, num_kv_heads=heads, head_dim=dim, q_data_type=q.dtype,
    )  # fmt: skip
    order = plan.q_permutation[0].long()[..., None].expand(-1, -1, dim)
    sorted_q = q[0].gather(1, order).contiguous()
    return lambda: wrapper.run(sorted_q, k[0], v[0])


def _flash_kmeans(x: Tensor, centroids: Tensor, iterations: int) -> Callable:
    from flash_kmeans import batch_kmeans_Euclid

    flat = x.flatten(0, 1).contiguous()
    start = centroids.flatten(0, 1).to(x.dtype)
    return lambda: batch_kmeans_Euclid(
        flat, n_clusters=start.shape[1], max_iters=iterations, tol=-1.0, init_centroids=start
    )


def _nvidia(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Callable:
    from cudnn.block_sparse_attention import BSA

    return lambda: BSA.block_sparse_attention_forward(q, k, v, index, sparse_block_size=128)


def _nvidia_fp8(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Callable:
    from cudnn.block_sparse_attention import BSA

    return lambda: BSA.block_sparse_attention_fp8_forward(q, k, v, index, sparse_block_size=128)


PEERS = {
    "nvidia-bsa": Peer("nvidia-cudnn-frontend", whole_blocks={"bf16": _nvidia, "fp8": _nvidia_fp8}),
    "flashinfer": Peer("flashinfer-python", block_sparse=_flashinfer),
    "sageattention": Peer("sageattention", dense=_sage),
    "flash-kmeans": Peer("flash-kmeans", kmeans=_flash_kmeans),
}
