"""`svg page`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import click

from svg.eval.names import METRICS

from .panels import Command


@click.command(cls=Command)
@click.argument("folder", type=click.Path())
@click.option("--plots", is_flag=True, help="Also write pareto.png and pareto.svg (needs matplotlib).")
@click.option("--metric", default="psnr", show_default=True, help=f"Of the plots: {', '.join(METRICS)}.")
def page(folder: str, plots: bool, metric: str) -> None:
    """Build report.html in FOLDER, the results of a run or a sweep, to look at in a browser, offline too.

    Players, plots, heat maps and a table, in one file beside the videos. A sweep may still be running.

    \b
    Example:
      svg page svg-out
    """
    from svg.eval.page import build_page
    from svg.eval.page.plots import check_metric, write_plots

    check_metric(metric)
    paths = [build_page(folder), *(write_plots(folder, metric) if plots else [])]
    click.echo(f"written: {', '.join(map(str, paths))}")
