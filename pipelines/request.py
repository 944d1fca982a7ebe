"""What to generate, and the rules of a pipeline that can be checked from its small files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
from PIL import Image

from svg.documents import shown

_SIDE = 16  # every supported Diffusers pipeline refuses sides that 16 doesn't divide
# Far beyond what any model makes: a typo or a stranger's file is refused before it takes the machine's memory or time.
_MOST = {
    "height": 16_384,
    "width": 16_384,
    "num_frames": 100_000,
    "steps": 10_000,
    "fps": 1000,
    "max_sequence_length": 65_536,
}
_MOST_GUIDANCE = 1000  # also of flow_shift: beyond it all numbers overflow
_PIXEL_BYTES = 12  # a decoded pixel: three numbers of 32 bits


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to generate.

    Args:
        prompt: what the video shows.
        negative_prompt: what it must not show, or None.
        height, width: pixels.
        num_frames: video frames, 4k + 1.
        steps: denoising steps.
        guidance: classifier-free guidance scale (HunyuanVideo: embedded guidance).
        true_cfg: HunyuanVideo only: classifier-free guidance with the negative prompt, > 1, or None.
        seed: seed of the CPU generator that draws the noise.
        image: first frame for image-to-video, resized to height x width; None for text-to-video.
        last_image: last frame, for Wan's image-to-video models that take one; or None.
        max_sequence_length: text tokens, or None for the model's own.
        fps: frames per second of the written video.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int
    width: int
    num_frames: int
    steps: int = 50
    guidance: float = 5.0
    true_cfg: float | None = None
    seed: int = 0
    image: Image.Image | None = None
    last_image: Image.Image | None = None
    max_sequence_length: int | None = None
    fps: int = 16


@dataclass(frozen=True, kw_only=True)
class PipelineRules:
    """What a pipeline's class and configs say about the requests it takes.

    Args:
        name: class name of the pipeline.
        transformer: config of its transformer.
        spatial, temporal: pixels and frames that one latent of its VAE stands for.
        image, last_image, true_cfg: whether its call takes a first frame, a last frame, classifier-free guidance apart.
        guidance_in_batch: whether both branches of guidance are one call of the transformer.
        transformers: names of its transformers.
    """

    name: str
    transformer: Mapping[str, Any]
    spatial: int
    temporal: int
    image: bool
    last_image: bool
    true_cfg: bool
    guidance_in_batch: bool
    transformers: tuple[str, ...]

    def patch(self) -> int:
        """Latents along a side that one token stands for."""
        size = self.transformer.get("patch_size") or 2
        return size[-1] if isinstance(size, (list, tuple)) else size

    def layers(self) -> int | None:
        """Attention layers of a transformer; None where its config leaves that to its class."""
        layers = self.transformer.get("num_layers")
        return None if layers is None else layers + (self.transformer.get("num_single_layers") or 0)

    def heads(self) -> int | None:
        """Attention heads of a layer; None where the config leaves that to its class."""
        return self.transformer.get("num_attention_heads")

    def tokens(self, request: GenerationRequest) -> tuple[int, int, int]:
        """Frames, height and width of a request's latent video, in tokens."""
        size = self.transformer.get("patch_size")
        stride = size[0] if isinstance(size, (list, tuple)) else self.transformer.get("patch_size_t") or 1
        frames = (request.num_frames - 1) // self.temporal + 1
        side = self.spatial * self.patch()
        return -(-frames // stride), request.height // side, request.width // side


def check_request(request: GenerationRequest, rules: PipelineRules) -> None:
    """Refuse a request that a pipeline would refuse, or would run wrongly.

    Args:
        request: what to generate.
        rules: of the pipeline.

    Raises:
        ValueError: a value breaks the pipeline's rule.
        TypeError: a value has the wrong type.
    """
    _check_types(request)
    if not request.prompt.strip():
        raise ValueError("prompt must not be empty")
    for field in ("height", "width", "num_frames", "steps", "fps"):
        if not 1 <= getattr(request, field) <= _MOST[field]:
            raise ValueError(f"{field} must be in [1, {_MOST[field]}], got {getattr(request, field)}")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {request.seed}")
    if not 0 <= request.guidance <= _MOST_GUIDANCE:
        raise ValueError(f"guidance must be in [0, {_MOST_GUIDANCE}], got {request.guidance}")
    _check_size(request, rules)
    _check_memory(request)
    _check_image(request, rules)
    _check_text(request, rules)


def check_flow_shift(flow_shift: Any) -> None:
    """Raise unless a scheduler's shift is None or a number it can have."""
    if flow_shift is None:
        return
    if isinstance(flow_shift, bool) or not isinstance(flow_shift, (int, float)):
        raise TypeError(f"flow_shift must be a number, got {shown(flow_shift)}")
    if not 0 < flow_shift <= _MOST_GUIDANCE:
        raise ValueError(
            f"flow_shift must be in (0, {_MOST_GUIDANCE}], got {flow_shift}: Wan's is 3 at 480p and 5 at 720p"
        )


def _check_types(request: GenerationRequest) -> None:
    for field in ("height", "width", "num_frames", "steps", "seed", "fps", "max_sequence_length"):
        value = getattr(request, field)
        if value is None and field == "max_sequence_length":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{field} must be an integer, got {shown(value)}")
    for field in ("prompt", "negative_prompt"):
        value = getattr(request, field)
        if not (isinstance(value, str) or (value is None and field == "negative_prompt")):
            raise TypeError(f"{field} must be text, got {shown(value)}")
    for field in ("guidance", "true_cfg"):
        value = getattr(request, field)
        if value is None and field == "true_cfg":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{field} must be a number, got {shown(value)}")
    for field in ("image", "last_image"):
        value = getattr(request, field)
        if value is not None and not isinstance(value, Image.Image):
            raise TypeError(f"{field} must be a PIL image, got {type(value).__name__}")


def _check_size(request: GenerationRequest, rules: PipelineRules) -> None:
    config = rules.transformer
    multiple = math.lcm(_SIDE, rules.spatial * rules.patch())
    for field in ("height", "width"):
        value = getattr(request, field)
        if value % multiple:
            below = max(value // multiple, 1) * multiple
            raise ValueError(
                f"{field} must be a multiple of {multiple} for this model, got {value}; "
                f"try {below} or {(value // multiple + 1) * multiple}"
            )
        if config.get("use_learned_positional_embeddings"):
            fixed = config[f"sample_{field}"] * rules.spatial
            if value != fixed:
                raise ValueError(f"{field} must be {fixed} for this model, got {value}")
    stride = rules.temporal
    if request.num_frames % stride != 1 % stride:
        below = (request.num_frames - 1) // stride * stride + 1
        raise ValueError(
            f"num_frames must be {stride}k + 1 for this model, got {request.num_frames}; "
            f"try {below} or {below + stride}"
        )


def _check_memory(request: GenerationRequest) -> None:
    needed = request.height * request.width * request.num_frames * _PIXEL_BYTES
    there = psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"height, width and num_frames must make a video that fits this machine's {there / 2**30:.0f} GiB of memory, got "
            f"{request.height} x {request.width} x {request.num_frames}, {needed / 2**30:.0f} GiB decoded: ask for less"
        )


def _check_image(request: GenerationRequest, rules: PipelineRules) -> None:
    if rules.image and request.image is None:
        raise ValueError(f"image must be given for {rules.name}, got none; pass the first frame")
    if not rules.image and request.image is not None:
        raise ValueError(
            f"image must be left out for {rules.name}, which is text-to-video; use an image-to-video model"
        )
    if not rules.last_image and request.last_image is not None:
        raise ValueError(
            f"last_image must be left out for {rules.name}, which takes none; use a Wan image-to-video model"
        )


def _check_text(request: GenerationRequest, rules: PipelineRules) -> None:
    length, config, true_cfg = request.max_sequence_length, rules.transformer, request.true_cfg
    if length is not None and not 1 <= length <= _MOST["max_sequence_length"]:
        raise ValueError(f"max_sequence_length must be in [1, {_MOST['max_sequence_length']}], got {length}")
    # Wan I2V splits its cross-attention context at the last 512 tokens, CogVideoX adds a table of this length.
    fixed = 512 if config.get("added_kv_proj_dim") else config.get("max_text_seq_length")
    if length is not None and fixed is not None and length != fixed:
        raise ValueError(f"max_sequence_length must be {fixed} for this model, got {length}; leave it out")
    if rules.true_cfg:
        if request.negative_prompt and true_cfg is None:
            raise ValueError(
                f"negative_prompt must be left out without true_cfg on {rules.name}, which would ignore it; "
                f"give true_cfg > 1 (twice the time)"
            )
        if true_cfg is not None and not (1 < true_cfg <= _MOST_GUIDANCE and request.negative_prompt is not None):
            raise ValueError(
                f"true_cfg must be in (1, {_MOST_GUIDANCE}] and come with a negative_prompt, got {true_cfg}"
            )
    elif true_cfg is not None:
        raise ValueError(f"true_cfg must be left out on {rules.name}, got {true_cfg}; use guidance")
