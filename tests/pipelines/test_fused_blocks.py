"""Fused forwards give the stock blocks' result, and leave nothing behind."""

import pytest
import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoSingleTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

import svg
from svg.config import DenseConfig
from svg.pipelines import fused_blocks

B, S, TEXT, C = 2, 30, 7, 16


def randomised(block):
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block.requires_grad_(False)


@torch.no_grad()
def both(block, *inputs):
    stock = block(*inputs)
    forwards = fused_blocks.fuse([block])
    assert [forward.block for forward in forwards] == [block]
    fused = block(*inputs)
    fused_blocks.unfuse(forwards)
    assert "forward" not in vars(block)
    return stock, fused


@pytest.mark.parametrize("cross_attn_norm", [True, False])
@pytest.mark.parametrize("each_token", [True, False])
def test_wan_block(cross_attn_norm, each_token):
    block = randomised(WanTransformerBlock(C, 32, 2, cross_attn_norm=cross_attn_norm))
    temb = torch.randn(B, S, 6, C) if each_token else torch.randn(B, 6, C)
    angle = torch.randn(1, S, 1, C // 2)
    stock, fused = both(block, torch.randn(B, S, C), torch.randn(B, TEXT, C), temb, (angle.cos(), angle.sin()))
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-5)


def test_hunyuan_video_single_block():
    block = randomised(HunyuanVideoSingleTransformerBlock(2, C // 2))
    angle = torch.randn(S, C // 2)
    inputs = (torch.randn(B, S, C), torch.randn(B, TEXT, C), torch.randn(B, C), None, (angle.cos(), angle.sin()))
    for stock, fused in zip(*both(block, *inputs), strict=True):
        torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-5)


def test_gradients_run_the_block_itself(monkeypatch):
    block = randomised(WanTransformerBlock(C, 32, 2)).requires_grad_(True)
    (forward,) = fused_blocks.fuse([block])
    monkeypatch.setitem(fused_blocks.FORWARDS, "WanTransformerBlock", None)
    angle = torch.randn(1, S, 1, C // 2)
    x = torch.randn(B, S, C, requires_grad=True)
    block(x, torch.randn(B, TEXT, C), torch.randn(B, 6, C), (angle.cos(), angle.sin())).sum().backward()
    assert x.grad is not None and block.scale_shift_table.grad is not None


def test_a_forward_that_somebody_wrapped_is_left_alone():
    block = WanTransformerBlock(C, 32, 2)
    block.forward = wrapped = lambda *args: args
    assert fused_blocks.fuse([block]) == [] and block.forward is wrapped
    del block.forward
    changed = fused_blocks.fuse([block])
    block.forward = wrapped
    fused_blocks.unfuse(changed)
    assert block.forward is wrapped


def test_accelerate_fuses_the_blocks_and_restore_undoes_it(load):
    pipe = load("wan")
    blocks = [m for m in pipe.transformer.modules() if type(m) is WanTransformerBlock]
    svg.accelerate(pipe, DenseConfig(fused=True))
    assert blocks and all(isinstance(block.forward, fused_blocks.FusedForward) for block in blocks)
    svg.accelerate(pipe, DenseConfig(fused=False))
    assert not any("forward" in vars(block) for block in blocks)
    svg.accelerate(pipe, DenseConfig(fused=True))
    svg.restore(pipe)
    assert not any("forward" in vars(block) for block in blocks)
