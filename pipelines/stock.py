"""Diffusers' own processors, with the one call that computes attention led through `svg.attend`.

Projections, norms, RoPE, gates and output stay Diffusers' code; so a family needs no processor of its own here unless it
computes its mask, or several attentions, in a way that stands in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from torch import Tensor, nn

from svg.engine.state import RunState

from .processor import VideoAttnProcessor, refuse_mask, register_skip


class StockAttnProcessor(VideoAttnProcessor):
    """Runs the processor it stands for, whose attention it computes; made by `stand_for`, a subclass for each kind."""

    @classmethod
    def stand_for(cls, original: Any, state: RunState, layer: int) -> StockAttnProcessor:
        """A processor in the place of another, with its signature, by which Diffusers chooses what to pass.

        Args:
            original: the processor in whose place it is.
            state, layer: as in VideoAttnProcessor.

        Returns:
            The processor.
        """
        return _kind(cls, type(original))(original, state, layer)

    def __call__(self, attn: nn.Module, *args, **kwargs) -> Any:
        if "_redirected" not in vars(self):
            self._redirected = redirected(type(self.original).__call__, self.dispatch)
        return self._redirected(self.original, attn, *args, **kwargs)

    def dispatch(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        """In the place of Diffusers' `dispatch_attention_fn`.

        Args:
            q, k, v: float [B, S, H, D]; k and v may have fewer heads.
            attn_mask: as the family's processor passes it.
            options: the rest, which must leave attention as it is.

        Returns:
            [B, S, H, D], dtype of q.

        Raises:
            NotImplementedError: causal attention, a scale of its own, or a mask that the family does not take.
        """
        self.check_plain(q, k, options)
        return self.attend(q, k, v, self.text_mask(attn_mask)).unflatten(2, (q.shape[2], -1))

    def text_mask(self, attn_mask: Tensor | None) -> Tensor | None:
        """The family's mask as bool [B, text_tokens], True for tokens that are seen; here: none may be given."""
        refuse_mask(attn_mask, type(self.original).__name__)
        return None

    def check_plain(self, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
        """Refuse anything but the attention of all tokens to all tokens."""
        if options.get("is_causal") or options.get("scale") is not None or q.shape[1] != k.shape[1]:
            raise NotImplementedError(
                f"{type(self.original).__name__} must attend from all tokens to all tokens, got {q.shape[1]} queries, "
                f"{k.shape[1]} keys, is_causal={options.get('is_causal', False)}, scale={options.get('scale')}; run this "
                f"model without svg"
            )

    def __reduce__(self):
        state = {key: value for key, value in vars(self).items() if key != "_redirected"}
        return _rebuild, (type(self).__mro__[1], self.original, self.state, self.layer), state


def _rebuild(base: type[StockAttnProcessor], original: Any, state: RunState, layer: int) -> StockAttnProcessor:
    return base.stand_for(original, state, layer)


@functools.cache
def _kind(base: type[StockAttnProcessor], original: type) -> type[StockAttnProcessor]:
    def call(self, attn, *args, **kwargs):
        return base.__call__(self, attn, *args, **kwargs)

    wrapped = functools.wraps(original.__call__)(call)
    made = type(f"SVG{original.__name__}", (base,), {"__call__": wrapped, "__module__": __name__})
    register_skip(made, _skipped(original))
    return made


def _skipped(original: type) -> Callable:
    if original in AttentionProcessorRegistry._registry:
        return AttentionProcessorRegistry.get(original).skip_processor_output_fn

    def skipped(module, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    return skipped


def redirected(function: Callable, dispatch: Callable) -> Callable:
    """A copy of a processor's `__call__` that computes attention by another function.

    Args:
        function: calls `dispatch_attention_fn` or `F.scaled_dot_product_attention`.
        dispatch: takes what `dispatch_attention_fn` takes.

    Returns:
        The copy; the original, which other models use, is left alone.

    Raises:
        NotImplementedError: the function calls neither.
    """
    names = function.__code__.co_names
    if "dispatch_attention_fn" in names:
        ours = {"dispatch_attention_fn": dispatch}
    elif "scaled_dot_product_attention" in names and "F" in names:
        ours = {"F": _Functional(dispatch)}
    else:
        raise NotImplementedError(
            f"{function.__qualname__} must call dispatch_attention_fn or F.scaled_dot_product_attention; this version of "
            f"Diffusers does it another way, run this model without svg"
        )
    # Without a name torch.compile reads these globals, and not those of the module that has it.
    scope = {key: value for key, value in function.__globals__.items() if key != "__name__"} | ours
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _Functional:
    """`torch.nn.functional` with one function replaced."""

    def __init__(self, dispatch: Callable):
        self._dispatch = dispatch

    def scaled_dot_product_attention(self, query, key, value, attn_mask=None, dropout_p=0.0, **options) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self._dispatch(q, k, v, attn_mask, **options).transpose(1, 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)
