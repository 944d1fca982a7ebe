"""Where the video and the text are in a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..documents import shown

TEXT_POSITIONS = ("none", "first", "last")


@dataclass(frozen=True)
class TokenLayout:
    """A video grid in frame-major order, with the text tokens before it, after it or apart.

    Args:
        frames: latent frames after patching, >= 1.
        height: token rows of a frame, >= 1.
        width: token columns of a frame, >= 1.
        text_tokens: text tokens in the same sequence, padding included; 0 if text is apart.
        text_position: "none" (text apart), "first" or "last".

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is not positive, or text_tokens and text_position contradict each other.
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text_position: str = "none"

    def __post_init__(self):
        for name in ("frames", "height", "width", "text_tokens"):
            value = getattr(self, name)
            # torch.compile's sizes are integers too; tensors and arrays have an index, but are none.
            if isinstance(value, bool) or not hasattr(value, "__index__") or hasattr(value, "shape"):
                raise TypeError(f"{name} must be an integer, got {shown(value)}")
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not isinstance(self.text_position, str) or self.text_position not in TEXT_POSITIONS:
            raise ValueError(
                f"text_position must be one of {', '.join(TEXT_POSITIONS)}, got {shown(self.text_position)}"
            )
        if self.text_tokens < 0 or (self.text_tokens > 0) != (self.text_position != "none"):
            raise ValueError(
                f"text_tokens must be 0 with text_position 'none' and >= 1 otherwise, "
                f"got {self.text_tokens} with {self.text_position!r}"
            )

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def total_tokens(self) -> int:
        return self.video_tokens + self.text_tokens

    @property
    def video_slice(self) -> slice:
        start = self.text_tokens if self.text_position == "first" else 0
        return slice(start, start + self.video_tokens)

    @property
    def text_slice(self) -> slice:
        start = 0 if self.text_position == "first" else self.video_tokens
        return slice(start, start + self.text_tokens)
