"""What every method's settings have in common, and the checks of single settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar

from ..documents import shown

FEW_STEPS = 8  # or fewer, of which a share says little
DENSE_BACKENDS = ("auto", "cudnn", "flash", "efficient", "math")
ORDERS = ("hilbert", "rowmajor")  # of a video's tokens
LINEARS = ("none", "feed_forward", "all")  # of a transformer's blocks, in 8 bits
LINEAR_PRECISIONS = ("auto", "fp8", "int8-rows", "int8")
PRECISIONS = ("native", "int8-fp8", "int8-fp8-acc16", "int8-fp16")  # of a sparse method
WARMUP_PRECISIONS = ("native", "int8-fp8", "int8-fp16")  # of its dense calls


def setting(default: Any, *, flag: type | None = None, help: str = "", sweep: str = "") -> Any:
    """A field of a method's settings with what programs need to know of it.

    Args:
        default: its value where it is not given.
        flag: type of its own flag of `svg generate`: int, float, str, or pathlib.Path for a file; None: `--set` alone.
        help: what the flag's help says.
        sweep: what the numbers of `svg sweep --budgets` are to this method, in the plural; "": they are not this field.

    Returns:
        A dataclass field.
    """
    return field(default=default, metadata={"flag": flag, "help": help, "sweep": sweep})


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every method has: which steps and layers stay dense, the seed, and how dense attention runs.

    Args:
        warmup_steps: share of the steps, from the first on, that stays dense, in [0, 1].
        warmup_noise: steps stay dense while the noise's share of the latents, by the scheduler, is above this, in [0, 1];
            in the place of `warmup_steps`, for schedules of few steps and for runs that begin in the middle. None: off.
        few_steps_noise: the same for runs of at most 8 steps alone, where the scheduler tells their noise; the words of
            `svg.accelerate` and the presets of `near` have it. None: off.
        warmup_layers: share of the layers, from the first on, that stays dense in every step, in [0, 1].
        min_tokens: sequences of fewer tokens run dense, >= 0: below some length planning costs more than it saves.
        seed: seed of the method's private generators, >= 0; the global generator is never touched.
        dense_backend: SDPA backend of dense attention: "auto" (best present), "cudnn", "flash", "efficient", "math".
        check_finite: raise FloatingPointError when q, k or v hold NaN or infinity.
        fused: elementwise work in single kernels, in dense and sparse calls alike: QK-norm with RoPE, in Wan's and
            HunyuanVideo's single-stream blocks gate with residual, norm and modulation, and activations with the
            quantisation for linears in 8 bits. None: on GPUs, and where gradients are off; there the result is exact to rounding.
        cuda_graphs: capture sparse and quantised attention calls in CUDA graphs and replay them, which spares short calls the
            time of their launches. Results are the same, bit for bit. None: where dense attention would take less than
            about 20 ms.
        linears: which linears of the blocks run in 8 bits: "none", "feed_forward", "all" (the video attention's too),
            or those that a file of `svg adapt-linears`, a path that ends in .json, has chosen by their error.
            The first and last block, cross-attention, modulation and all outside of blocks stay in 16.
        linear_precision: theirs: "fp8" (compute capability 8.9); "int8-rows", rotated, with a third of FP8's error; "int8" in
            blocks of 128 x 128, those of inputs that hold outliers with 16 bits; or "auto": what a file
            was measured in, else int8-rows on Hopper, where they are as fast as FP8, and where there is no FP8; else FP8.
        linear_warmup: whether these linears stay in 16 bits in the steps that a sparse method keeps dense, where errors grow
            longest; their 16-bit weights are on the device beside those in 8 bits until then.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value has the wrong type.
    """

    method: ClassVar[str] = ""
    rivals: ClassVar[tuple[str, ...]] = ()  # settings of which one is given: a flag drops a preset's others
    for_any_model: ClassVar[bool] = (
        False  # whether the settings are good for every model, so that every preset has them
    )
    # The setting that decides how much is computed, and the field that holds each head's own; None: there is none.
    # A method that has both can be tuned: at which levels of the budget heads are measured, ascending, the last one 1
    # (all of the map), and from which of them on single heads are tried, far enough from dense to be seen above rounding;
    # and whose budgets are tuned where nothing is said: "heads", or "layers" where a layer shares its own out to its heads.
    budget_field: ClassVar[str | None] = None
    head_field: ClassVar[str | None] = None
    levels: ClassVar[tuple[float, ...]] = ()
    probed_level: ClassVar[float] = 0.0
    tuned_by: ClassVar[str] = "heads"
    # Other settings that a tuning tries, one after the other, and their values, of which it takes those behind the given one.
    tuned_too: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})

    warmup_steps: float = setting(0.2, flag=float, help="Share of the steps kept dense, in [0, 1].")
    warmup_noise: float | None = setting(
        None,
        flag=float,
        help="Steps with a larger share of noise stay dense, in [0, 1]; in the place of --warmup-steps.",
    )
    few_steps_noise: float | None = None
    warmup_layers: float = setting(0.03, flag=float, help="Share of the layers kept dense, in [0, 1].")
    min_tokens: int = 0
    seed: int = 0
    dense_backend: str = setting("auto", flag=str, help=f"Backend of dense attention: {', '.join(DENSE_BACKENDS)}.")
    check_finite: bool = True
    fused: bool | None = None
    cuda_graphs: bool | None = None
    linears: str = setting(
        "none", flag=str, help=f"Linears in 8 bits: {', '.join(LINEARS)}, or a file of svg adapt-linears."
    )
    linear_precision: str = "auto"
    linear_warmup: bool = True

    def __post_init__(self):
        share(self, "warmup_steps")
        share(self, "warmup_layers")
        for name in ("warmup_noise", "few_steps_noise"):
            if getattr(self, name) is not None:
                share(self, name)
        integer(self, "min_tokens", least=0)
        integer(self, "seed", least=0)
        choice(self, "dense_backend", DENSE_BACKENDS)
        if not (isinstance(self.linears, str) and self.linears.endswith(".json")):
            choice(self, "linears", LINEARS)
        choice(self, "linear_precision", LINEAR_PRECISIONS)
        for one in fields(self):
            if isinstance(one.default, bool) and not isinstance(getattr(self, one.name), bool):
                raise TypeError(f"{one.name} must be true or false, got {shown(getattr(self, one.name))}")
        for name in ("fused", "cuda_graphs"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true, false or null, got {shown(getattr(self, name))}")

    @property
    def linears_file(self) -> str | None:
        """The file that `linears` names, or None."""
        return None if self.linears in LINEARS else self.linears

    def is_warmup(self, step: int, num_steps: int, layer: int, num_layers: int) -> bool:
        """Whether a layer stays dense in a step.

        Args:
            step: index of the step, from 0.
            num_steps: steps of the run.
            layer: index of the layer, from 0.
            num_layers: attention layers of the transformer.

        Returns:
            True iff step < ceil(warmup_steps * num_steps) or layer < ceil(warmup_layers * num_layers).
        """
        return step < count(self.warmup_steps, num_steps) or layer < count(self.warmup_layers, num_layers)

    def warms_up_by_noise(self, num_steps: int) -> bool:
        """Whether a run of so many steps warms up by its noise, not by a share of them.

        Args:
            num_steps: steps of the run.
        """
        few = self.few_steps_noise is not None and num_steps <= FEW_STEPS
        return self.warmup_noise is not None or few

    def on_schedule(self, noise: list[float] | None) -> MethodConfig:
        """The settings with `warmup_steps` where a run warms up by noise.

        Args:
            noise: of every step of a run, in its order; None: not known.

        Returns:
            Settings whose warm-up is by steps.

        Raises:
            ValueError: `warmup_noise` is given and the noise is not known.
        """
        if noise is None and self.warmup_noise is not None:
            raise ValueError(
                "warmup_noise must be left out where no scheduler tells how much noise a step has: use warmup_steps, or pass "
                "the noise of all steps to svg.at_step"
            )
        if noise is None or not self.warms_up_by_noise(len(noise)):
            return self
        most = self.few_steps_noise if self.warmup_noise is None else self.warmup_noise
        dense = 0 if most is None else sum(level > most for level in noise)
        return replace(self, warmup_noise=None, few_steps_noise=None, warmup_steps=dense / len(noise))

    def at_step(self, step: int, num_steps: int, tokens: tuple[int, int] | None = None) -> MethodConfig:
        """The settings in one step of a run; a method whose budget depends on the step gives others.

        Args:
            step: index of the step, from 0.
            num_steps: steps of the run.
            tokens: of the video, and in all; None: not known.
        """
        return self

    def head_budgets(self, layer: int) -> tuple[float, ...] | None:
        """Each head's own value of `budget_field`.

        Args:
            layer: index of the layer, from 0.

        Returns:
            One value a head, or None where all heads share the setting.
        """
        table = getattr(self, self.head_field) if self.head_field else None
        return None if table is None else table[layer]

    @property
    def always_computed(self) -> float:
        """The part of a budget that is spent whatever it is."""
        return 0.0

    def is_dense(self, layer: int) -> bool:
        """Whether a layer's budgets ask for all of its map, which dense attention computes without planning."""
        budgets = self.head_budgets(layer)
        return self.method == "dense" or (budgets is not None and min(budgets) == 1)

    @classmethod
    def sweep_field(cls) -> tuple[str, str] | None:
        """The setting that `svg sweep --budgets` gives, and what it is called in the plural; None: there is none."""
        found = ((one.name, one.metadata["sweep"]) for one in fields(cls) if one.metadata.get("sweep"))
        return next(found, None)

    def for_branches_apart(self) -> MethodConfig:
        """These settings where each guidance branch runs in a process of its own."""
        return self

    def for_warm_up(self) -> MethodConfig:
        """These settings without what kernels take as a number, so that one warm-up serves all values of it."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dict, `method` first.

        Returns:
            What `config_from_dict` takes back.
        """
        return {"method": self.method, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class DenseConfig(MethodConfig):
    """Dense attention on the best backend present: the baseline, and what warm-up runs."""

    method: ClassVar[str] = "dense"
    for_any_model: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class GuardedConfig(MethodConfig):
    """What every method that may compute in fewer bits has.

    Args:
        guard: compute a head again without quantisation, in the same call, where its sums are not finite or left the
            range of the quantised values, or its probed rows are over the tolerance; the report counts such heads.
        probe_every: steps from one probe of a layer, or of a linear in 8 bits, to the next, >= 1; 0: never probe.
        tolerance: relative L2 error of a head's probed rows, > 0, above which it is computed again; of a linear's, above
            which it is in its own precision from the next forward on.
    """

    guard: bool = True
    probe_every: int = 10
    tolerance: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        integer(self, "probe_every", least=0)
        number(self, "tolerance")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got {self.tolerance}")


@dataclass(frozen=True, kw_only=True)
class SparseConfig(GuardedConfig):
    """What every sparse method has.

    Args:
        precision: of the sparse attention: "native" (the inputs'), "int8-fp8" (Q K^T in INT8, P V in FP8; compute capability
            8.9), "int8-fp8-acc16" (the same, summed in fp16), or "int8-fp16" (P V in 16 bits: the safe mode).
        warmup_precision: of dense attention in the steps and layers that stay dense as a warm-up: "native", "int8-fp8" or
            "int8-fp16", as sage2 computes it. On Hopper a dense call in 8 bits takes about half the time.
    """

    precision: str = "native"
    warmup_precision: str = "native"

    def __post_init__(self):
        super().__post_init__()
        choice(self, "precision", PRECISIONS)
        choice(self, "warmup_precision", WARMUP_PRECISIONS)


def count(share: float, total: int) -> int:
    """How many of `total` items a share of them is, rounded up."""
    # 0.2 * 15 is 3.0000000000000004 in binary: it must be 3 items, not 4.
    return math.ceil(share * total - 1e-9)


def share(config: MethodConfig, name: str, zero: bool = True) -> None:
    """Raise unless a setting is a number in [0, 1], or in (0, 1] without zero."""
    number(config, name)
    value = getattr(config, name)
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1], got {value}")


def number(config: MethodConfig, name: str) -> None:
    """Raise unless a setting is a number."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")


def choice(config: MethodConfig, name: str, choices: tuple[str | int, ...]) -> None:
    """Raise unless a setting is one of its choices."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")


def integer(config: MethodConfig, name: str, least: int) -> None:
    """Raise unless a setting is an integer of at least `least`."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def check_max_drift(config: Any) -> None:
    """Raise unless max_drift is none, or a positive number beside a refresh that it can end."""
    if config.max_drift is None:
        return
    number(config, "max_drift")
    if not config.max_drift > 0:
        raise ValueError(f"max_drift must be > 0, got {config.max_drift}")
    if config.refresh == 1:
        raise ValueError("max_drift must come with refresh > 1, got 1, which clusters anew at every step: raise it")
