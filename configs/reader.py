"""YAML from strangers: bounded in length, depth, number of values and work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from svg.documents import read_text

BYTES, DEPTH, VALUES, DIGITS = 2**20, 32, 50_000, 100
# libyaml's where PyYAML has it: twenty times as fast.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXT = "tag:yaml.org,2002:str"


def read_yaml(path: str | Path, loader: type = LOADER) -> Any:
    """Read a YAML file of one document.

    Args:
        path: the file.
        loader: LOADER, or a class derived from it.

    Returns:
        Its content.

    Raises:
        ValueError: no plain file of text, longer than 1 MiB, nested or multiplied by aliases beyond the bounds, or a value
            that YAML has no reading of.
        yaml.YAMLError: not YAML.
        OSError: it is not there or cannot be read.
    """
    text = read_text(path, BYTES)
    _check_structure(text)
    reader = loader(text)
    try:
        node = reader.get_single_node()
        _check_scalars(node)
        return None if node is None else reader.construct_document(node)
    except (RecursionError, OverflowError) as error:
        raise ValueError("YAML must hold values that can be read, got one that cannot") from error
    finally:
        reader.dispose()


def _check_structure(text: str) -> None:
    """Count values as if aliases were written out, and levels, event by event: nothing is built before it is known to fit."""
    most = VALUES if LOADER is not yaml.SafeLoader else VALUES // 20
    sizes: dict[str, int] = {}  # values below each anchor
    total, open_anchors = 0, []  # (anchor, total when it began)
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"{_line(event)}alias *{event.anchor} must come after what it stands for")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_anchors.append((event.anchor, total))
            elif event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_anchors.pop()
            if anchor:
                sizes[anchor] = total - before + 1
        if len(open_anchors) > DEPTH:
            raise ValueError(f"{_line(event)}YAML must be nested at most {DEPTH} levels deep")
        if total > most:
            raise ValueError(f"{_line(event)}YAML must hold at most {most} values, those of aliases counted each time")


def _check_scalars(node: Any) -> None:
    """Numbers and dates of thousands of digits take minutes to read."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            if node.tag != _TEXT and len(node.value) > DIGITS:
                raise ValueError(f"{_line(node)}a value that is no text must have at most {DIGITS} characters")
        elif isinstance(node, yaml.MappingNode):
            pending += [part for pair in node.value for part in pair]
        else:
            pending += node.value


def _line(place: Any) -> str:
    return f"line {place.start_mark.line + 1}: "
