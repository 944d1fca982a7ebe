"""What one transformer remembers while a pipeline runs: step, branch, per-layer caches, records."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import MethodConfig
from .layout import TokenLayout

if TYPE_CHECKING:
    from .guard import Guarded

CHECKED = ("q", "k", "v")


class Timer:
    """Time of one attention call: CUDA events on a GPU, read only when asked, so the call never waits."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._start = self._mark()
        self._end = None

    def stop(self) -> None:
        self._end = self._mark()

    def seconds(self) -> float:
        """Elapsed seconds between construction and stop; waits for the GPU to get there."""
        if not self._cuda:
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class CallRecord:
    """One attention call; tensors stay on their device until a report reads them.

    Args:
        step: index of the step.
        layer: index of the layer.
        branch: guidance branch.
        density: float [B, H], computed share of the map.
        kind: int [B, H], 0 spatial and 1 temporal, or None for methods without head kinds.
        dense: whether the call ran dense attention.
        timer: the call's timer, or None when timing is off.
        precision: what attention was quantised to, or None where it was not.
        emulated: whether that precision's numbers were computed by wider units.
        guarded: what the guard saw, or None where it was off or nothing was quantised.
        reused: whether the call took an earlier call's clustering and map.
    """

    step: int
    layer: int
    branch: str
    density: Tensor
    kind: Tensor | None
    dense: bool
    timer: Timer | None
    precision: str | None = None
    emulated: bool = False
    guarded: Guarded | None = None
    reused: bool = False

    @property
    def seconds(self) -> float | None:
        return None if self.timer is None else self.timer.seconds()


@dataclass(frozen=True)
class ObservedCall:
    """One attention call as an observer sees it, right after it ran.

    Args:
        layer: index of the layer.
        q, k, v: float [B, H, S, D].
        text_mask: bool [B, text_tokens], or None.
        out: float [B, H, S, D].
        plan: the method's Plan, or None where the call was dense or the method has none.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    text_mask: Tensor | None
    out: Tensor
    plan: Any


@dataclass
class LayerState:
    """What one layer keeps for one guidance branch within a run.

    Args:
        layer: index of the layer.
        branch: guidance branch.
        seed: seed of this layer's and branch's generators.
        transformer: name of the layer's transformer in its pipeline.
    """

    layer: int
    branch: str
    seed: int
    transformer: str = "transformer"
    cache: dict[str, Any] = field(default_factory=dict)
    _signature: tuple | None = None
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def match(self, *signature) -> None:
        """Start over when what the cache was made for (shapes, layout, device) is no longer what is asked for."""
        if signature != self._signature:
            self.cache.clear()
            self._generators.clear()
            self._signature = signature

    def head_budgets(self, config: MethodConfig, device: torch.device) -> float | Tensor:
        """What each head may compute: its own value where the config has one, else the setting that all share.

        Args:
            config: the method's settings.
            device: where the result lives.

        Returns:
            float32 [H], copied to the device once a run, or a number.
        """
        own = config.head_budgets(self.layer)
        if own is None:
            return getattr(config, config.budget_field)
        if "head_budgets" not in self.cache:
            self.cache["head_budgets"] = torch.tensor(own, dtype=torch.float32, device=device)
        return self.cache["head_budgets"]

    def generator(self, device: torch.device | str) -> torch.Generator:
        """This layer's and branch's private generator on a device."""
        device = torch.device(device)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


class RunState:
    """State of one transformer: where the run is, what each layer and branch caches, what was computed.

    Args:
        config: the method's settings.
        num_layers: self-attention layers of the transformer.
        name: the transformer's name in its pipeline.

    Attributes:
        step, num_steps, branch, layout: set by `begin_forward`; step is None outside a run.
        timing: whether calls are timed.
        observer: called with an ObservedCall after every attention call, or None; it outlives runs.
        records: one CallRecord per attention call of the run.
        safer: how many times a layer took the next safer precision, by layer.
    """

    def __init__(self, config: MethodConfig, num_layers: int, name: str = "transformer"):
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {num_layers}")
        self.config = config
        self.num_layers = num_layers
        self.name = name
        self.timing = True
        self.observer: Callable[[ObservedCall], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything but the config: layer caches, generators, records, position in the run."""
        self.step: int | None = None
        self.num_steps: int | None = None
        self.branch: str | None = None
        self.layout: TokenLayout | None = None
        self.records: list[CallRecord] = []
        self._layers: dict[tuple[int, str], LayerState] = {}
        self.safer: dict[int, int] = {}
        self._flags: list[tuple[int, Tensor]] = []
        self._cosines: list[tuple[int, Tensor]] = []
        self._probed: dict[tuple[int, str], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and what is pickled, has the settings and no run."""
        return {key: vars(self)[key] for key in ("config", "num_layers", "name", "timing")} | {"observer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.reset()

    def begin_run(self) -> None:
        """Start a run: nothing of an earlier one, finished or interrupted, is left."""
        self.reset()

    def begin_forward(self, step: int, num_steps: int, branch: str, layout: TokenLayout) -> None:
        """Say where the run is before the transformer's forward; checks the forward before it.

        Args:
            step: index of the step, from 0.
            num_steps: steps of the run.
            branch: guidance branch, such as "cond" or "uncond".
            layout: token layout of this forward.

        Raises:
            ValueError: step is not in [0, num_steps).
            FloatingPointError: q, k or v of the forward before held NaN or infinity.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step must be in [0, num_steps), got {step} with num_steps={num_steps}")
        self._read_flags()
        self._read_cosines()
        self._read_drifts()
        self.step, self.num_steps, self.branch, self.layout = step, num_steps, branch, layout

    def end_run(self) -> None:
        """Say that the run is over.

        Raises:
            FloatingPointError: q, k or v of the last forward held NaN or infinity.
        """
        self._read_flags()

    def check_tuned(self, heads: int, device: torch.device) -> None:
        """Refuse per-head budgets of another shape, and tuned settings on another token grid or device.

        Args:
            heads: of the transformer.
            device: where it runs.

        Raises:
            ValueError: saying what they are for, and the way out.
        """
        config, way_out = self.config, "run `svg tune` for this one, or take them all the same with tuned_for=null"
        table = getattr(config, config.head_field) if config.head_field else None
        if table is not None and (len(table), len(table[0])) != (self.num_layers, heads):
            raise ValueError(
                f"{config.head_field} must be [layers][heads] = [{self.num_layers}][{heads}] in {self.name}, "
                f"got [{len(table)}][{len(table[0])}]: it was made for another model"
            )
        tuned = getattr(config, "tuned_for", None)
        if tuned is None:
            return
        layout, found = self.layout, device_name(device)
        if tuned.tokens != (layout.frames, layout.height, layout.width):
            wanted, got = ("x".join(map(str, n)) for n in (tuned.tokens, (layout.frames, layout.height, layout.width)))
            raise ValueError(f"these settings must run on the token grid they were tuned for, {wanted}, got {got}: {way_out}")
        if tuned.device != found:
            raise ValueError(f"these settings must run on the device they were tuned for, {tuned.device}, got {found}: {way_out}")

    def layer(self, index: int) -> LayerState:
        """State of a layer for the current branch, made on first use."""
        key = (index, self.branch)
        if key not in self._layers:
            seed = _seed(self.config.seed, index, self.branch)
            self._layers[key] = LayerState(index, self.branch, seed, self.name)
        return self._layers[key]

    def is_warmup(self, layer: int) -> bool:
        """Whether a layer runs dense attention in the current step."""
        return self.config.is_warmup(self.step, self.num_steps, layer, self.num_layers)

    def generator(self, layer: int, device: torch.device | str) -> torch.Generator:
        """Private generator of a layer and the current branch; its draws never touch the global one."""
        return self.layer(layer).generator(device)

    def watch(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Note whether a call's inputs are finite: on a CPU at once, elsewhere read after the forward.

        Args:
            layer: index of the layer.
            q, k, v: float, any shape.

        Raises:
            FloatingPointError: on a CPU, one of them holds NaN or infinity.
        """
        # One fp32 sum a tensor turns NaN or infinite with any of its values and costs one read of it.
        self._flags.append((layer, torch.stack([x.detach().sum(dtype=torch.float32) for x in (q, k, v)])))
        if q.device.type == "cpu":
            self._read_flags()

    def probe_generator(self, layer: int) -> torch.Generator | None:
        """Private CPU generator that chooses the rows a call probes, or None where no probe is due."""
        every, last = self.config.probe_every, self._probed.get((layer, self.branch))
        if every == 0 or (last is not None and self.step - last < every):
            return None
        self._probed[layer, self.branch] = self.step
        return torch.Generator().manual_seed(_seed(self.config.seed, layer, f"{self.branch} probe {self.step}"))

    def note_cosine(self, layer: int, cosine: Tensor) -> None:
        """Note how close a layer's probed rows were; read before the next forward.

        Args:
            layer: index of the layer.
            cosine: fp32 [].
        """
        self._cosines.append((layer, cosine))

    def _read_cosines(self) -> None:
        cosines, self._cosines = self._cosines, []
        if not cosines:
            return
        values = torch.stack([cosine for _, cosine in cosines]).tolist()
        for layer, value in zip((layer for layer, _ in cosines), values):
            if not value >= self.config.min_cosine:
                self.safer[layer] = self.safer.get(layer, 0) + 1

    def _read_drifts(self) -> None:
        """What a call of each layer adds to its drift, measured in the forward before (`svg.methods.reuse`)."""
        caches = [memory.cache for memory in self._layers.values() if "measured_drift" in memory.cache]
        if not caches:
            return
        measured = [cache.pop("measured_drift") for cache in caches]
        values = torch.stack([drift for drift, _ in measured]).tolist()
        for cache, value, (_, calls) in zip(caches, values, measured):
            cache["drift_a_call"] = value / calls

    def _read_flags(self) -> None:
        flags, self._flags = self._flags, []
        if not flags:
            return
        finite = torch.stack([sums for _, sums in flags]).isfinite().tolist()  # [calls, 3]
        for (layer, _), row in zip(flags, finite):
            for name, ok in zip(CHECKED, row):
                if not ok:
                    raise FloatingPointError(
                        f"{name} must be finite, got NaN or infinity in {self.name} layer {layer}, "
                        f"step {self.step} of {self.num_steps}, branch {self.branch}; "
                        f"try another dtype, or look at what the layers before it give"
                    )


def device_name(device: torch.device) -> str:
    """What tuned settings call a device: a GPU's name, or the type of any other."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _seed(seed: int, layer: int, branch: str | None) -> int:
    digest = hashlib.blake2b(f"{seed}/{layer}/{branch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
