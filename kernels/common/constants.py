"""Tensors that are made once and kept."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

P, R = ParamSpec("P"), TypeVar("R")


def constant(maxsize: int | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`functools.lru_cache` for what holds tensors: they are real ones, which autograd may see, whoever asks first.

    Args:
        maxsize: as `lru_cache` takes it.

    Example:
        @constant(maxsize=4)
        def ramp(length: int, device: torch.device) -> torch.Tensor:
            return torch.arange(length, device=device)
    """

    def wrap(make: Callable[P, R]) -> Callable[P, R]:
        @wraps(make)
        def outside_of_modes(*args: P.args, **kwargs: P.kwargs) -> R:
            with torch.inference_mode(False), unset_fake_temporarily():
                return make(*args, **kwargs)

        return lru_cache(maxsize=maxsize)(outside_of_modes)

    return wrap
