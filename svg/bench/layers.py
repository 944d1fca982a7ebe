"""One full-width transformer layer with random weights, stock and accelerated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import DenseConfig, MethodConfig
from ..engine.layout import TokenLayout
from ..engine.state import RunState
from .inputs import synthetic
from .timing import median_ms

DEVICE = "cuda"
TEXT = 512
INPUTS = "hidden states from synthetic moving objects, random weights"


def bench_layers(bench, config: MethodConfig, layouts: dict[str, TokenLayout]) -> None:
    """Speed-up of a layer over stock Diffusers on cuDNN.

    Args:
        bench: collects the results.
        config: the sparse method.
        layouts: "wan14b_720p" and "hunyuan_720p" -> layout.
    """
    from svg.pipelines.fused_blocks import fuse, unfuse
    from svg.pipelines.hunyuan_video import SPEC as HUNYUAN
    from svg.pipelines.wan import SPEC as WAN

    for name, build, spec in (("wan14b_720p", wan_layer, WAN), ("hunyuan_720p", hunyuan_layer, HUNYUAN)):
        layout = layouts[name]
        layer, attention, call, shape = build(layout, DEVICE, torch.bfloat16)
        original = attention.processor
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            stock = median_ms(call, 3, 1)
            baseline = f"stock Diffusers on cuDNN {stock:.1f} ms"
            for suffix, variant in _variants(config).items():
                state = begun(variant, layout)
                attention.set_processor(spec.processor(original, state, 0))
                changed = fuse([layer]) if variant.fused else []
                ms = median_ms(call, 3, 2)
                unfuse(changed)
                density = state.records[-1].density.mean().item()
                about = {"density": density, "inputs": INPUTS, "baseline": baseline}
                bench.note(f"layer/{name}/bf16/speedup{suffix}", stock / ms, "x", shape, **about)
        del layer, attention, call
        torch.cuda.empty_cache()


def _variants(config: MethodConfig) -> dict[str, MethodConfig]:
    """Key suffix -> config: both together, with the map of an earlier step, and each gain alone."""
    return {
        "": replace(config, fused=True),
        "_map_reused": replace(config, fused=True, refresh=1000),
        "_sparse_only": replace(config, fused=False),
        "_fused_only": DenseConfig(fused=True),
    }


def begun(config: MethodConfig, layout: TokenLayout) -> RunState:
    """A state in the middle of a forward, for a layer without its pipeline."""
    state = RunState(config, num_layers=1)
    state.begin_forward(0, 1, "cond", layout)
    return state


def wan_layer(layout: TokenLayout, device: str, dtype: torch.dtype, heads: int = 40, dim: int = 128, ffn: int = 13824):
    """A Wan block (14B by default).

    Returns:
        The block, its video self-attention, a call of the block, and its shape in words.
    """
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

    width = heads * dim
    block = _random(lambda: WanTransformerBlock(width, ffn, heads, cross_attn_norm=True), device, dtype)
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    hidden = structured_hidden_states(layout, heads, dim, device, dtype)
    text = torch.randn(1, TEXT, width, device=device, dtype=dtype)
    modulation = torch.randn(1, 6, width, device=device) / width**0.5
    latents = torch.empty(1, 1, layout.frames, 2 * layout.height, 2 * layout.width, device=device)
    rotary = WanRotaryPosEmbed(dim, (1, 2, 2), 1024).to(device)(latents)
    shape = f"S={layout.total_tokens} width={width} heads={heads} ffn={ffn}"
    return block, block.attn1, lambda: block(hidden, text, modulation, rotary), shape


def hunyuan_layer(layout: TokenLayout, device: str, dtype: torch.dtype, heads: int = 24, dim: int = 128):
    """A single-stream HunyuanVideo block, of which the model has twice as many as of the other kind.

    Returns:
        As `wan_layer`.
    """
    from diffusers.models.transformers.transformer_hunyuan_video import (
        HunyuanVideoRotaryPosEmbed,
        HunyuanVideoSingleTransformerBlock,
    )

    width = heads * dim
    block = _random(lambda: HunyuanVideoSingleTransformerBlock(heads, dim), device, dtype)
    hidden = structured_hidden_states(layout, heads, dim, device, dtype)
    video, text = hidden[:, layout.video_slice], hidden[:, layout.text_slice]
    embedding = torch.randn(1, width, device=device, dtype=dtype)
    latents = torch.empty(1, 1, layout.frames, 2 * layout.height, 2 * layout.width, device=device)
    third = 2 * (dim * 7 // 32)
    rotary = HunyuanVideoRotaryPosEmbed(2, 1, [dim - 2 * third, third, third])(latents)
    shape = f"S={layout.total_tokens} width={width} heads={heads}, single-stream"
    return block, block.attn, lambda: block(video, text, embedding, None, rotary), shape


def _random(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return build().to(dtype).eval().requires_grad_(False)


def structured_hidden_states(layout: TokenLayout, heads: int, dim: int, device: str, dtype: torch.dtype) -> Tensor:
    """Hidden states [1, S, heads * dim] of moving objects, as large as a norm would leave them; arguments as `synthetic`."""
    hidden = synthetic(layout, heads, dim, device, dtype).q.flatten(2)  # [1, S, H * D]
    return hidden / math.sqrt(hidden.float().square().mean())
