"""A CLIP model that measures videos, from a hub id or a directory."""

from __future__ import annotations

from typing import Any


def load_clip(model: str, device: Any = "cpu") -> tuple[Any, Any]:
    """Load a CLIP model: safetensors only, no code from the model's files.

    Args:
        model: hub id or directory of a `CLIPModel` with its processor, such as openai/clip-vit-base-patch32.
        device: where to compute, in float32.

    Returns:
        The model in eval mode and its processor, for `svg.eval.clip.Clip`.

    Raises:
        ValueError: it cannot be loaded, and why.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        processor = CLIPProcessor.from_pretrained(model)
        network = CLIPModel.from_pretrained(model, use_safetensors=True).float().eval().to(device)
    except Exception as error:  # whatever a folder of strangers, or no network, makes Transformers raise
        raise ValueError(f"CLIP could not be loaded from {model}: {' '.join(str(error).split())}") from error
    return network, processor
