"""`svg models`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from typing import Any

import click

from .panels import Command

HEADINGS = ("transformer", "layout", "pipelines", "weights", "tested")


@click.command(cls=Command)
@click.option("--markdown", is_flag=True, help="Print the table of docs/models.md.")
def models(markdown: bool) -> None:
    """List the transformer classes that can be accelerated, and those that are refused, with the reason.

    \b
    Example:
      svg models
    """
    from svg.pipelines.registry import supported_models

    rows = supported_models()
    if markdown:
        click.echo(markdown_table(rows), nl=False)
        return
    for row in rows:
        click.echo(f"{row['transformer']:<42} {row['layout'] or '-':<24} {row['tested']}")


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/models.md.

    Args:
        rows: of `svg.supported_models()`.

    Returns:
        Markdown.
    """
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for row in rows:
        names = (", ".join(f"`{name}`" for name in row[key]) for key in ("pipelines", "hub"))
        lines.append((f"`{row['transformer']}`", row["layout"], *names, row["tested"]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
