"""One dense run that tells what heads lose, what calls cost, and how much a loss matters to the model's prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from svg.pipelines import GenerationRequest, StepProgress, accelerate, generate, restore
from svg.pipelines.attach import attached, transformers_of

from ..config import DenseConfig, MethodConfig
from ..engine.records import ObservedAttention
from ..engine.state import RunState, device_name
from ..recordings.record import RecordedCall
from .curves import Handed, bare, measure_call, probed_level, row_of

PROBES = ("heads", "layers", "none")


def calibrate(
    pipe: Any,
    request: GenerationRequest,
    config: MethodConfig,
    levels: tuple[float, ...],
    steps: list[int],
    probe: str,
    on_step: Callable[[StepProgress], None],
    budgets: str = "heads",
) -> dict[str, Any]:
    """Run a pipeline dense and measure every layer in chosen steps, both branches.

    Args:
        pipe: a Diffusers pipeline of a supported class; it is plain afterwards.
        request: what to generate.
        config: settings of the method that is tuned.
        levels: values of its budget, the last one 1.
        steps: indices of steps.
        probe: whose effect on the prediction to measure: "heads" (a forward for each head, layer, step and branch),
            "layers" (for each layer, step and branch) or "none".
        on_step: told about every step.
        budgets: whose budgets are measured: "heads", or "layers" and "one", where a layer's is one.

    Returns:
        dict that json takes: rows (of `measure_call`), effects (of `_Probe`), dense_seconds, num_layers, heads, tokens
        (frames, height, width), device.

    Raises:
        ValueError: the transformers of the pipeline differ in their layers.
    """
    rows: list[dict[str, Any]] = []
    effects: list[dict[str, Any]] = []
    handles = []
    accelerate(
        pipe, DenseConfig(dense_backend=config.dense_backend, check_finite=config.check_finite, fused=config.fused)
    )
    try:
        states = {name: hook.state for name, hook in attached(pipe).items()}
        if len({state.num_layers for state in states.values()}) > 1:
            raise ValueError("transformers must have the same layers to share per-head budgets: tune them apart")
        for name, transformer in transformers_of(pipe).items():
            state = states[name]
            state.observer = _Observer(state, config, levels, steps, budgets, rows)
            if probe != "none":
                effect = _Probe(state, config, levels, steps, probe, budgets, effects)
                handles.append(transformer.register_forward_hook(effect, with_kwargs=True))
        generate(pipe, request, on_step)
        state = next(state for state in states.values() if state.records)
        layout, record = state.layout, state.records[0]
        return {
            "rows": rows,
            "effects": effects,
            "dense_seconds": [record.seconds for state in states.values() for record in state.records],
            "num_layers": state.num_layers,
            "heads": record.density.shape[1],
            "tokens": [layout.frames, layout.height, layout.width],
            "device": device_name(pipe._execution_device),
        }
    finally:
        for handle in handles:
            handle.remove()
        restore(pipe)


class _Observer:
    """Measures the calls of one transformer in chosen steps, in layers that may be sparse."""

    def __init__(
        self,
        state: RunState,
        config: MethodConfig,
        levels: tuple[float, ...],
        steps: list[int],
        budgets: str,
        rows: list[dict[str, Any]],
    ):
        self._state, self._config, self._levels = state, config, levels
        self._steps, self._budgets, self._rows, self._handed = set(steps), budgets, rows, Handed()

    def __call__(self, seen: ObservedAttention) -> None:
        state = self._state
        if state.step not in self._steps or is_fixed(self._config, seen.layer, state.num_layers):
            return
        call = RecordedCall.of(state, seen.layer)
        tensors = (seen.q, seen.k, seen.v, seen.text_mask)
        self._rows.append(measure_call(call, *tensors, self._config, self._levels, self._handed, self._budgets))


class _Probe:
    """Forward hook: runs a transformer's forward again with one layer or head sparse and all else dense.

    Every effect is {"step", "branch", "layer", "heads", "effect"}, effect being ||prediction - dense prediction||^2 /
    ||dense prediction||^2.
    """

    def __init__(
        self,
        state: RunState,
        config: MethodConfig,
        levels: tuple[float, ...],
        steps: list[int],
        probe: str,
        budgets: str,
        effects: list[dict[str, Any]],
    ):
        self._state, self._steps, self._effects = state, set(steps), effects
        self._probe, self._budgets = probe, budgets
        self._config, self._level = bare(config), probed_level(config, levels)
        self._fixed = [is_fixed(config, layer, state.num_layers) for layer in range(state.num_layers)]

    def __call__(self, transformer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        state = self._state
        if state.step not in self._steps:
            return
        dense, observer, records = state.config, state.observer, len(state.records)
        exact = output[0].float()
        state.observer = None
        try:
            for layer, heads in self._groups():
                state.layer(layer).match()  # as in a new run: no clusters, the generator at its seed
                state.config = self._alone(layer, heads)
                # Not the module's call: our own hooks must not take this for another step of the run.
                changed = transformer.forward(*args, **kwargs)[0].float()
                effect = (changed - exact).square().sum() / exact.square().sum()
                found = {"step": state.step, "branch": str(state.branch), "layer": layer, "heads": heads}
                self._effects.append({**found, "effect": effect.item()})
        finally:
            state.config = dense
            state.observer = observer
            del state.records[records:]

    def _groups(self) -> list[tuple[int, list[int]]]:
        heads = list(range(self._state.records[-1].density.shape[1]))
        layers = [layer for layer, fixed in enumerate(self._fixed) if not fixed]
        if self._probe == "layers":
            return [(layer, heads) for layer in layers]
        return [(layer, [head]) for layer in layers for head in heads]

    def _alone(self, layer: int, heads: list[int]) -> MethodConfig:
        count = self._state.records[-1].density.shape[1]
        table = [[1.0] * count for _ in self._fixed]
        for head, level in zip(heads, row_of(self._level, len(heads), self._budgets)):
            table[layer][head] = level
        return dataclasses.replace(self._config, **{str(self._config.head_field): table})


def is_fixed(config: MethodConfig, layer: int, num_layers: int) -> bool:
    """Whether the config's warm-up keeps a layer dense in every step."""
    return dataclasses.replace(config, warmup_steps=0.0).is_warmup(0, 1, layer, num_layers)
