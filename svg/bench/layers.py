"""One full-width transformer layer with random weights, stock and accelerated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg.configs import load_preset

from ..config import DenseConfig, MethodConfig
from ..engine.layout import TokenLayout
from ..engine.state import RunState
from .inputs import synthetic
from .timing import median_ms

DEVICE = "cuda"
TEXT = 512
DENSITY = 0.25
ALWAYS = {"warmup_steps": 0.0, "warmup_layers": 0.0, "budget": DENSITY}
INPUTS = "hidden states from synthetic moving objects, random weights"


def bench_layers(bench, layouts: dict[str, TokenLayout]) -> None:
    """Speed-up of a layer over stock Diffusers on cuDNN.

    Args:
        bench: collects the results.
        layouts: "wan14b_720p" and "hunyuan_720p" -> layout.
    """
    from svg.pipelines.fused_blocks import fuse, unfuse
    from svg.pipelines.hunyuan_video import SPEC as HUNYUAN
    from svg.pipelines.linears import quantize_linears, restore_linears
    from svg.pipelines.wan import SPEC as WAN

    for name, build, spec, preset in (
        ("wan14b_720p", wan_layer, WAN, "wan2.1-t2v-720p"),
        ("hunyuan_720p", hunyuan_layer, HUNYUAN, "hunyuan-video-720p"),
    ):
        layout = layouts[name]
        layer, attention, call, shape = build(layout, DEVICE, torch.bfloat16)
        original = attention.processor
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            stock = median_ms(call, 3, 1)
            baseline = f"stock Diffusers on cuDNN {stock:.1f} ms"
            exact = _output(call)
            for key, variant in _variants(load_preset(preset).config("near")).items():
                state = begun(variant, layout)
                attention.set_processor(spec.processor(original, state, 0))
                names = linears_of(layer, attention, variant.linears)
                linears = quantize_linears(layer, names, variant.linear_precision)
                changed = fuse(layer.modules()) if variant.fused else []
                ms = median_ms(call, 3, 2)
                error = ((_output(call) - exact).norm() / exact.norm()).item()
                unfuse(changed)
                restore_linears(layer, linears)
                density = state.records[-1].density.mean().item()
                about = {"density": density, "inputs": INPUTS, "baseline": f"{baseline}, this {ms:.1f} ms"}
                bench.note(f"layer/{name}/{key}", stock / ms, "x", shape, **about)
                about["baseline"] = "stock Diffusers' output"
                bench.note(f"layer/{name}/{key.replace('speedup', 'error')}", error, "relative l2", shape, **about)
            attention.set_processor(original)
        del layer, attention, call, exact
        torch.cuda.empty_cache()


def _variants(near: MethodConfig) -> dict[str, MethodConfig]:
    """Key -> config: all together in 16 and 8 bits, with lists of an earlier step, and each gain alone."""
    bf16 = replace(near, fused=True, **ALWAYS)
    both = replace(bf16, precision="int8-fp8", linears="all")
    return {
        "bf16/speedup": bf16,
        "bf16/speedup_map_reused": replace(bf16, refresh=1 << 20),
        "bf16/speedup_sparse_only": replace(bf16, fused=False),
        "bf16/speedup_fused_only": DenseConfig(fused=True),
        "speedup": both,
        "speedup_map_reused": replace(both, refresh=1 << 20),
        "fp8/speedup": replace(both, linear_precision="fp8"),
        "fp8/speedup_map_reused": replace(both, linear_precision="fp8", refresh=1 << 20),
        "speedup_attention_only": replace(both, linears="none"),
        "fp8/speedup_feed_forward": replace(both, linears="feed_forward", linear_precision="fp8"),
        "fp8/speedup_linears_only": DenseConfig(fused=True, linears="all", linear_precision="fp8"),
        "fp8/speedup_linears_without_fusion": DenseConfig(fused=False, linears="all", linear_precision="fp8"),
    }


def linears_of(block: nn.Module, attention: nn.Module, which: str) -> list[str]:
    """Names of a block's linears that a policy puts in 8 bits, as in a transformer's middle."""
    from svg.pipelines.linears import linears_of_block

    name = next(name for name, module in block.named_modules() if module is attention)
    return [] if which == "none" else list(linears_of_block(block, name, which))


def _output(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> Tensor:
    """Of a call, without what it adds to its input being hidden by it: video tokens, fp32."""
    out = call()
    return (out[0] if isinstance(out, tuple) else out).float()


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


def _random(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return build().to(dtype).eval().requires_grad_(False)


def structured_hidden_states(layout: TokenLayout, heads: int, dim: int, device: str, dtype: torch.dtype) -> Tensor:
    """Hidden states [1, S, heads * dim] of moving objects, as large as a norm would leave them; arguments as `synthetic`."""
    hidden = synthetic(layout, heads, dim, device, dtype).q.flatten(2)  # [1, S, H * D]
    return hidden / math.sqrt(hidden.float().square().mean())
