"""Parts of Hopper's kernels that several of them share (Gluon): rings of stages, products in registers, walks over tiles.

Gluon's own names come from here too, where it can be loaded: it has moved them between releases.
"""

from ..common import target

LOADABLE = target.HAS_TRITON and not target.INTERPRETED  # Gluon has no interpreter

if LOADABLE:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    __all__ = [
        "LOADABLE",
        "TensorDescriptor",
        "fence_async_shared",
        "gl",
        "gluon",
        "mbarrier",
        "tma",
        "warpgroup_mma",
        "warpgroup_mma_wait",
    ]
