"""What torch.compile leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable)


def not_compiled(function: F) -> F:
    """`torch.compiler.disable`, which hides a function's arguments from type checkers.

    Args:
        function: a function or a method.

    Returns:
        The same, run as it is wherever a compiled function calls it.
    """
    hidden: Any = torch.compiler.disable(function)
    return hidden
