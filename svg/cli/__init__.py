"""The program `svg`: commands, and what they print. Nothing heavy is imported before a command runs."""

from .app import cli, main

__all__ = ["cli", "main"]
