"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ..methods.registry import method_flags


def method_options(command: Callable) -> Callable:
    """A flag for every setting that has one of its own."""
    for name, (kind, text) in reversed(method_flags().items()):
        read = click.Path() if kind is Path else kind
        command = click.option(f"--{name.replace('_', '-')}", type=read, help=text)(command)
    return command
