"""YAML that knows the line of every key, so that a typo is named with its line."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import yaml

from svg.configs.reader import LOADER, read_yaml

from ..documents import shown

_LONGEST = 40  # letters of a key that are compared with what it might have been


class GridError(ValueError):
    """A grid's file has an error, named with its line."""


class Mapping(dict):
    """A YAML mapping that remembers where its keys stand.

    Attributes:
        line: line of the mapping, from 1; 0 where there is no file.
        lines: line of each key.
    """

    line = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lines: dict[str, int] = {}

    def where(self, key: str | None = None) -> str:
        """ "line 7: ", or nothing where there is no file."""
        line = self.line if key is None else self.lines.get(key, self.line)
        return f"line {line}: " if line else ""

    def check(self, name: str, choices: list[str]) -> None:
        """Refuse keys that are not among `choices`.

        Raises:
            GridError: naming the line, the key, the nearest choice and all of them.
        """
        for key in self:
            if key not in choices:
                near = difflib.get_close_matches(str(key)[:_LONGEST], choices, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise GridError(
                    f"{self.where(key)}unknown key {shown(key)} in {name}: {hint}choose from {', '.join(choices)}"
                )


class _Loader(LOADER):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Mapping:
    mapping = Mapping()
    mapping.line = node.start_mark.line + 1
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise GridError(f"line {line}: a key must be text, got {shown(key)}")
        if key in mapping:
            raise GridError(f"line {line}: key {shown(key)} is there twice, first in line {mapping.lines[key]}")
        mapping.lines[key] = line
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_mapping(path: str | Path) -> Mapping:
    """Read a YAML file that holds one mapping.

    Args:
        path: the file.

    Returns:
        The mapping; mappings inside it are Mappings too.

    Raises:
        GridError: no such file, no valid YAML, a key twice, or no mapping.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise GridError(f"the grid must be a YAML file, got {path}, which is not there")
    try:
        content = read_yaml(path, _Loader)
    except GridError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise GridError(f"{line}not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise GridError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise GridError(f"line 1: the file must hold keys and values, got {shown(content)}")
    return content
