"""A grid checked whole, before its models are read and its first cell runs."""

from __future__ import annotations

import dataclasses

from svg.pipelines.model_files import BUNDLED

from ..documents import shown
from ..generate.job import Job, read_image
from ..generate.preflight import check_job
from .grid import Grid, jobs_of
from .grid_file import GridError

_PICTURES = ("image", "last_image")


def check_grid(grid: Grid, device: str) -> None:
    """Refuse what any cell of a grid would be refused for: sizes, pictures, models, settings and the files they name.

    Args:
        grid: the grid.
        device: "cpu", "cuda" or "cuda:<index>".

    Raises:
        GridError: naming the argument, and the model and prompt of the cell.
    """
    for model in grid.models:
        jobs = jobs_of(grid, model, device)
        checked: set[tuple] = set()
        for prompt in grid.prompts:
            kind = (*map(prompt.get, _PICTURES), prompt.get("negative_prompt") is None)
            if kind in checked:
                continue  # what prompts say is checked when the grid is read
            checked.add(kind)
            for job in jobs:
                try:
                    check_job(_with_prompt(job, prompt))
                except (ValueError, TypeError, OSError) as error:
                    where = f"model {model['model'] or BUNDLED}, method {job.config.method}, prompt {shown(prompt['prompt'])}"
                    raise GridError(f"{error} (of the cells of {where})") from error


def _with_prompt(job: Job, prompt: dict[str, str | None]) -> Job:
    pictures = {name: read_image(path, name) for name in _PICTURES if (path := prompt.get(name)) is not None}
    texts = {"prompt": prompt["prompt"], "negative_prompt": prompt.get("negative_prompt")}
    return dataclasses.replace(job, request=dataclasses.replace(job.request, **texts, **pictures))
