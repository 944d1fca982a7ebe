"""Values that hold tensors, taken apart and put together: what a captured call reads and leaves."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """A tensor's place in the list of a tree's tensors."""

    index: int


class Node(NamedTuple):
    """A container: its type, the names of what it holds where it has names, and what it holds."""

    kind: type
    names: tuple
    parts: tuple


def take_apart(value: Any, tensors: list[Tensor]) -> Any:
    """A value's shape, hashable where all that is no tensor in it is; its tensors go to the end of a list, each once.

    Args:
        value: tensors in dicts, lists, tuples, NamedTuples and dataclasses, and slices; all else is kept as it is.
        tensors: the list; a tensor that is there already is not added again.

    Returns:
        What `put_together` takes back.
    """
    if isinstance(value, Tensor):
        for index, known in enumerate(tensors):
            if known is value:
                return Slot(index)
        tensors.append(value)
        return Slot(len(tensors) - 1)
    if isinstance(value, dict):
        return Node(dict, tuple(value), tuple(take_apart(part, tensors) for part in value.values()))
    if isinstance(value, (list, tuple)):
        return Node(type(value), (), tuple(take_apart(part, tensors) for part in value))
    if isinstance(value, slice):  # which has no hash
        return Node(slice, (), (value.start, value.stop, value.step))
    if dataclasses.is_dataclass(value) and holds_tensor(value):
        names = tuple(one.name for one in dataclasses.fields(value))
        return Node(type(value), names, tuple(take_apart(getattr(value, name), tensors) for name in names))
    return value


def put_together(shape: Any, tensors: list[Tensor]) -> Any:
    """The value of a shape with other tensors in the places of those that it was taken apart with."""
    if isinstance(shape, Slot):
        return tensors[shape.index]
    if not isinstance(shape, Node):
        return shape
    parts = [put_together(part, tensors) for part in shape.parts]
    if shape.kind is dict:
        return dict(zip(shape.names, parts))
    if shape.kind is list:
        return parts
    if shape.kind is slice:
        return slice(*parts)
    if issubclass(shape.kind, tuple):
        return shape.kind(*parts) if hasattr(shape.kind, "_fields") else shape.kind(parts)
    made = object.__new__(shape.kind)  # frozen ones, and fields that no constructor takes
    for name, part in zip(shape.names, parts):
        object.__setattr__(made, name, part)
    return made


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor in a value."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(map(holds_tensor, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_tensor, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(holds_tensor(getattr(value, one.name)) for one in dataclasses.fields(value))
    return False


def like(tensors: list[Tensor]) -> tuple:
    """What two lists of tensors must have in common for one captured call to serve both: hashable."""
    return tuple((x.shape, x.stride(), x.dtype) for x in tensors)


def once(x: Tensor) -> Tensor:
    """A tensor without the repeats of expanded dimensions, which cannot be written to."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def fresh(x: Tensor) -> Tensor:
    """A tensor of the same strides that holds nothing yet, in memory of its own."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) if x.numel() else 0
    return torch.empty(size, dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride())
