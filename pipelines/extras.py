"""What may be added to a loaded pipeline: LoRA, and compiled blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .attach import transformers_of
from .model_files import GENERATORS, TRANSFORMERS, locate_model, read_index, read_json

BILLION = 10**9


def load_loras(pipe: Any, loras: Sequence[tuple[str, float]]) -> None:
    """Load LoRA weights into a pipeline, all of them at once.

    Args:
        pipe: a Diffusers pipeline that takes LoRA.
        loras: file, folder or hub id, and scale.

    Raises:
        ValueError: a file is not there, is no LoRA of this model, or the pipeline takes none.
    """
    names = [f"lora_{index}" for index in range(len(loras))]
    for name, (source, _) in zip(names, loras):
        path = Path(source).expanduser()
        where = {"weight_name": path.name} if path.is_file() else {}
        try:
            pipe.load_lora_weights(str(path.parent if path.is_file() else source), adapter_name=name, **where)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"--lora must be LoRA weights of this model, got {source}: {' '.join(str(error).split())}"
            ) from error
    if names:
        pipe.set_adapters(names, [scale for _, scale in loras])


def compile_blocks(pipe: Any) -> None:
    """Compile the repeated blocks of a pipeline's transformers; attention itself stays with svg's kernels."""
    for transformer in transformers_of(pipe).values():
        transformer.compile_repeated_blocks()


def check_size_for_cpu(model: str, device: torch.device, revision: str | None = None, yes: bool = False) -> None:
    """Refuse to run billions of weights on a CPU, which takes hours for a video, unless that is wanted.

    Args:
        model: hub id, directory or "tiny-wan".
        device: where it is to run.
        revision: of a hub id.
        yes: it is wanted.

    Raises:
        ValueError: there are a billion weights or more, and nobody said yes.
    """
    if device.type != "cpu" or yes:
        return
    weights = count_weights(locate_model(model), revision)
    if weights >= BILLION:
        raise ValueError(
            f"device must be a GPU for the {weights / BILLION:.1f} billion weights of {model}, got cpu, where a video takes "
            f"hours: pass --yes to run it all the same"
        )


def count_weights(source: str | Path, revision: str | None = None) -> int:
    """How many weights a pipeline's transformers have, from their configs alone.

    Args:
        source: directory or hub id.
        revision: of a hub id.

    Returns:
        The number of weights, both transformers together.
    """
    import diffusers

    index = read_index(source, revision)
    kind = getattr(diffusers, GENERATORS[index["_class_name"]].transformer)
    total = 0
    for name in TRANSFORMERS:
        if (index.get(name) or [None])[0] is not None:
            with torch.device("meta"):
                module = kind.from_config(read_json(source, f"{name}/config.json", revision))
            total += sum(parameter.numel() for parameter in module.parameters())
    return total
