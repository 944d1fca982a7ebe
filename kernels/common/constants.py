"""Tensors that are made once and kept."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

F = TypeVar("F", bound=Callable[..., Any])


def constant(maxsize: int | None = None) -> Callable[[F], F]:
    """`functools.lru_cache` for what holds tensors: they are real ones, which autograd may see, whoever asks first.

    Args:
        maxsize: as `lru_cache` takes it.

    Example:
        @constant(maxsize=4)
        def ramp(length: int, device: torch.device) -> torch.Tensor:
            return torch.arange(length, device=device)
    """

    def wrap(make: F) -> F:
        @lru_cache(maxsize=maxsize)
        @wraps(make)
        def outside_of_modes(*args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode(False), unset_fake_temporarily():
                return make(*args, **kwargs)

        kept: Any = outside_of_modes
        return kept

    return wrap
