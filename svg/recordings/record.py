"""Recorded q, k, v: what attention saw in chosen calls of a run, in one safetensors file (docs/sweep-format.md)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svg.eval.files import atomic_path, check_outputs
from svg.pipelines import GenerationRequest, StepProgress, accelerate, generate, load_pipeline, restore
from svg.pipelines.attach import attached, transformers_of
from svg.pipelines.loading import check_offload, resolve_device
from svg.pipelines.model_files import locate_model, read_rules

from ..config import DenseConfig
from ..documents import parse_json, read_header, shown
from ..engine.layout import TokenLayout
from ..engine.records import ObservedAttention
from ..engine.state import RunState
from ..environment import versions
from ..generate.job import Job, inputs_of
from ..generate.preflight import check_job

FORMAT, VERSION = "svg-record", "1"
_THIRDS = 3
_KINDS = {"F16", "BF16", "F32"}  # as safetensors calls them


@dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """One recorded attention call.

    Args:
        name: what its tensors' names begin with.
        step, num_steps: index of the step, from 0, and steps of the run.
        layer, num_layers: index of the layer, from 0, and attention layers of the transformer.
        branch: guidance branch.
        transformer: name of the transformer in its pipeline.
        layout: where video and text are.
    """

    name: str
    step: int
    num_steps: int
    layer: int
    num_layers: int
    branch: str
    transformer: str
    layout: TokenLayout

    @classmethod
    def of(cls, state: RunState, layer: int, name: str = "") -> RecordedCall:
        """The call of a layer in the forward that a state is in."""
        at = state.forward
        where = {"step": at.step, "num_steps": at.num_steps, "branch": at.branch, "layout": at.layout}
        return cls(name=name, layer=layer, num_layers=state.num_layers, transformer=state.name, **where)


class Recording:
    """A file that `record` wrote; tensors are read one call at a time.

    Args:
        path: the file.
        calls: what is in it, in the order of the run.
        source: model, preset, generation, dtype, device and versions of the run.
    """

    def __init__(self, path: Path, calls: list[RecordedCall], source: dict[str, Any]):
        self.path, self.calls, self.source = path, calls, source

    def tensors(
        self, call: RecordedCall, device: str | torch.device = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Read one call.

        Args:
            call: one of `calls`.
            device: where the tensors are to be.

        Returns:
            q, k, v [B, H, S, D] in the model's dtype; text_mask bool [B, text_tokens], or None where all are prompt.

        Raises:
            ValueError: a tensor holds NaN or infinity.
        """
        with safe_open(self.path, framework="pt", device=str(device)) as file:
            q, k, v = (file.get_tensor(f"{call.name}.{tensor}") for tensor in "qkv")
            if not all(x.isfinite().all() for x in (q, k, v)):
                raise ValueError(
                    f"a recording must hold finite q, k and v, got {self.path} with NaN or infinity in {call}"
                )
            masked = f"{call.name}.text_mask"
            return q, k, v, file.get_tensor(masked) if masked in set(file.keys()) else None


class Recorder:
    """Keeps chosen calls of one transformer in CPU memory; it is the state's observer.

    Args:
        state: the transformer's state during the run.
        steps, layers: indices from 0; None: all layers.
        branches: guidance branches; None: all.
        tensors, calls: what to add to, shared by the transformers of a pipeline.
    """

    def __init__(
        self,
        state: RunState,
        steps: Iterable[int],
        layers: Iterable[int] | None,
        branches: Iterable[str] | None,
        tensors: dict[str, Tensor],
        calls: list[RecordedCall],
    ):
        self._state, self._steps = state, set(steps)
        self._layers = None if layers is None else set(layers)
        self._branches = None if branches is None else set(branches)
        self._tensors, self._calls = tensors, calls

    def __call__(self, call: ObservedAttention) -> None:
        state = self._state
        if state.step not in self._steps or (self._layers is not None and call.layer not in self._layers):
            return
        if self._branches is not None and state.branch not in self._branches:
            return
        name = str(len(self._calls))
        for key, tensor in (("q", call.q), ("k", call.k), ("v", call.v), ("text_mask", call.text_mask)):
            if tensor is not None:
                self._tensors[f"{name}.{key}"] = tensor.detach().to("cpu", copy=True).contiguous()
        self._calls.append(RecordedCall.of(state, call.layer, name))


def record(
    pipe: Any,
    request: GenerationRequest,
    path: str | Path,
    *,
    steps: list[int] | None = None,
    layers: list[int] | None = None,
    branches: list[str] | None = None,
    source: dict[str, Any] | None = None,
    on_step: Callable[[StepProgress], None] | None = None,
) -> list[RecordedCall]:
    """Run a pipeline with dense attention and save q, k, v of chosen calls.

    Args:
        pipe: a Diffusers pipeline of a supported class; it is plain afterwards.
        request: what to generate.
        path: the safetensors file, which appears whole or not at all.
        steps: indices of steps; a negative one counts from the end; None: one after a sixth, a half and five sixths.
        layers: indices of layers, in the same way; None: all.
        branches: guidance branches, such as "cond"; None: all.
        source: what the file is to say of the model, besides the request and the versions.
        on_step: told about every step.

    Returns:
        The recorded calls.

    Raises:
        ValueError: an index out of range, or nothing was recorded (says which branches there are).
        OSError: the file cannot be written.
    """
    check_outputs({"out": path})
    chosen = _indices("steps", steps if steps is not None else _spread(request.steps), request.steps)
    tensors: dict[str, Tensor] = {}
    calls: list[RecordedCall] = []
    accelerate(pipe, DenseConfig())
    try:
        hooks = attached(pipe)
        for hook in hooks.values():
            wanted = None if layers is None else _indices("layers", layers, hook.state.num_layers)
            hook.state.observer = Recorder(hook.state, chosen, wanted, branches, tensors, calls)

        def stepped(progress: StepProgress) -> None:
            if progress.step == 1:
                _check_branches(branches, hooks.values())
            if on_step is not None:
                on_step(progress)

        generate(pipe, request, stepped)
    finally:
        restore(pipe)
    if not calls:
        raise ValueError(f"steps and layers must name at least one call, got {steps} and {layers}")
    _save(Path(path), tensors, calls, {**(source or {}), **_source(pipe, request)})
    return calls


def record_job(job: Job, path: Path, **chosen: Any) -> tuple[int, int]:
    """`record` for the command line: load the job's model and run it.

    Args:
        job: the resolved job.
        path: the file to write.
        chosen: steps, layers and branches, as `record` takes them.

    Returns:
        Recorded calls, and the file's bytes.
    """
    check_outputs({"out": path}, inputs_of(job))
    _check_chosen(job, **chosen)
    pipe = load_pipeline(job.model, device=job.device, **job.loading)
    calls = record(pipe, job.request, path, source={"model": job.model, "preset": job.preset}, **chosen)
    return len(calls), path.stat().st_size


def _check_chosen(job: Job, steps: list[int] | None, layers: list[int] | None, branches: list[str] | None) -> None:
    """What can be refused before the model is loaded."""
    check_job(job)
    check_offload(job.offload, resolve_device(job.device))
    _indices("steps", steps or [], job.request.steps)
    total = read_rules(locate_model(job.model)).layers()
    if total is not None:
        _indices("layers", layers or [], total)
    if branches is not None and not all(branch.strip() for branch in branches):
        raise ValueError(f"branches must be names with commas between them, such as cond, got {','.join(branches)!r}")


def _check_branches(branches: Iterable[str] | None, hooks: Iterable[Any]) -> None:
    """Refuse branches that a run does not have, once its first step is done."""
    seen = {str(row.branch) for hook in hooks for row in hook.state.records}
    if branches is not None and not set(branches) <= seen:
        raise ValueError(f"branches must be among {', '.join(sorted(seen))}, got {', '.join(branches)}")


def open_recording(path: str | Path) -> Recording:
    """Look at a recording without reading its tensors.

    Args:
        path: a file that `record` wrote.

    Returns:
        The recording.

    Raises:
        ValueError: no such file, no recording, or one of another version.
    """
    path = Path(path)
    metadata = read_header(path, "a recording", (FORMAT, VERSION), "make one with `svg record`")
    try:
        calls = [
            RecordedCall(**{**call, "layout": TokenLayout(**call["layout"])}) for call in parse_json(metadata["calls"])
        ]
        source = parse_json(metadata["source"])
        _check_calls(calls, source, path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a recording as `svg record` writes it, got {error}: record it again"
        ) from error
    return Recording(path, calls, source)


def _check_calls(calls: list[RecordedCall], source: Any, path: Path) -> None:
    """Raise unless calls are of the right types, and their tensors there and of the layout's shape."""
    if not calls or not isinstance(source, dict):
        raise ValueError("one without calls or their source")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for call in calls:
            numbers = (call.step, call.num_steps, call.layer, call.num_layers)
            texts = (call.name, call.branch, call.transformer)
            if not all(type(number) is int and number >= 0 for number in numbers) or not all(map(_is_text, texts)):
                raise ValueError(f"a call with {shown(dataclasses.asdict(call))}")
            if missing := [f"{call.name}.{key}" for key in "qkv" if f"{call.name}.{key}" not in names]:
                raise ValueError(f"one without {missing[0]}")
            kinds = {file.get_slice(f"{call.name}.{key}").get_dtype() for key in "qkv"}
            if not kinds <= _KINDS or len(kinds) > 1:
                raise ValueError(f"tensors of {', '.join(sorted(kinds))} in {call.name}")
            shapes = {tuple(file.get_slice(f"{call.name}.{key}").get_shape()) for key in "qkv"}
            if len(shapes) > 1 or len(shape := shapes.pop()) != 4 or shape[2] != call.layout.total_tokens or 0 in shape:
                raise ValueError(f"tensors of another shape than {call.layout.total_tokens} tokens in {call.name}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _save(path: Path, tensors: dict[str, Tensor], calls: list[RecordedCall], source: dict[str, Any]) -> None:
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "calls": json.dumps([dataclasses.asdict(call) for call in calls]),
        "source": json.dumps(source),
    }
    with atomic_path(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error}): make room and record again") from error


def _source(pipe: Any, request: GenerationRequest) -> dict[str, Any]:
    transformer = next(iter(transformers_of(pipe).values()))
    return {
        "generation": dataclasses.asdict(dataclasses.replace(request, image=None)),
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "device": pipe._execution_device.type,
        "versions": versions(),
    }


def _spread(total: int) -> list[int]:
    return sorted({(2 * third + 1) * total // (2 * _THIRDS) for third in range(_THIRDS)})


def _indices(name: str, values: list[int], total: int) -> list[int]:
    for value in values:
        if not -total <= value < total:
            raise ValueError(f"{name} must be in [{-total}, {total}), got {value}")
    return [value % total for value in values]
