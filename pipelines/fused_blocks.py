"""Forwards of transformer blocks with their elementwise work in single kernels.

Same modules, same order, same result within rounding: gate + residual + norm + modulation is one pass over the tokens instead of
eight. What goes into linears in 8 bits leaves these passes quantised, and is quantised once for q, k and v. Dense and sparse
attention profit alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU, SwiGLU
from torch import Tensor, nn

from svg.kernels import QuantizedRows, activate, gate_residual, modulate, residual_modulate

from .linears import is_untouched, takes_rows
from .processor import VideoAttnProcessor, is_readable


def wan_block(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb) -> Tensor:
    """A Wan block.

    Args:
        self: the block.
        hidden_states: [B, S, C].
        encoder_hidden_states: [B, text, C].
        temb: [B, 6, C], or [B, S, 6, C] where every token has its timestep.
        rotary_emb: as the block takes it.

    Returns:
        [B, S, C].
    """
    modulation = self.scale_shift_table + temb.float()
    if temb.ndim == 3:
        modulation = modulation.unsqueeze(1)  # [B, 1, 6, C]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(2)
    x = hidden_states
    normed = modulate(x, scale, shift, self.norm1.eps, **_projects(self.attn1))
    attended = self.attn1(normed, None, None, rotary_emb)
    x, normed = _residual_norm(x, attended, gate, self.norm2)
    attended = self.attn2(normed, encoder_hidden_states, None, None)
    x, normed = residual_modulate(x, attended, None, ffn_scale, ffn_shift, self.norm3.eps, **_takes(self.ffn))
    return gate_residual(x, self.ffn(normed), ffn_gate)


def _residual_norm(x: Tensor, update: Tensor, gate: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Gate and residual, then a norm with its own weight and bias, or none: both results."""
    if not (isinstance(norm, nn.LayerNorm) and norm.weight is not None and is_readable(norm, x)):
        x = gate_residual(x, update, gate)
        return x, x if isinstance(norm, nn.Identity) else norm(x.float()).type_as(x)
    weight, bias = (one.expand(x.shape[0], 1, -1) for one in (norm.weight, norm.bias))
    x, normed = residual_modulate(x, update, gate, weight, bias, norm.eps, affine=True)
    assert isinstance(normed, Tensor)  # nothing asked for rows
    return x, normed


def hunyuan_video_single_block(
    self, hidden_states, encoder_hidden_states, temb, attention_mask=None, image_rotary_emb=None, *args, **kwargs
) -> tuple[Tensor, Tensor]:
    """A single-stream HunyuanVideo block.

    Args:
        self: the block.
        hidden_states: [B, S, C].
        encoder_hidden_states: [B, text, C].
        temb: [B, C].
        attention_mask, image_rotary_emb: as the block takes them; what follows is ignored, as by the block.

    Returns:
        [B, S, C] and [B, text, C].
    """
    video, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
    x = torch.cat([hidden_states, encoder_hidden_states], 1)
    shift, scale, gate = self.norm.linear(self.norm.silu(temb)).unsqueeze(1).chunk(3, -1)
    direct = _is_ours(self.attn) and hasattr(self.attn.processor, "single_stream")
    rows = _projects(self.attn, self.proj_mlp) if direct else {}
    normed = modulate(x, scale, shift, self.norm.norm.eps, **rows)
    if direct:
        attended = self.attn.processor.single_stream(self.attn, normed, text, attention_mask, image_rotary_emb)
    else:
        assert isinstance(normed, Tensor)  # nothing asked for rows
        attended = self.attn(
            hidden_states=normed[:, :video],
            encoder_hidden_states=normed[:, video:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        attended = torch.cat(attended, 1)
    both = self.proj_mlp(normed)
    if is_untouched(self.act_mlp):
        both = activate(both, _gelu(self.act_mlp), before=attended, **_rows_of(self.proj_out))
    else:
        both = torch.cat([attended, self.act_mlp(both)], 2)
    x = gate_residual(x, self.proj_out(both), gate)
    return x[:, :video], x[:, video:]


def feed_forward(self, hidden_states: Tensor | QuantizedRows, *args, **kwargs) -> Tensor:
    """A feed-forward whose second linear is in 8 bits: its input is quantised as the activation writes it.

    Args:
        self: the feed-forward.
        hidden_states: [B, S, C], or its quantised rows; what follows is ignored, as by the module.

    Returns:
        [B, S, C].
    """
    kind = _activation(self)
    rows = _rows_of(self.net[2])
    if kind is None or len(hidden_states.shape) != 3 or not rows:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return self.net[2](activate(self.net[0].proj(hidden_states), kind, **rows))


def _rows_of(*linears: Any) -> dict[str, Any]:
    """What `modulate` and `activate` are asked for, so that all of these linears take it: FP8 or INT8 rows, or nothing."""
    precisions = {"fp8": "fp8", "int8": "int8-rows"}
    return {name: True for name, precision in precisions.items() if takes_rows(*linears, precision=precision)}


def _activation(ffn: Any) -> str | None:
    """Which of `activate`'s kinds a feed-forward has between its two linears, or None: another one, or somebody listens."""
    net = ffn.net
    quiet = len(net) == 3 and not (ffn.training and net[1].p) and all(is_untouched(module) for module in net)
    if not quiet:
        return None
    if type(net[0]) is GELU:
        return "gelu_tanh" if net[0].approximate == "tanh" else "gelu"
    return {GEGLU: "geglu", SwiGLU: "swiglu"}.get(type(net[0]))


def _takes(ffn: Any) -> dict[str, Any]:
    """Which quantised rows a feed-forward can be given: see `_rows_of`."""
    fused = isinstance(vars(ffn).get("forward"), FusedForward) and not (ffn._forward_hooks or ffn._forward_pre_hooks)
    return _rows_of(ffn.net[0].proj, ffn.net[2]) if fused and _activation(ffn) is not None else {}


def _gelu(module: nn.GELU) -> str:
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


def _is_ours(attn: nn.Module) -> bool:
    """Whether an attention module does nothing but call our processor."""
    return is_untouched(attn) and isinstance(attn.processor, VideoAttnProcessor)


def _projects(attn: nn.Module, *beside: nn.Module) -> dict[str, Any]:
    """Which quantised rows an attention module, and linears beside it, can be given: see `_rows_of`."""
    fused = getattr(attn, "fused_projections", False)
    return _rows_of(attn.to_q, attn.to_k, attn.to_v, *beside) if _is_ours(attn) and not fused else {}


FORWARDS: dict[str, Callable] = {
    "WanTransformerBlock": wan_block,
    "HunyuanVideoSingleTransformerBlock": hunyuan_video_single_block,
    "FeedForward": feed_forward,
}


class FusedForward:
    """The forward of a block until `unfuse`; from then on the block's own, wherever somebody still holds this one.

    The block's own, too, where gradients are on: the kernels have none.

    Args:
        block: a block of a known class.
        everywhere: on CPUs too, where nothing is gained.
    """

    def __init__(self, block: nn.Module, everywhere: bool = True):
        self.block = block
        self.own = type(block).forward  # kept, as torch.compile cannot ask a class of Diffusers for it
        self.everywhere = everywhere
        self.active = True

    def __call__(self, *args, **kwargs):
        fused = self.active and not torch.is_grad_enabled() and (self.everywhere or _on_gpu(args, kwargs))
        forward = FORWARDS[type(self.block).__name__] if fused else self.own
        return forward(self.block, *args, **kwargs)


def _on_gpu(args: tuple, kwargs: dict) -> bool:
    x = args[0] if args else kwargs["hidden_states"]
    return x.values.is_cuda if isinstance(x, QuantizedRows) else x.is_cuda


def fuse(modules: Iterable[nn.Module], everywhere: bool = True) -> list[FusedForward]:
    """Give every block of a known class its fused forward; blocks whose forward somebody else wrapped keep it.

    Args:
        modules: any modules.
        everywhere: on CPUs too.

    Returns:
        The new forwards, for `unfuse`.
    """
    made = []
    for block in modules:
        if _gains(block) and "forward" not in vars(block):
            block.forward = FusedForward(block, everywhere)
            made.append(block.forward)
    return made


def _gains(block: Any) -> bool:
    kind = type(block)
    if kind.__name__ not in FORWARDS or not kind.__module__.startswith("diffusers."):
        return False
    return kind.__name__ != "FeedForward" or bool(_rows_of(block.net[-1]))


def unfuse(forwards: Iterable[FusedForward]) -> None:
    """Undo `fuse`: a forward that somebody has wrapped since stays where it is and does what the block's own does.

    Args:
        forwards: what `fuse` returned.
    """
    for forward in forwards:
        forward.active = False
        if vars(forward.block).get("forward") is forward:
            del forward.block.forward
