"""The file of which linears run in 8 bits that `svg adapt-linears` writes: JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from svg.documents import MEBIBYTE, read_json, shown

FORMAT, VERSION = "svg-linears", 1
PRECISIONS = ("fp8", "int8-rows", "int8", "native")


def linears_content(choices: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds.

    Args:
        choices: {"precision", "error" of the 8-bit one, None where it was not measured} by transformer and linear.
        about: what they were measured with; JSON values.
    """
    return {"format": FORMAT, "version": VERSION, "about": dict(about), "transformers": choices}


def read_linears(path: str, transformer: str, precision: str = "auto") -> dict[str, str]:
    """A transformer's linears that a file puts in 8 bits, each with the precision that it was measured in: one for all.

    Args:
        path: the file.
        transformer: name of the transformer in its pipeline.
        precision: what they are to run in; "auto": whatever the file says.

    Raises:
        ValueError: no such file, or not one of linears, or of another version, without this transformer, or measured in
            another precision.
    """
    if not os.path.isfile(path):
        raise ValueError(f"linears must be a file, got {path}, which is not there; make one with `svg adapt-linears`")
    content = read_json(path, 16 * MEBIBYTE)
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} must say which linears ({FORMAT}, version {VERSION}), got {found[0]}, {found[1]}")
    try:
        choices = {name: choice["precision"] for name, choice in content["transformers"][transformer].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold a precision for every linear of {transformer}, as `svg adapt-linears` writes it"
        ) from error
    if unknown := [one for one in choices.values() if one not in PRECISIONS]:
        raise ValueError(f"{path}: precision must be one of {', '.join(PRECISIONS)}, got {shown(unknown[0])}")
    found = {name: one for name, one in choices.items() if one != "native"}
    if others := sorted(set(found.values()) - {next(iter(found.values()), "") if precision == "auto" else precision}):
        wanted = "one precision for all linears" if precision == "auto" else f"linear_precision {precision}"
        raise ValueError(
            f"{path} must be measured in {wanted}, got {others[0]}: leave linear_precision out, or make the file again with "
            f"`svg adapt-linears`"
        )
    return found
