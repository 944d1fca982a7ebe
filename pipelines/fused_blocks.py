"""Forwards of transformer blocks with their elementwise work in single kernels, for configs with `fused` on.

Same modules, same order, same result within rounding: norm + modulation and gate + residual are one read and one write each
instead of four to six. Dense and sparse attention profit alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from svg.kernels import gate_residual, modulate


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
    x = gate_residual(x, self.attn1(modulate(x, scale, shift, self.norm1.eps), None, None, rotary_emb), gate)
    x = x + self.attn2(_affine_norm(self.norm2, x), encoder_hidden_states, None, None)
    return gate_residual(x, self.ffn(modulate(x, ffn_scale, ffn_shift, self.norm3.eps)), ffn_gate)


def _affine_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    rows = (x.shape[0], 1, x.shape[2])
    return modulate(x, (norm.weight.float() - 1).expand(rows), norm.bias.float().expand(rows), norm.eps)


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
    video = hidden_states.shape[1]
    x = torch.cat([hidden_states, encoder_hidden_states], 1)
    shift, scale, gate = self.norm.linear(self.norm.silu(temb)).unsqueeze(1).chunk(3, -1)
    normed = modulate(x, scale, shift, self.norm.norm.eps)
    attended = self.attn(
        hidden_states=normed[:, :video],
        encoder_hidden_states=normed[:, video:],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    both = torch.cat([torch.cat(attended, 1), self.act_mlp(self.proj_mlp(normed))], 2)
    x = gate_residual(x, self.proj_out(both), gate)
    return x[:, :video], x[:, video:]


FORWARDS: dict[str, Callable] = {
    "WanTransformerBlock": wan_block,
    "HunyuanVideoSingleTransformerBlock": hunyuan_video_single_block,
}


class FusedForward:
    """The forward of a block until `unfuse`; from then on the block's own, wherever somebody still holds this one.

    Args:
        block: a block of a known class.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.active = True

    def __call__(self, *args, **kwargs):
        kind = type(self.block)
        forward = FORWARDS[kind.__name__] if self.active else kind.forward
        return forward(self.block, *args, **kwargs)


def fuse(modules: Iterable[nn.Module]) -> list[FusedForward]:
    """Give every block of a known class its fused forward; blocks whose forward somebody else wrapped keep it.

    Args:
        modules: any modules.

    Returns:
        The new forwards, for `unfuse`.
    """
    made = []
    for block in modules:
        if type(block).__name__ in FORWARDS and "forward" not in vars(block):
            block.forward = FusedForward(block)
            made.append(block.forward)
    return made


def unfuse(forwards: Iterable[FusedForward]) -> None:
    """Undo `fuse`: a forward that somebody has wrapped since stays where it is and does what the block's own does.

    Args:
        forwards: what `fuse` returned.
    """
    for forward in forwards:
        forward.active = False
        if vars(forward.block).get("forward") is forward:
            del forward.block.forward
