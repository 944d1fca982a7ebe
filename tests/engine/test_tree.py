"""Values taken apart and put together again."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from svg.engine.layout import TokenLayout
from svg.engine.tree import fresh, put_together, take_apart


class Pair(NamedTuple):
    left: object
    right: object


@dataclass(frozen=True)
class Box:
    content: object
    found: list = field(default_factory=list, init=False)


def test_a_value_comes_back_with_other_tensors_in_place():
    x, y = torch.zeros(2), torch.ones(3)
    box = Box(x)
    box.found.append(y)
    value = {
        "pair": Pair(x, (1, "a")),
        "box": box,
        "size": torch.Size([1, 2]),
        "none": None,
        "layout": TokenLayout(1, 2, 3),
    }
    tensors = []
    shape = take_apart(value, tensors)
    assert len(tensors) == 2 and tensors[0] is x and tensors[1] is y  # each once
    hash(shape)
    other = [torch.full((2,), 5.0), torch.full((3,), 6.0)]
    found = put_together(shape, other)
    assert found["pair"].left is other[0] and found["box"].content is other[0] and found["box"].found[0] is other[1]
    assert (
        found["pair"].right == (1, "a") and found["size"] == torch.Size([1, 2]) and found["layout"] == value["layout"]
    )
    assert type(found["size"]) is torch.Size and type(found["box"]) is Box


def test_shapes_differ_where_values_or_places_do():
    x, y = torch.zeros(2), torch.zeros(2)
    assert take_apart((x, x), []) != take_apart((x, y), [])
    assert take_apart({"a": 1}, []) != take_apart({"a": 2}, [])
    assert take_apart((x, y), []) == take_apart((y, x), [])


def test_a_fresh_tensor_has_the_strides_of_a_view():
    x = torch.zeros(2, 5, 3, 4).transpose(1, 2)[:, :, 1:]
    made = fresh(x)
    assert made.shape == x.shape and made.stride() == x.stride()
    assert fresh(torch.zeros(0, 3)).shape == (0, 3)
