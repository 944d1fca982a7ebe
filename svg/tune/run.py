"""`svg tune`: measure heads or layers, spend a budget on them, search for the target on videos, verify on videos never seen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from svg.eval.files import to_json, write_json
from svg.eval.page import build_page
from svg.kernels.common import target
from svg.pipelines.fingerprint import fingerprint

from ..config.base import count
from ..environment import versions
from ..generate.job import Job
from ..sweep.journal import Journal
from ..sweep.run import Display, now
from .allocate import Problem, fit_cost, uniform_cost, weights_of
from .calibrate import is_fixed
from .curves import MEASURED, curves_of, probed_level
from .levels import levels_for
from .lines import (
    Line,
    Steps,
    dense_steps,
    dense_steps_to_try,
    one_budget_line,
    others_to_try,
    refreshes_to_try,
    sharing,
    table_line,
    with_other,
)
from .preset import write_preset
from .reach import Reach, Trial, cost_at
from .search import Target
from .video_trials import KeptPool, Stage

VERSION = 1
PRESET = "tuned.yaml"


class TuneDisplay(Display, Protocol):
    """Where a tuning tells how far it is: as a sweep, and by stages."""

    def stage(self, text: str) -> None:
        """A new stage begins."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to tune, validated.

    Args:
        job: model, size and the method's settings that stay.
        prompts: what heads are measured on and the target is searched on.
        held_out: what the result is verified on.
        seeds: of the noise; heads are measured with the first one.
        target: what to reach.
        steps: indices of the steps that are measured; None: three of the sparse ones.
        probe: "heads", "layers" or "none", see `svg.tune.calibrate`.
        rounds: settings of each family, and number of dense steps, that are tried on videos in one search.
        control: whether held-out videos get a control.
        budgets: "heads" for one of each head, "layers" of each layer, or "one" for all, of which only the dense steps
            are tuned.
        keep_warmup: whether the config's dense steps stay as they are; else fewer are tried.
        keep_refresh: whether `refresh` stays as it is; else more calls that share a map are tried.
        keep_granule: whether `granule`, which `near` has, stays as it is; else larger ones are tried.
        keep_precision: whether dense steps keep their precision; else near's 8 bits are tried, on a GPU that has FP8.

    Raises:
        ValueError: prompts missing or in both sets, a step out of range, nothing that could be sparse, or a probe of heads
            whose budgets are not their own.
    """

    job: Job
    prompts: list[str]
    held_out: list[str]
    seeds: list[int]
    target: Target
    steps: list[int] | None
    probe: str
    rounds: int
    control: bool
    budgets: str = "heads"
    keep_warmup: bool = False
    keep_refresh: bool = False
    keep_granule: bool = False
    keep_precision: bool = False

    def __post_init__(self):
        config, total = self.job.config, self.job.request.steps
        for name, prompts in (("prompt", self.prompts), ("held-out", self.held_out)):
            if not prompts or len(set(prompts)) < len(prompts) or not all(prompt.strip() for prompt in prompts):
                raise ValueError(f"--{name} must give at least one prompt, none twice and none empty, got {prompts}")
        if not self.seeds or not all(0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError(f"--seeds must be in [0, 2**63), got {self.seeds}")
        both = set(self.prompts) & set(self.held_out)
        if both:
            raise ValueError(
                f"--held-out must be prompts that are not in --prompt, got {', '.join(sorted(both))} in both"
            )
        if config.warms_up_by_noise(total):
            raise ValueError(
                f"warmup_noise, and few_steps_noise in so few steps, must be left out of a tuning of {total} steps: give "
                f"warmup_steps"
            )
        if not self.sparse_steps:
            raise ValueError(f"warmup_steps must leave a step of {total} sparse, got {config.warmup_steps}: lower it")
        if not set(self.measured_steps) <= set(self.sparse_steps):
            raise ValueError(
                f"--tune-steps must be among the sparse steps, {self.sparse_steps[0]} to {total - 1}, got {self.steps}"
            )
        if self.probe == "heads" and self.budgets != "heads":
            raise ValueError(
                f"--probe must be layers or none with --budgets {self.budgets}, got heads: or take --budgets heads"
            )
        if getattr(config, "tuned_for", None) is not None or getattr(config, str(config.head_field)) is not None:
            raise ValueError(
                f"--preset must have no per-head budgets yet, got {self.job.preset}: start from an untuned one"
            )

    @property
    def sparse_steps(self) -> list[int]:
        """Steps in which layers may be sparse."""
        config, total = dataclasses.replace(self.job.config, warmup_layers=0.0), self.job.request.steps
        return [step for step in range(total) if not config.is_warmup(step, total, 0, 1)]

    @property
    def measured_steps(self) -> list[int]:
        """Steps that are measured: those given, or one after a sixth, a half and five sixths of the sparse ones."""
        there = self.sparse_steps
        return (
            self.steps if self.steps is not None else sorted({there[(2 * i + 1) * len(there) // 6] for i in range(3)})
        )


class Tuner:
    """One tuning and its folder; whatever is done is journalled, and the same command goes on.

    Args:
        plan: what to tune.
        out: the folder.
        device: the resolved device, such as "cuda:0".
        dtype: "bf16", "fp16" or "fp32".
        command: what the results say they came from.
        display: told how far it is.
    """

    def __init__(self, plan: Plan, out: Path, device: str, dtype: str, command: str, display: TuneDisplay):
        self._plan, self._out, self._device = plan, Path(out), device
        self._command, self._display = command, display
        self._pool: KeptPool | None = None
        self._config, self._on_gpu = plan.job.config, device.startswith("cuda")
        self._levels = levels_for(plan.job)
        self._place = {"mark": fingerprint(plan.job.model), "device": device.split(":")[0], "dtype": dtype}
        self._notes: list[str] = []
        self._trials: list[dict[str, Any]] = []
        self._search = self._stage(self._out / "search", plan.prompts, control=False)
        self._verify = self._stage(self._out, plan.held_out, control=plan.control)

    def run(self) -> dict[str, Any]:
        """Do it all.

        Returns:
            tune.json.

        Raises:
            ValueError, OSError: bad input, a video that cannot be generated, or a folder that cannot be written to.
            JournalError: the folder is in use, or of another version.
        """
        plan = self._plan
        try:
            found = self._calibrations()
            try:
                problem = self._problem(found)
            except (LookupError, TypeError, AttributeError) as error:
                place = self._out / "curves" / "journal"
                raise ValueError(
                    f"{place} must hold what svg tune measured, got {error!r}: remove it to measure again"
                ) from error
            own = Steps(plan.job.request.steps, count(self._config.warmup_steps, plan.job.request.steps))
            start = own.whole(uniform_cost(problem, getattr(self._config, str(self._config.budget_field))))
            uniform = one_budget_line(problem, self._config, own, "uniform")
            reach = Reach(plan.target, plan.rounds, self._searched, self._verified, self._cost, self._display.stage)
            others = (partial(self._lines_of_another, name) for name in self._config.tuned_too)
            stages = (self._sharing_lines, self._lines_of_fewer_dense_steps, *others)
            more = (partial(stage, problem) for stage in stages)
            tuned = self._tuned_line(problem, own, getattr(self._config, "refresh", None))
            best = {"tuned": reach.best([tuned], start, *more), "uniform": reach.best([uniform], start)}
            equal = self._at_equal_cost(uniform, best["tuned"][0])
        finally:
            if self._pool is not None:
                self._pool.end()
        result = self._result(found, problem, best, equal)
        write_json(self._out / "tune.json", result)
        for folder in (self._out / "search", self._out):
            build_page(folder)
        return result

    def _calibrations(self) -> list[dict[str, Any]]:
        """What heads or layers lose on every prompt, measured or read from the journal."""
        journal, plan, found = Journal(self._out / "curves", VERSION), self._plan, []
        with journal.locked():
            records, notes = journal.read()
            self._notes += notes
            whose = "heads" if plan.budgets == "heads" else "layers"  # one for all is spent by layers, too
            options = {"levels": self._levels, "steps": plan.measured_steps, "probe": plan.probe, "budgets": whose}
            cells = [cell for cell in self._search.dense if cell.generation["seed"] == plan.seeds[0]]
            for number, cell in enumerate(cells, 1):
                name = _digest({**options, "cell": cell.id, "method": self._config.to_dict(), "measured": MEASURED})
                if name not in records:
                    self._display.stage(f"measuring {whose} on prompt {number} of {len(cells)}")
                    record = to_json(self._worker().calibrate(cell, self._config, **options))
                    journal.write(name, record, [])
                    records[name] = record
                found.append(records[name])
        return found

    def _problem(self, found: list[dict[str, Any]]) -> Problem:
        rows, effects, dense = ([x for one in found for x in one[key]] for key in ("rows", "effects", "dense_seconds"))
        num_layers = found[0]["num_layers"]
        curves = curves_of(rows, self._levels, num_layers, self._plan.budgets)
        cost, notes = fit_cost(rows, dense, self._on_gpu)
        cost = dataclasses.replace(cost, per_density=cost.per_density * curves.heads)
        self._notes += notes
        free = np.array([not is_fixed(self._config, layer, num_layers) for layer in range(num_layers)])
        return Problem(curves, weights_of(curves, effects, probed_level(self._config, self._levels)), cost, free)

    def _sharing_lines(self, problem: Problem, best: Line) -> list[Line]:
        """Lines where more calls share a map."""
        steps = Steps(self._plan.job.request.steps, best.dense_steps)
        numbers = [] if self._plan.keep_refresh else refreshes_to_try(problem, self._config, steps)
        return [self._tuned_line(problem, steps, calls) for calls in numbers]

    def _lines_of_fewer_dense_steps(self, problem: Problem, best: Line) -> list[Line]:
        """Lines with fewer dense steps, where as many calls share a map."""
        total = self._plan.job.request.steps
        numbers = dense_steps_to_try(self._config, total, self._plan.keep_warmup)[1:]
        return [self._tuned_line(problem, Steps(total, number), best.refresh) for number in numbers]

    def _lines_of_another(self, name: str, problem: Problem, best: Line) -> list[Line]:
        """Lines with another value of a setting that the method has tuned too, for as many dense steps and shared maps."""
        if name in self._kept or (name == "warmup_precision" and not best.dense_steps):
            return []
        line = self._tuned_line(problem, Steps(self._plan.job.request.steps, best.dense_steps), best.refresh)
        for other in best.others:
            line = with_other(line, *other)
        return [with_other(line, name, value) for value in others_to_try(self._config, name)]

    @property
    def _kept(self) -> set[str]:
        """Settings that are not tuned too: those asked for, and 8 bits in dense steps where the device has no FP8."""
        plan = self._plan
        kept = {"granule"} if plan.keep_granule else set()
        fast = self._on_gpu and target.has_fp8(torch.device(self._device))
        return kept if fast and not plan.keep_precision else {*kept, "warmup_precision"}

    def _tuned_line(self, problem: Problem, steps: Steps, refresh: int | None) -> Line:
        config = self._config
        if refresh is not None and refresh != getattr(config, "refresh", None):
            problem, config = sharing(problem, config, refresh)
        if self._plan.budgets == "one":
            return one_budget_line(problem, config, steps, "tuned")
        return table_line(problem, config, steps)

    def _searched(self, line: Line, spent: float) -> Trial:
        return self._try(self._search, line, spent)

    def _verified(self, line: Line, spent: float) -> Trial:
        return self._try(self._verify, line, spent)

    def _try(self, stage: Stage, line: Line, spent: float) -> Trial:
        """One setting on a stage's videos: what it reaches and costs."""
        config = line.config(spent)
        budget = f"{config.budget_field}={getattr(config, str(config.budget_field)):g}"
        label = f"{config.method} {line.family} " + (f"{spent:.4f}" if config.head_budgets(0) else budget)
        if line.family == "tuned":
            label += f", {line}"
        cells, dense = stage.try_out(config, label)
        trial = {
            "family": line.family,
            "label": label,
            "videos": "held-out" if stage is self._verify else "search",
            "dense_steps": line.dense_steps,
            "refresh": line.refresh,
            **dict(line.others),
            "spent": spent,
            "value": self._plan.target.of(cells, dense, self._on_gpu),
            "density": _mean([cell["density"]["all_calls"] for cell in cells]),
            "attention_seconds": _least_seconds(cells),
            "dense_attention_seconds": _least_seconds(dense),
            "psnr": _mean([float(cell["quality"]["psnr"]["mean"]) for cell in cells]),
            "lpips": _mean([cell["quality"]["lpips"]["mean"] for cell in cells]),
            "config": config.to_dict(),
        }
        self._trials.append({key: value for key, value in trial.items() if key != "config"})
        return trial

    def _at_equal_cost(self, uniform: Line, tuned: Trial) -> Trial | None:
        """One value for all heads that costs what the tuned budgets cost, on the same videos; None where none does."""
        if "spent" not in tuned:
            return None
        if tuned["spent"] < uniform.bounds[0]:
            self._notes.append(
                f"one budget for all heads after {dense_steps(uniform.dense_steps)} costs more than the tuned ones at any level"
            )
            return None
        self._display.stage("trying one budget for all heads at equal cost")
        wanted = tuned["spent"]
        for _ in range(2):
            there = self._verified(uniform, wanted)
            ratio = self._cost(tuned) / self._cost(there)
            if abs(ratio - 1) < 0.02:
                break
            wanted = min(
                max(wanted * ratio, uniform.bounds[0]), uniform.bounds[1]
            )  # curves are of other videos, and of dense ones
        return there

    def _cost(self, trial: dict[str, Any]) -> float:
        return trial["attention_seconds"] if self._on_gpu else trial["density"]

    def _result(
        self,
        found: list[dict[str, Any]],
        problem: Problem,
        best: dict[str, tuple[Trial, list[Trial]]],
        equal: Trial | None,
    ) -> dict[str, Any]:
        tuned, uniform = (best[name][0] for name in ("tuned", "uniform"))
        at_target = self._at_target({name: trials for name, (_, trials) in best.items()}, equal)
        costs: Any = [at_target[name] for name in ("tuned", "uniform")]
        winner = self._winner(tuned, uniform)
        tokens, device = tuple(found[0]["tokens"]), found[0]["device"]
        preset = None
        if winner is not None:
            preset = write_preset(
                self._out / PRESET, self._plan.job, winner["config"], tokens, device, self._source(winner)
            )
        curves = problem.curves
        return {
            "format": "svg-tune",
            "version": VERSION,
            "state": "missed" if winner is None else "finished",
            "command": self._command,
            "updated": now(),
            "versions": versions(),
            "target": dataclasses.asdict(self._plan.target),
            "method": self._config.to_dict(),
            "budgets": self._plan.budgets,
            "model": {"name": self._plan.job.model, "fingerprint": self._place["mark"]},
            "tokens": tokens,
            "device": device,
            "prompts": {"search": self._plan.prompts, "held-out": self._plan.held_out},
            "measured_steps": self._plan.measured_steps,
            "steps": self._plan.job.request.steps,
            "cost": dataclasses.asdict(problem.cost),
            "levels": curves.levels,
            "density": curves.density.tolist(),
            "error": curves.error.tolist(),
            "weight": problem.weight.tolist(),
            "tuned": tuned,
            "uniform": uniform,
            "uniform_at_equal_cost": equal,
            "saved": 1 - self._cost(tuned) / self._cost(uniform) if tuned["met"] and uniform["met"] else None,
            "cost_at_target": at_target,
            "saved_at_equal_quality": None if None in costs else 1 - costs[0] / costs[1],
            "winner": winner and winner["family"],
            "preset": preset and preset.name,
            "trials": self._trials,
            "notes": self._notes,
        }

    def _at_target(self, trials: dict[str, list[Trial]], equal: Trial | None) -> dict[str, float | None]:
        """What each family costs exactly at the target, on the held-out videos; None where that is not between trials."""
        if not self._plan.target.rises:
            return {"tuned": None, "uniform": None}
        trials = {**trials, "uniform": [*trials["uniform"], *filter(None, [equal])]}
        costs = {
            name: cost_at(self._plan.target, [(one["value"], self._cost(one)) for one in tried])
            for name, tried in trials.items()
        }
        for name in [name for name, cost in costs.items() if cost is None]:
            self._notes.append(
                f"no saving at equal quality: the target is not between two held-out trials of {name} budgets"
            )
        return costs

    def _winner(self, tuned: dict[str, Any], uniform: dict[str, Any]) -> dict[str, Any] | None:
        met = [one for one in (tuned, uniform) if one["met"]]
        if not met:
            self._notes.append(
                "the target was not reached on the held-out videos: no preset was written; try more --rounds"
            )
            return None
        rises = self._plan.target.rises
        # A speed-up asks for the best video, a quality for the least cost.
        best = min(met, key=self._cost) if rises else max(met, key=lambda one: one["psnr"])
        if best is uniform:
            lost = "cost more than" if tuned["met"] else "missed the target and lost to"
            self._notes.append(
                f"what was tuned {lost} one budget for all heads after the method's own dense steps: the preset holds that one"
            )
        return best

    def _source(self, winner: dict[str, Any]) -> str:
        steps, total = dense_steps(winner["dense_steps"]), self._plan.job.request.steps
        budgets = "one budget"
        if winner["config"].get(str(self._config.head_field)) is not None:
            budgets = f"budgets of {self._plan.budgets}"
        shared = f", refresh {winner['refresh']}" if (winner["refresh"] or 1) > 1 else ""
        shared += "".join(f", {name} {winner[name]}" for name in self._config.tuned_too if name in winner)
        return (
            f"`svg tune` on {now()[:10]}, {self._plan.target}: {winner['value']:.4g} on held-out prompts "
            f"({len(self._plan.held_out)}) at density {winner['density']:.3f}, {budgets} after {steps} of {total}{shared}. "
            f"{self._command}"
        )

    def _stage(self, out: Path, prompts: list[str], control: bool) -> Stage:
        header = {"command": self._command, "lpips": self._plan.job.lpips}
        common = (self._place, header, self._worker, self._display)
        return Stage(out, self._plan.job, prompts, self._plan.seeds, control, *common)

    def _worker(self) -> KeptPool:
        if self._pool is None:
            self._pool = KeptPool(self._device)
        return self._pool


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _least_seconds(cells: list[dict[str, Any]]) -> float | None:
    """Of attention: the work is the same for every video, and what else the machine did makes a time longer only."""
    return min((one for cell in cells if (one := cell["seconds"]["attention"]) is not None), default=None)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
