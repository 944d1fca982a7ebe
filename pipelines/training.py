"""INT8 self-attention and linears, gradients included, while a transformer is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from svg.config import DenseConfig
from svg.engine.compiler import not_compiled
from svg.engine.state import RunState
from svg.functional._arguments import check_choice
from svg.functional.training import PRODUCTS, training_attention
from svg.kernels.linears import Steering, int8_linear

from .linears import find_linears, plain_linear
from .processor import VideoAttnProcessor, check_backend, refuse_parallel
from .registry import find_spec


@contextmanager
def int8_training(transformer: nn.Module, gradients: str = "int8", linears: str = "none") -> Iterator[nn.Module]:
    """Within the block, a transformer's video self-attention, and linears if wanted, run forward and backward in INT8.

    Weights, their gradients and the checkpoint stay what they are; only the arithmetic changes. The transformer may be
    compiled, inside or outside the block (linears in INT8 break its graph), and may checkpoint its activations.

    Args:
        transformer: a Diffusers transformer of a supported family, not accelerated by `svg.accelerate`.
        gradients: "int8" or "bf16", as in `svg.training_attention`.
        linears: which linears of the blocks: "none", "feed_forward" or "all", as the setting `linears` of a method. Blocks
            of their inputs that hold outliers count with 16 bits, a tenth to three tenths of them.

    Yields:
        The same transformer. After the block its processors are the original objects.

    Raises:
        ValueError: gradients is unknown, or the transformer is not supported, is accelerated, or has a Diffusers
            attention backend of its own; or there are no such linears as `linears`.
        NotImplementedError: context parallelism is on; or, in a forward, prompts with padding in the self-attention.

    Example:
        with svg.int8_training(pipe.transformer) as transformer:
            loss_of(transformer(latents, timestep, text)).backward()
    """
    check_choice("gradients", gradients, tuple(PRODUCTS))
    transformer = getattr(transformer, "_orig_mod", transformer)
    spec = find_spec(transformer)
    modules = spec.attention_modules(transformer)
    originals = [attn.processor for attn in modules]
    for processor in originals:
        refuse_parallel(processor)
        check_backend(processor)
        if isinstance(processor, VideoAttnProcessor):
            raise ValueError("transformer must not be accelerated while it is trained: call svg.restore(pipe) first")
    state = RunState(DenseConfig(linears=linears), len(modules))
    chosen = [plain_linear(transformer, name) for name in find_linears(transformer, spec, linears)]
    try:
        for linear in chosen:
            vars(linear)["forward"] = Int8Forward(linear)
        for layer, attn in enumerate(modules):
            processor = spec.processor(attn.processor, state, layer)
            vars(processor)["attend"] = partial(_attend, gradients)
            attn.processor = processor
        yield transformer
    finally:
        for linear in chosen:
            vars(linear).pop("forward", None)
        for attn, processor in zip(modules, originals, strict=True):
            attn.processor = processor


class Int8Forward:
    """The forward of a linear in INT8, with gradients.

    Args:
        linear: the linear, whose own weight it reads at every call.
    """

    def __init__(self, linear: nn.Linear):
        self.linear = linear
        self.steering = Steering()

    @not_compiled  # the threshold moves with every step
    def __call__(self, x: Tensor) -> Tensor:
        weight, bias, device = self.linear.weight, self.linear.bias, x.device.type
        if torch.is_autocast_enabled(device):  # as PyTorch's linear does
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return int8_linear(x, weight, bias, self.steering)


def _attend(gradients: str, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None = None, text: int = 0) -> Tensor:
    """In the place of `VideoAttnProcessor.attend`: q, k, v [B, S, H, D] -> [B, S, H * D]."""
    if text_mask is not None:
        raise NotImplementedError(
            "text_mask must be None in INT8 training, got one: trim prompts to their length, one length a batch"
        )
    return training_attention(q, k, v, gradients=gradients, tensor_layout="NHD").flatten(2)
