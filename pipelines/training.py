"""INT8 self-attention, gradients included, while a transformer is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from svg.config import DenseConfig
from svg.engine.state import RunState
from svg.functional.training import training_attention

from .processor import VideoAttnProcessor, check_backend, refuse_parallel
from .registry import find_spec


@contextmanager
def int8_training(transformer: nn.Module, gradients: str = "int8") -> Iterator[nn.Module]:
    """Within the block, a transformer's video self-attention runs forward and backward in INT8.

    Weights, their gradients and the checkpoint stay what they are; only the arithmetic of attention changes. The
    transformer may be compiled, inside or outside the block, and may checkpoint its activations.

    Args:
        transformer: a Diffusers transformer of a supported family, not accelerated by `svg.accelerate`.
        gradients: "int8" or "bf16", as in `svg.training_attention`.

    Yields:
        The same transformer. After the block its processors are the original objects.

    Raises:
        ValueError: the transformer is not supported, is accelerated, or has a Diffusers attention backend of its own.
        NotImplementedError: context parallelism is on; or, in a forward, prompts with padding in the self-attention.

    Example:
        with svg.int8_training(pipe.transformer) as transformer:
            loss_of(transformer(latents, timestep, text)).backward()
    """
    transformer = getattr(transformer, "_orig_mod", transformer)
    spec = find_spec(transformer)
    modules = spec.attention_modules(transformer)
    originals = [attn.processor for attn in modules]
    for processor in originals:
        refuse_parallel(processor)
        check_backend(processor)
        if isinstance(processor, VideoAttnProcessor):
            raise ValueError("transformer must not be accelerated while it is trained: call svg.restore(pipe) first")
    state = RunState(DenseConfig(), len(modules))
    try:
        for layer, attn in enumerate(modules):
            processor = spec.processor(attn.processor, state, layer)
            processor.attend = partial(_attend, gradients)
            attn.processor = processor
        yield transformer
    finally:
        for attn, processor in zip(modules, originals, strict=True):
            attn.processor = processor


def _attend(gradients: str, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None = None, text: int = 0) -> Tensor:
    """In the place of `VideoAttnProcessor.attend`: q, k, v [B, S, H, D] -> [B, S, H * D]."""
    if text_mask is not None:
        raise NotImplementedError(
            "text_mask must be None in INT8 training, got one: trim prompts to their length, one length a batch"
        )
    return training_attention(q, k, v, gradients=gradients, tensor_layout="NHD").flatten(2)
