"""Which levels of a budget a tuning measures: those that its video's size allows."""

from __future__ import annotations

import dataclasses
import math

from svg.pipelines.model_files import locate_model, read_rules

from ..generate.job import Job
from ..generate.preflight import check_budgets
from .calibrate import is_fixed


def levels_for(job: Job) -> tuple[float, ...]:
    """Levels of the method's budget that heads can be measured at, known from the model's JSON files alone.

    Args:
        job: model, size and the method's settings that stay.

    Returns:
        The method's levels without those that are too low for so short a video, the last one 1.

    Raises:
        ValueError: warm-up keeps every layer dense, the video is shorter than `min_tokens`, or no level fits the size.
    """
    rules, config = read_rules(locate_model(job.model), job.revision), job.config
    layers = rules.layers()
    if layers is not None and all(is_fixed(config, layer, layers) for layer in range(layers)):
        raise ValueError(f"warmup_layers must leave a layer of {layers} sparse, got {config.warmup_layers}: lower it")
    tokens = math.prod(rules.tokens(job.request))
    if tokens < config.min_tokens:
        raise ValueError(
            f"min_tokens must be at most the video's {tokens:,} tokens, got {config.min_tokens:,}: all its attention is "
            f"dense, and there is nothing to tune; lower it, or take a larger video"
        )

    def check(level: float) -> None:
        at_level = dataclasses.replace(config, warmup_steps=0.0, **{str(config.budget_field): level})
        check_budgets(at_level, rules.tokens(job.request), job.request.steps)

    def fits(level: float) -> bool:
        try:
            check(level)
        except ValueError:
            return False
        return True

    levels = tuple(level for level in config.levels if fits(level))
    if len(levels) > 1:
        return levels
    try:
        check(config.levels[-2])
    except ValueError as error:
        size = f"{job.request.num_frames} x {job.request.height} x {job.request.width}"
        raise ValueError(
            f"frames, height and width must give {config.method} more to tune, got {size}: {error}"
        ) from error
    return levels
