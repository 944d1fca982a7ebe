"""What the attention processors of all families share: projection, RoPE, and the one call of `attend`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from svg.attend import attend_uncompiled
from svg.config import MethodConfig
from svg.engine.compiler import not_compiled
from svg.engine.state import RunState
from svg.kernels import QuantizedRows
from svg.kernels.elementwise import MAX_WIDTH, norm_rope

from .modules import Attention
from .parallel import Ulysses, ulysses_group

# What Diffusers sets on every processor that declares it.
CHOICES = ("_attention_backend", "_parallel_config")

# Diffusers' attention backend -> ours; "native" is PyTorch's own choice, which ours makes too.
BACKENDS = {
    "native": "auto",
    "_native_cudnn": "cudnn",
    "_native_flash": "flash",
    "_native_efficient": "efficient",
    "_native_math": "math",
    "flash": "flash",
}


class VideoAttnProcessor:
    """Base of a family's processor: one instance per attention module, bound to a RunState and a layer.

    Args:
        original: the processor in whose place it is.
        state: state of the transformer that the module belongs to.
        layer: index of the module among the transformer's video self-attention modules.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, original: Any, state: RunState, layer: int):
        self.original = original
        self.state = state
        self.layer = layer

    def fuses(self, x: Tensor, *norms: nn.Module | None) -> bool:
        """Whether QK-norm and RoPE run in one kernel: as the config says, where norms can be read and no gradient is kept.

        Args:
            x: float [B, S, ...], what is normalised.
            norms: the modules.
        """
        wanted = x.is_cuda if self.state.config.fused is None else self.state.config.fused
        return wanted and not torch.is_grad_enabled() and all(is_readable(norm, x) for norm in norms)

    @property
    def parallel(self) -> bool:
        """Whether this rank has a stretch of the video's tokens only."""
        return self._parallel_config is not None

    @not_compiled  # here, and not further in: every frame between a block and this one breaks with it
    def attend(self, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None = None, text: int = 0) -> Tensor:
        """Run the shared attention for this layer, and take what q has beside the video into the forward's layout.

        Args:
            q, k, v: float [B, S, H, D], after QK-norm and RoPE; k and v may have fewer heads, each for H / Hkv in a row.
            text_mask: bool [B, text_tokens], True for real prompt tokens; None: all are real.
            text: tokens that are not the video's, where the family knows it; under context parallelism every rank has them
                whole, and a stretch of the others.

        Returns:
            Float [B, S, H * D], dtype of q.

        Raises:
            NotImplementedError: ring attention, or gradients or settings of single heads under context parallelism.
            ValueError: a Diffusers attention backend that cannot be kept was chosen, or the video has other tokens than
                the grid.
        """
        if text or not self.parallel:  # without text a split sequence's layout is known before
            layout = self.state.layout
            fit_layout(self.state, layout.video_tokens + text if self.parallel else q.shape[1], text or None)
        device = q.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # as PyTorch's attention does
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        if k.shape[2] != q.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        if scores_are_skipped():
            return v.flatten(2)
        if self.parallel:
            return self._attend_parallel(q, k, v, text_mask, text).flatten(2)
        return self._attend(q, k, v, text_mask).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None) -> Tensor:
        backend = dense_backend(self, self.state.config)
        return attend_uncompiled(q, k, v, self.state, self.layer, text_mask=text_mask, dense_backend=backend)

    def _attend_parallel(self, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, text: int) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad:
            raise NotImplementedError("gradients must be off under context parallelism: run under torch.no_grad()")
        layout = self.state.layout
        deal = self.state.deals.get(self.layer)
        exchange = Ulysses(
            ulysses_group(self), layout.total_tokens - text, q.shape[2], text, layout.text_position == "first", deal
        )
        q, k, v = exchange.heads_for_tokens(q, k, v)
        self.state.peers = exchange.peers
        return exchange.tokens_for_heads(self._attend(q, k, v, text_mask))


def fit_layout(state: RunState, tokens: int, text: int | None = None) -> None:
    """Take what this call has beside the video, text or whatever shares the sequence with it, into the forward's layout.

    Args:
        state: the transformer's state.
        tokens: of the sequence.
        text: how many of them are not video, where that is known.

    Raises:
        ValueError: the video has other tokens than the grid.
    """
    layout = state.layout
    if layout.text_position == "none":
        return
    rest = tokens - layout.video_tokens
    if rest < 0 or (text is not None and rest != text):
        raise ValueError(
            f"q must have the grid's {layout.video_tokens} video tokens, got {tokens} tokens, {text} of them text"
        )
    state.layout = replace(layout, text_tokens=rest, text_position=layout.text_position if rest else "none")


def refuse_parallel(processor: Any) -> None:
    """Refuse a processor that Diffusers has put under context parallelism."""
    if getattr(processor, "_parallel_config", None) is not None:
        raise NotImplementedError(
            "context parallelism must be off while a transformer is trained in INT8: load the transformer without "
            "parallel_config and don't call enable_parallelism"
        )


def check_parallel(processor: Any, spec: Any, config: MethodConfig) -> None:
    """Refuse context parallelism in a family, or with settings, that cannot take it.

    Args:
        processor: one of the transformer's processors.
        spec: the family's ModelSpec.
        config: the method's settings.

    Raises:
        NotImplementedError: with the reason.
    """
    if getattr(processor, "_parallel_config", None) is None:
        return
    ulysses_group(processor)
    if not spec.parallel:
        raise NotImplementedError(
            f"context parallelism must be off for {spec.transformer}: it is not known how its sequence is split; run it on "
            f"one GPU"
        )
    if config.head_budgets(0) is not None or getattr(config, "thresholds", None) is not None:
        raise NotImplementedError(
            "settings of single heads must be left out under context parallelism, where a rank has some of the heads: "
            "tune for one GPU, or use one budget for all heads"
        )


def chosen_backend(processor: Any) -> str | None:
    """The Diffusers attention backend that a user chose, for a processor or for all, or None."""
    backend = getattr(processor, "_attention_backend", None)
    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
        backend = None if backend == AttentionBackendName.NATIVE else backend
    return None if backend is None else AttentionBackendName(backend).value


def dense_backend(processor: Any, config: MethodConfig) -> str:
    """What dense calls run on: the Diffusers backend that the user chose, else the config's `dense_backend`.

    Args:
        processor: a processor, whose `_attention_backend` Diffusers sets.
        config: the method's settings.

    Returns:
        A name of `svg.config.DENSE_BACKENDS`.

    Raises:
        ValueError: the backend cannot be kept beside sparse attention, or contradicts the config.
    """
    chosen = chosen_backend(processor)
    if chosen is None or chosen == "native":
        return config.dense_backend
    if chosen not in BACKENDS:
        raise ValueError(
            f"the Diffusers attention backend must be one of {', '.join(BACKENDS)} on an accelerated transformer, got "
            f"{chosen!r}; call transformer.set_attention_backend('native') and choose dense_backend in the config"
        )
    if config.dense_backend not in ("auto", BACKENDS[chosen]):
        raise ValueError(
            f"dense_backend must be auto or {BACKENDS[chosen]} where the Diffusers attention backend is {chosen!r}, got "
            f"{config.dense_backend!r}; call transformer.set_attention_backend('native') or leave dense_backend out"
        )
    return BACKENDS[chosen]


def check_backend(processor: Any) -> None:
    """Refuse a processor for which the user chose a Diffusers attention backend."""
    backend = chosen_backend(processor)
    if backend not in (None, "native"):
        raise ValueError(
            f"the Diffusers attention backend must be unset while a transformer is trained in INT8, got {backend!r}; "
            f"call transformer.set_attention_backend('native')"
        )


def check_original(processor: Any, names: tuple[str, ...]) -> None:
    """Refuse a processor of the user's own, which would be gone without a word."""
    kind = type(processor)
    if names and not (kind.__name__ in names and kind.__module__.startswith("diffusers.")):
        raise ValueError(
            f"attention processors must be Diffusers' own ({', '.join(names)}), got {kind.__module__}.{kind.__name__}, whose "
            f"work would be lost; set Diffusers' own first, or run without svg"
        )


def scores_are_skipped() -> bool:
    """Whether Diffusers' layer skip replaces attention by its values in this call, as perturbed guidance does."""
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in _get_current_function_mode_stack())


def refuse_mask(attention_mask: Tensor | None, family: str) -> None:
    """Refuse an attention mask in a family whose self-attention has none."""
    if attention_mask is not None:
        raise NotImplementedError(
            f"attention_mask must be None in {family} self-attention, got shape {tuple(attention_mask.shape)}; "
            f"masked (for example causal or autoregressive) models are not supported, run them without svg"
        )


def project_qkv(attn: Attention, hidden_states: Tensor | QuantizedRows, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Project to queries, keys and values through the module's own layers, so that LoRA and offloading see the call.

    Args:
        attn: attention module with `to_q`, `to_k`, `to_v`, or `to_qkv` if fused.
        hidden_states: float [B, S, C], or its quantised rows where all three layers take them.
        fused: whether to use `to_qkv`.

    Returns:
        Three float [B, S, H * D].
    """
    if fused:
        return attn.to_qkv(hidden_states).chunk(3, dim=-1)
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (2i, 2i + 1) of the last dimension.

    Args:
        x: float [B, S, H, D].
        cos, sin: float, broadcastable to [B, S, 1, D], each frequency twice in a row.

    Returns:
        Float [B, S, H, D], dtype of x; computed in the dtype of cos.

    Source: RoFormer (arXiv 2104.09864), section 3.4.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 0::2]  # [.., S, 1, D / 2]
    rotated = torch.empty_like(x)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


def is_readable(norm: nn.Module | None, x: Tensor) -> bool:
    """Whether a kernel can do a norm's work on x: one it knows, with its weight where x is, as not all offloading has it."""
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm, RMSNorm)) or x.shape[-1] > MAX_WIDTH:
        return False
    return norm.weight is None or norm.weight.device == x.device


def norm_and_rotate(x: Tensor, norm: Any, cos: Tensor, sin: Tensor, first: int = 0) -> Tensor:
    """QK-norm and RoPE in one kernel.

    Args:
        x: float [B, S, G, W], each of the G groups normalised by itself.
        norm: the attention module's own norm, one that `is_readable`.
        cos, sin: float, T x D numbers, each frequency twice in a row.
        first: first of the T rotated tokens.

    Returns:
        Float [B, S, G, W], dtype of x.
    """
    cos, sin = (angle.to(x.device, torch.float32).reshape(-1, angle.shape[-1]) for angle in (cos, sin))  # [T, D]
    rms = not isinstance(norm, nn.LayerNorm)
    return norm_rope(x, norm.weight, getattr(norm, "bias", None), norm.eps, cos, sin, rms=rms, first=first)


def both_streams(module, hidden_states, encoder_hidden_states, *args, **kwargs):
    """What a skipped attention of video and text returns, for `register_skip`."""
    return hidden_states, encoder_hidden_states


def register_skip(processor: type[VideoAttnProcessor], output) -> None:
    """Tell Diffusers' layer skip what a skipped module returns.

    Args:
        processor: a family's processor class.
        output: (module, *args, **kwargs of the module's forward) -> what the forward returns when skipped.
    """
    AttentionProcessorRegistry.register(processor, AttentionProcessorMetadata(skip_processor_output_fn=output))
