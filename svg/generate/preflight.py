"""What can be refused before torch is imported and before any weights are loaded or fetched."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace
from pathlib import Path

from svg.eval.files import check_folder
from svg.eval.lpips_backbones import BACKBONES
from svg.pipelines.linears_file import read_linears
from svg.pipelines.model_files import check_complete, locate_model, read_rules
from svg.pipelines.request import PipelineRules, check_request

from ..config import MethodConfig, NearConfig, SpargeConfig
from ..config.run import check_device_name
from ..config.tuned import check_tuned
from ..environment import version_problems
from .job import RESULTS, Job, inputs_of


def preflight(job: Job) -> None:
    """Check a job of `svg generate` and its folder.

    Args:
        job: what to do.

    Raises:
        ValueError, TypeError: what a run would refuse later, after minutes of loading.
    """
    check_folder("out", job.out, RESULTS, inputs_of(job))
    check_job(job)


def check_job(job: Job) -> None:
    """Check a job of any command against the JSON files of its model, and the files it names.

    Args:
        job: what to do.

    Raises:
        ValueError, TypeError: what a run would refuse later, after minutes of loading.
    """
    problems = version_problems()
    if problems:
        raise ValueError("; ".join(problems))
    check_device_name(job.device)
    if job.device == "cpu" and job.offload != "none":
        raise ValueError(f"offload must be none on device cpu, got {job.offload!r}; leave it out or use device cuda")
    source = locate_model(job.model)
    if job.revision is not None and isinstance(source, Path):
        raise ValueError(f"--revision must be left out for a directory, got {job.revision!r}; it is for hub ids")
    rules = read_rules(source, job.revision)
    check_request(job.request, rules)
    _check_split(job, rules)
    _check_size_for_lpips(job)
    _check_loras(job)
    if isinstance(source, Path):
        check_complete(source, job.variant)
    _check_method(job, rules)


def _check_split(job: Job, rules: PipelineRules) -> None:
    """Refuse a split of branches where a step has one call of the transformer."""
    if job.split != "branches":
        return
    if rules.guidance_in_batch:
        raise ValueError(
            f"--split must be sequence for {rules.name}, whose branches of guidance are one call, got branches"
        )
    name = "true_cfg" if rules.true_cfg else "guidance"
    found = getattr(job.request, name)
    if found is None or not found > 1:
        raise ValueError(
            f"--split branches must come with {name} above 1, got {found}: there is one branch; raise it, or split the sequence"
        )


def _check_method(job: Job, rules: PipelineRules) -> None:
    """Refuse settings that were made for another model: head tables, thresholds and layers' precisions."""
    layers, heads = rules.layers(), rules.heads()
    if layers is None or heads is None:
        return
    tuned = getattr(job.config, "tuned_for", None)
    device = tuned.device if tuned is not None and job.device != "cpu" else "cpu"  # a GPU's name is torch's to say
    for name in rules.transformers:
        check_tuned(job.config, name, layers, heads, rules.tokens(job.request), device)
        _check_files(job.config, name, layers, heads)
    if job.split == "sequence" and job.gpus > heads:
        raise ValueError(f"--gpus must be at most {heads}, the attention heads of {job.model}, got {job.gpus}")
    check_budgets(job.config, rules.tokens(job.request), job.request.steps)


def check_budgets(config: MethodConfig, tokens: tuple[int, int, int], steps: int) -> None:
    """Refuse budgets of near that a video this short cannot keep, text in the same sequence left out of account.

    Args:
        config: settings of any method.
        tokens: frames, height and width of the latent video, in tokens.
        steps: of the run.

    Raises:
        ValueError: the means alone are more than a step's budget.
    """
    if not isinstance(config, NearConfig) or math.prod(tokens) < config.min_tokens:
        return
    if config.warmup_noise is not None or config.head_budget is not None:
        return  # which steps are sparse is the scheduler's to say; heads of a table share what they have
    from ..engine.layout import TokenLayout
    from ..methods.near.plan import exact_share

    every_layer = replace(config, warmup_layers=0.0)
    sparse = [step for step in range(steps) if not every_layer.is_warmup(step, steps, 0, 1)]
    video = math.prod(tokens)
    for budget in sorted({config.at_step(step, steps, (video, video)).budget for step in sparse}):
        exact_share(budget, config, TokenLayout(*tokens))


def _check_files(config: MethodConfig, transformer: str, layers: int, heads: int) -> None:
    if config.linears_file is not None:
        read_linears(config.linears_file, transformer, config.linear_precision)
    sparse = [layer for layer in range(layers) if not config.is_warmup(1, 1, layer, layers)]
    if isinstance(config, SpargeConfig) and config.thresholds is not None:
        from ..methods.sparge.thresholds_file import check_thresholds

        check_thresholds(config.thresholds, transformer, sparse, heads, config.order, config.attention_sink)
    if (path := getattr(config, "layers", None)) is not None:
        from ..methods.sage.layers_file import choice

        for layer in sparse:
            choice(path, transformer, layer)


def _check_size_for_lpips(job: Job) -> None:
    smallest = BACKBONES[job.lpips].min_side if job.lpips in BACKBONES and (job.dense or job.control) else 0
    if min(job.request.height, job.request.width) < smallest:
        raise ValueError(
            f"height and width must be >= {smallest} for LPIPS ({job.lpips}), got {job.request.height} x "
            f"{job.request.width}: use a larger video or --lpips none"
        )


def _check_loras(job: Job) -> None:
    if job.loras and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora needs the package peft, which is not installed: pip install peft")
    for path, scale in job.loras:
        looks_local = path.endswith(".safetensors") or path.startswith((".", "/", "~"))
        if not path or (looks_local and not os.path.exists(os.path.expanduser(path))):
            raise ValueError(
                f"--lora must be an existing file or folder, or a hub id, got {path!r}, which does not exist"
            )
        if not math.isfinite(scale):
            raise ValueError(f"--lora must have a finite scale, got {path}={scale}")
