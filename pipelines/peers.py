"""Other people's ways to the same video, as cells of a sweep: installed packages and Diffusers' backends.

None is a dependency: one that is not there is left out with a note. A peer runs on the plain pipeline, without svg.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .attach import transformers_of

BACKEND = "diffusers:"  # before the name of one of Diffusers' attention backends


@dataclass(frozen=True)
class Peer:
    """One package.

    Args:
        module: what must be importable.
        begin: changes a pipeline, and gives what changes it back.
        exact: whether it computes the whole attention map.
    """

    module: str
    begin: Callable[[Any], Callable[[], None]]
    exact: bool = False


def _backend(name: str) -> Callable[[Any], Callable[[], None]]:
    def begin(pipe: Any) -> Callable[[], None]:
        transformers = list(transformers_of(pipe).values())
        for transformer in transformers:
            transformer.set_attention_backend(name)

        def undo() -> None:
            for transformer in transformers:
                transformer.reset_attention_backend()

        return undo

    return begin


def _sparge(pipe: Any) -> Callable[[], None]:
    """SpargeAttn as its authors plug it in: in the place of PyTorch's function, at their setting without tuning."""
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda

    before = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest, **named) -> Tensor:
        if attn_mask is not None or rest or named.get("is_causal") or query.shape[-2] != key.shape[-2]:
            return before(query, key, value, attn_mask, *rest, **named)
        return spas_sage2_attn_meansim_topk_cuda(query, key, value, topk=0.5, is_causal=False)

    F.scaled_dot_product_attention = attention
    return lambda: setattr(F, "scaled_dot_product_attention", before)


def _cache_dit(pipe: Any) -> Callable[[], None]:
    import cache_dit

    cache_dit.enable_cache(pipe)
    return lambda: cache_dit.disable_cache(pipe)


PEERS = {
    "sageattention": Peer("sageattention", _backend("sage"), exact=True),
    "spargeattn": Peer("spas_sage_attn", _sparge),
    "cache-dit": Peer("cache_dit", _cache_dit),
}


def find_peer(name: str) -> Peer:
    """The peer of a name.

    Args:
        name: one of PEERS, or "diffusers:" and one of Diffusers' attention backends.

    Returns:
        The peer, whether its package is there or not.

    Raises:
        ValueError: another name.
    """
    if name in PEERS:
        return PEERS[name]
    from diffusers.models.attention_dispatch import AttentionBackendName

    backends = [one.value for one in AttentionBackendName]
    if name.startswith(BACKEND) and name.removeprefix(BACKEND) in backends:
        return Peer("diffusers", _backend(name.removeprefix(BACKEND)), exact=True)
    raise ValueError(
        f"a peer must be one of {', '.join(PEERS)}, or {BACKEND} and one of {', '.join(backends)}, got {name!r}"
    )


def why_not(name: str) -> str | None:
    """Why a peer cannot run here; None where it can.

    Args:
        name: as `find_peer`.

    Returns:
        The reason, in words.

    Raises:
        ValueError: another name.
    """
    module = find_peer(name).module
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        return f"its package {module} is not installed"
    if not name.startswith(BACKEND):
        return None
    from diffusers.models import attention_dispatch

    try:
        backend = attention_dispatch.AttentionBackendName(name.removeprefix(BACKEND))
        attention_dispatch._check_attention_backend_requirements(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return None


@contextmanager
def use_peer(pipe: Any, name: str) -> Iterator[None]:
    """Let a plain pipeline run with a peer inside the block.

    Args:
        pipe: a Diffusers pipeline that svg is not attached to.
        name: as `find_peer`.
    """
    undo = find_peer(name).begin(pipe)
    try:
        yield
    finally:
        undo()
