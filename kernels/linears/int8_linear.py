"""A linear layer in INT8 with gradients: blocks of its input that hold outliers count with 16 bits."""

from typing import Any

import torch

from .blocks import QuantizedBlocks, first_threshold, quantize_blocks, steered
from .int8_matmul import int8_matmul


class Steering:
    """The threshold of one linear's input over which blocks fall back, held where 0.1 to 0.3 of them do.

    Training nudges it in the backward pass, so that a forward that checkpointing computes twice gives the same twice.
    """

    def __init__(self) -> None:
        self.threshold: torch.Tensor | None = None
        self.steps = 0

    def blocks(self, x: torch.Tensor) -> QuantizedBlocks:
        """A matrix [M, K] in blocks, by the threshold as it is."""
        if self.threshold is None or self.threshold.device != x.device:
            self.threshold = first_threshold(x)
        return quantize_blocks(x, self.threshold)

    def nudge(self, blocks: QuantizedBlocks) -> None:
        """Move the threshold by what fell back."""
        assert self.threshold is not None, "blocks come first"
        self.threshold = steered(self.threshold, blocks)
        self.steps += 1


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, steering: Steering):
        rows = steering.blocks(x.flatten(0, -2))
        columns = quantize_blocks(weight)
        ctx.steering, ctx.shape, ctx.has_bias = steering, x.shape, bias is not None
        ctx.dtypes = x.dtype, weight.dtype
        ctx.save_for_backward(*_tensors(rows), columns.values, columns.scale)
        return int8_matmul(rows, columns, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        *found, values, scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        rows = QuantizedBlocks(*found, dtype=weight_dtype)
        columns = QuantizedBlocks(values, scale, None, None, None, weight_dtype)
        flat = gradient.flatten(0, -2)
        given = quantize_blocks(flat, seed=ctx.steering.steps)
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = int8_matmul(given, columns.t()).to(x_dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            to_weight = int8_matmul(rows.t(whole=True), given.t(whole=True)).t().contiguous()
        if ctx.has_bias and ctx.needs_input_grad[2]:
            to_bias = flat.float().sum(0).to(weight_dtype)
        ctx.steering.nudge(rows)
        return to_x, to_weight, to_bias, None


def _tensors(blocks: QuantizedBlocks) -> tuple[torch.Tensor | None, ...]:
    return blocks.values, blocks.scale, blocks.residual, blocks.residual_scale, blocks.flagged


def int8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, steering: Steering) -> torch.Tensor:
    """A linear layer whose three products, backward included, are in INT8.

    Args:
        x: [..., K] fp16, bf16 or fp32.
        weight: [N, K] of x's dtype, or of another that is converted for nothing but rounding.
        bias: [N], or None.
        steering: the layer's own.

    Returns:
        [..., N] of x's dtype. Gradients reach x, weight and bias; those that flow back are rounded at random, by the number of
        steps so far.

    Raises:
        ValueError: shapes disagree.
        TypeError: a dtype that is not supported.

    Source: arXiv 2503.08040, section 4.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., {weight.shape[1]}] for a weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    return _Int8Linear.apply(x, weight, bias, steering)
