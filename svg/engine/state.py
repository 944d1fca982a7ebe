"""What one transformer remembers while a pipeline runs: step, branch, per-layer caches, records."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import MethodConfig
from ..config.base import count
from ..config.tuned import check_tuned
from .deferred import DeferredReads
from .layout import TokenLayout
from .peers import Deal, Peers, balanced_deal
from .records import AttentionRecord, ObservedAttention, Timer
from .replay import Replays

__all__ = ["LayerState", "RunState", "Timer", "device_name"]

CHECKED = ("q", "k", "v")


class Forward(NamedTuple):
    """Where in a run a forward is."""

    step: int
    num_steps: int
    branch: str
    layout: TokenLayout
    halves: bool = False


@dataclass
class LayerState:
    """What one layer keeps for one guidance branch within a run.

    Args:
        layer: index of the layer.
        branch: guidance branch.
        seed: seed of this layer's and branch's generators.
        transformer: name of the layer's transformer in its pipeline.
        reads: what this forward decides for the next one, read before it.
        peers: processes that have the layer's other heads, or None.
        cache: whatever the method keeps.
        step: what this step's forwards of the layer share, whichever their branch; empty at the first of them, and None
            where the step before had one branch only.
        halves: whether the halves of the batch are the guidance branches of the same samples.
        widest: the method's settings in the run's first sparse step, which computes most, or None.
        signature: what the cache was made for.
    """

    layer: int
    branch: str
    seed: int
    transformer: str = "transformer"
    reads: DeferredReads = field(default_factory=DeferredReads, repr=False)
    peers: Peers | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] | None = None
    halves: bool = False
    widest: MethodConfig | None = None
    signature: tuple | None = None
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def match(self, *signature) -> None:
        """Start over when what the cache was made for (shapes, layout, device) is no longer what is asked for."""
        if signature != self.signature:
            self.cache.clear()
            self._generators.clear()
            self.signature = signature

    def with_contents(self, cache: dict[str, Any], step: dict[str, Any] | None) -> LayerState:
        """The same layer and branch with other contents, and with nothing that the host reads or draws."""
        return replace(self, cache=cache, step=step, reads=DeferredReads(), peers=None, _generators={})

    def deal(self, peers: Peers | None) -> None:
        """Take the heads of another deal: centroids and residuals go with their heads, all else is made anew."""
        if peers is not None and self.peers is not None and peers.deal != self.peers.deal:
            moved = {name: x for name, x in self.cache.items() if name.endswith(("centroids", "residual"))}
            before = self.peers
            self.cache = {name: before.gather(x)[:, peers.own] for name, x in sorted(moved.items())}
        self.peers = peers

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
            return getattr(config, str(config.budget_field))
        key = f"head_budgets {own}"
        if key not in self.cache:
            self.cache[key] = torch.tensor(own, dtype=torch.float32, device=device)
        return self.cache[key]

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
        step, num_steps, branch, layout: of the last forward that `begin_forward` began; RuntimeError before the first.
        timing: whether calls are timed.
        observer: called with an ObservedAttention after every attention call, or None; it outlives runs.
        peers: processes that have other heads of the layer that runs, or None; its deal is `deals[layer]`, once that is known.
        records: one AttentionRecord per attention call of the run.
        replays: calls that were captured in CUDA graphs.
        safer: how many times a layer took the next safer precision, by layer.
        told: whether a slow path was warned of; it outlives runs.
        compiling: threads that compile what the first calls launch, or None before these; it outlives runs.
    """

    told = False
    compiling: list[Future] | None = None

    def __init__(self, config: MethodConfig, num_layers: int, name: str = "transformer"):
        if num_layers < 1:
            raise ValueError(f"num_layers must be >= 1, got {num_layers}")
        self.config = config
        self.num_layers = num_layers
        self.name = name
        self.timing = True
        self.observer: Callable[[ObservedAttention], None] | None = None
        self.replays = Replays()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the config: layer caches, generators, records, position in the run."""
        self._forward: Forward | None = None
        self._scheduled: MethodConfig | None = None  # the config, its warm-up in steps
        self._settings: MethodConfig | None = None  # the same, of one step
        self.records: list[AttentionRecord] = []
        self.peers: Peers | None = None
        self.deals: dict[int, Deal] = {}
        self._dealt: dict[int, Deal] = {}  # from the next step on
        self._layers: dict[tuple[int, str], LayerState] = {}
        self._step: dict[int, dict[str, Any]] = {}
        self._branches: set[str] = set()  # of this step
        self._alone = False
        self.safer: dict[int, int] = {}
        self._sums = DeferredReads()  # of inputs, whether they are finite
        self._decisions = DeferredReads()  # what the next forward depends on
        self._probed: dict[tuple[int, str], int] = {}

    @property
    def forward(self) -> Forward:
        """Where the run is.

        Raises:
            RuntimeError: no forward was begun.
        """
        if self._forward is None:
            raise RuntimeError("attend needs to know the step and layout: call state.begin_forward(...) first")
        return self._forward

    step = property(lambda self: self.forward.step, doc="Index of the step, from 0.")
    num_steps = property(lambda self: self.forward.num_steps, doc="Steps of the run.")
    branch = property(lambda self: self.forward.branch, doc="Guidance branch.")

    @property
    def layout(self) -> TokenLayout:
        """Token layout of this forward; a processor that sees more of the sequence than the forward's arguments tell sets it."""
        return self.forward.layout

    @layout.setter
    def layout(self, layout: TokenLayout) -> None:
        self._forward = self.forward._replace(layout=layout)

    @property
    def config(self) -> MethodConfig:
        """The method's settings; others may be set in the middle of a forward, and have no warm-up by noise then."""
        return self._config

    @config.setter
    def config(self, config: MethodConfig) -> None:
        self._config, self._scheduled, self._settings = config, None, None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and what is pickled, has the settings and no run."""
        return {key: vars(self)[key] for key in ("_config", "num_layers", "name", "timing")} | {"observer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.replays = Replays()
        self.reset()

    def begin_run(self, noise: list[float] | None = None) -> None:
        """Start a run: nothing of an earlier one, finished or interrupted, is left.

        Args:
            noise: share of noise in the latents of every step, where that is known.

        Raises:
            ValueError: the config's warm-up is by noise, and it is not known.
        """
        self.reset()
        self._scheduled = self.config.on_schedule(noise)

    def begin_forward(self, step: int, num_steps: int, branch: str, layout: TokenLayout, halves: bool = False) -> None:
        """Say where the run is before the transformer's forward; checks the forward before it.

        Args:
            step: index of the step, from 0.
            num_steps: steps of the run.
            branch: guidance branch, such as "cond" or "uncond".
            layout: token layout of this forward.
            halves: whether the halves of the batch are the guidance branches of the same samples.

        Raises:
            ValueError: step is not in [0, num_steps).
            FloatingPointError: q, k or v of the forward before held NaN or infinity.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step must be in [0, num_steps), got {step} with num_steps={num_steps}")
        self._sums.read()
        self._decisions.read()
        if self._forward is None or step != self._forward.step:
            self._step, self.deals = {}, dict(self._dealt)
            self._alone, self._branches = len(self._branches) == 1, set()
        self._branches.add(branch)
        self._forward, self._settings = Forward(step, num_steps, branch, layout, halves), None

    def end_run(self) -> None:
        """Say that the run is over: captured calls give their memory back.

        Raises:
            FloatingPointError: q, k or v of the last forward held NaN or infinity.
        """
        self.replays.clear()
        self._sums.read()

    def check_tuned(self, heads: int, device: torch.device) -> None:
        """Refuse per-head budgets of another shape, and tuned settings on another token grid or device.

        Args:
            heads: of the transformer.
            device: where it runs.

        Raises:
            ValueError: saying what they are for, and the way out.
        """
        layout = self.layout
        grid = (layout.frames, layout.height, layout.width)
        check_tuned(self.config, self.name, self.num_layers, heads, grid, device_name(device))

    def layer(self, index: int) -> LayerState:
        """State of a layer for the current branch, made on first use."""
        key = (index, self.branch)
        if key not in self._layers:
            seed = _seed(self.config.seed, index, self.branch)
            self._layers[key] = LayerState(index, self.branch, seed, self.name, self._decisions)
        found = self._layers[key]
        found.deal(self.peers)
        found.halves, found.widest = self.forward.halves, self._widest
        found.step = None if self._alone else self._step.setdefault(index, {})
        return found

    def is_warmup(self, layer: int) -> bool:
        """Whether a layer runs dense attention in the current step."""
        return self.scheduled.is_warmup(self.step, self.num_steps, layer, self.num_layers)

    @property
    def in_warm_up(self) -> bool:
        """Whether the current step is dense in all layers, where later ones are not."""
        return self.config.method != "dense" and self.step < count(self.scheduled.warmup_steps, self.num_steps)

    @property
    def scheduled(self) -> MethodConfig:
        """The config with its warm-up in steps of this run."""
        if self._scheduled is None:
            self._scheduled = self.config.on_schedule(None)
        return self._scheduled

    @property
    def settings(self) -> MethodConfig:
        """What is scheduled for the current step: made once a forward, not once a call."""
        if self._settings is None:
            self._settings = self._at_step(self.step)
        return self._settings

    @property
    def _widest(self) -> MethodConfig:
        """What is scheduled for the first sparse step of the run."""
        first = min(count(self.scheduled.warmup_steps, self.num_steps), self.num_steps - 1)
        return self._at_step(first)

    def _at_step(self, step: int) -> MethodConfig:
        return self.scheduled.at_step(step, self.num_steps, (self.layout.video_tokens, self.layout.total_tokens))

    def generator(self, layer: int, device: torch.device | str) -> torch.Generator:
        """Private generator of a layer and the current branch; its draws never touch the global one."""
        return self.layer(layer).generator(device)

    def watch(self, layer: int, sums: Tensor) -> None:
        """Note whether a call's inputs are finite: on a CPU at once, elsewhere read after the forward.

        Args:
            layer: index of the layer.
            sums: fp32 [3], of all numbers in q, k and v.

        Raises:
            FloatingPointError: on a CPU, one of them holds NaN or infinity.
        """
        self._sums.add(sums, partial(self._refuse_not_finite, layer))
        if sums.device.type == "cpu":
            self._sums.read()

    def probe_generator(self, layer: int, every: int) -> Random | None:
        """Private generator that chooses the rows a call probes, or None where no probe is due.

        Args:
            layer: index of the layer.
            every: steps from one probe of a layer to the next; 0: never.
        """
        last = self._probed.get((layer, self.branch))
        if every == 0 or (last is not None and self.step - last < every):
            return None
        self._probed[layer, self.branch] = self.step
        return Random(_seed(self.config.seed, layer, f"{self.branch} probe {self.step}"))

    def note_cosine(self, layer: int, cosine: Tensor, at_least: float) -> None:
        """Note how close a layer's probed rows were; read before the next forward, which takes a safer precision if too far.

        Args:
            layer: index of the layer.
            cosine: fp32 [].
            at_least: the least that is close enough.
        """
        self._decisions.add(cosine, partial(self._take_safer, layer, at_least))

    def note_work(self, layer: int, work: Tensor) -> None:
        """Note what the heads of a layer cost, of all processes; from the next step on they are dealt by it.

        Args:
            layer: index of the layer.
            work: fp32 [H], the same on every process.
        """
        assert self.peers is not None, "only what several processes compute is dealt"
        self._decisions.add(work, partial(self._deal, layer, self.peers.ranks))

    def _deal(self, layer: int, ranks: int, work: list[float]) -> None:
        self._dealt.setdefault(layer, balanced_deal(work, ranks))

    def _take_safer(self, layer: int, at_least: float, cosine: list[float]) -> None:
        if not cosine[0] >= at_least:
            self.safer[layer] = self.safer.get(layer, 0) + 1

    def _refuse_not_finite(self, layer: int, sums: list[float]) -> None:
        for name, total in zip(CHECKED, sums):
            if not math.isfinite(total):
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
