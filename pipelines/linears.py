"""Linears of a transformer's blocks in 8 bits, in the place of Diffusers' own.

Weights are quantised once, one layer after the other, and the 16-bit ones wait in CPU memory: what the GPU holds falls by half
of them, and `restore_linears` brings back the same parameters, bit for bit.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svg.config.base import LINEARS
from svg.engine.compiler import not_compiled
from svg.kernels import QuantizedRows, fp8_linear, quantize_rows
from svg.kernels.common import target
from svg.kernels.linears import (
    QuantizedBlocks,
    Steering,
    int8_matmul,
    int8_rows_matmul,
    quantize_blocks,
    quantize_int8_rows,
)
from svg.kernels.linears.int8_rows import hopper
from svg.kernels.linears.rows import MAX_WIDTH

from .linears_file import read_linears
from .spec import ModelSpec

# Names of linears in a video attention, and of what holds the linears of a feed-forward, in Diffusers' families. Text's own
# are too short to gain, and modulation, embedders and the last layer are left out by not being named.
_PROJECTIONS = re.compile(r"(to_(q|k|v|qkv|query|key|value)|to_out(\.0)?|out_layer)(\.base_layer)?")
_FEED_FORWARD = re.compile(r"(ff|ffn|mlp|mlp_moe_gen|feed_forward)\..+|proj_mlp(\.base_layer)?")
_JOINT_OUT = re.compile(r"proj_out(\.base_layer)?")  # of attention and feed-forward together, where there is a proj_mlp
_NOT = re.compile(r"(^|\.)(lora_|norm)")
ALIKE = ("to_q", "to_k", "to_v", "to_query", "to_key", "to_value")  # which take the same input
EDGES_FROM = 4  # blocks from which on the first and the last stay in 16 bits
SAMPLED = 32  # output channels whose 16-bit weights stay on the device, for the guard


class SharedInput:
    """What several linears take alike (q, k and v), quantised by the first of them; or one linear's own.

    Args:
        users: how many linears take it.
        precision: "fp8", "int8-rows" or "int8".
    """

    def __init__(self, users: int = 1, precision: str = "fp8"):
        self.users, self.precision = users, precision
        self.steering = Steering() if precision == "int8" else None
        self._forget()

    def quantize(self, x: Tensor) -> QuantizedRows | QuantizedBlocks:
        """The quantised rows, or blocks, of x: those made for the linear before, if that was given the same tensor."""
        if self.users == 1 or torch.compiler.is_compiling():  # which finds equal operations by itself
            return self._quantize(x)
        found = self._found
        if found is None or self._source is None or self._source() is not x:
            found = self._quantize(x)
            self._found, self._source, self._taken = found, weakref.ref(x, self._forget), 0
        self._taken += 1
        if self._taken == self.users:
            self._forget()
        return found

    def _quantize(self, x: Tensor) -> QuantizedRows | QuantizedBlocks:
        if self.steering is None:
            return (quantize_rows if self.precision == "fp8" else quantize_int8_rows)(x)
        blocks = self.steering.blocks(x.flatten(0, -2))
        self.steering.nudge(blocks)
        return blocks

    def _forget(self, gone: Any = None) -> None:
        self._source, self._found, self._taken = None, None, 0

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_source": None, "_found": None, "_taken": 0}


class QuantizedLinear(nn.Module):
    """A linear whose weight and inputs are in 8 bits: with a scale an output channel and a row, or INT8 blocks with fallback.

    Args:
        linear: the linear in whose place it is; its weight moves to CPU memory.
        precision: "fp8", "int8-rows" (rotated) or "int8" (blocks).
        shared: what quantises its input, where others take the same.
    """

    values: Tensor
    scale: Tensor
    sample: Tensor | None

    def __init__(self, linear: nn.Linear, precision: str = "fp8", shared: SharedInput | None = None):
        super().__init__()
        self.in_features, self.out_features, self.precision = linear.in_features, linear.out_features, precision
        self.shared = shared or SharedInput(precision=precision)
        self.bias = linear.bias
        device = linear.weight.device
        with torch.no_grad():
            found = quantize_weight(linear.weight.to(_computing(device)), precision)
        self.register_buffer("values", found.values.to(device), persistent=False)
        self.register_buffer("scale", found.scale.to(device), persistent=False)
        self.register_buffer("sample", None, persistent=False)  # of the 16-bit weight, for the guard
        self.sampled = slice(0, 0)
        self.own: Tensor | None = None  # the 16-bit weight, where the guard went back to it, or the warm-up lasts
        self.waiting = False  # for the end of the warm-up
        self.probe: Callable[[Tensor, Tensor], None] | None = None  # told input and output of this forward
        self._kept = (linear,)  # in a tuple: no submodule, which would be moved to the GPU
        linear.weight.data = linear.weight.data.cpu()

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """[..., K], or its quantised rows -> [..., N] of the same dtype."""
        if isinstance(x, QuantizedRows):
            return self._rows(x)
        if self.own is not None:
            return F.linear(x, self.own, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(
                "linears in 8 bits have no backward pass, and an input requires a gradient: run under "
                "torch.no_grad(), call svg.restore(pipe), or train with svg.int8_training"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = self._int8(x) if self.precision == "int8" else self._quantized(x)
        if self.probe is not None:
            self._probe(x, out)
        return out

    @not_compiled  # what it finds is queued on the host
    def _probe(self, x: Tensor, out: Tensor) -> None:
        assert self.probe is not None
        self.probe(x, out)

    def _quantized(self, x: Tensor) -> Tensor:
        rows = self.shared.quantize(x)
        assert isinstance(rows, QuantizedRows)
        return self._rows(rows)

    def _rows(self, x: QuantizedRows) -> Tensor:
        product = fp8_linear if self.precision == "fp8" else int8_rows_matmul
        return product(x, QuantizedRows(self.values, self.scale, x.dtype), self.bias)

    @not_compiled  # the threshold moves with every call
    def _int8(self, x: Tensor) -> Tensor:
        blocks = self.shared.quantize(x)
        assert isinstance(blocks, QuantizedBlocks)
        weight = QuantizedBlocks(self.values, self.scale, None, None, None, x.dtype)
        return int8_matmul(blocks, weight, self.bias).view(*x.shape[:-1], self.out_features)

    @property
    def linear(self) -> nn.Linear:
        """The linear in whose place this is."""
        return self._kept[0]

    @property
    def weight(self) -> Tensor:
        """The 16-bit weight, in CPU memory."""
        return self.linear.weight

    def keep_sample(self) -> None:
        """Keep a few output channels of the 16-bit weight on the device."""
        self.sampled = slice(None, None, -(-self.out_features // SAMPLED))
        self.sample = self.weight.detach()[self.sampled].contiguous().to(self.values.device)

    def take_own(self) -> None:
        """Compute with the 16-bit weight from now on, until the next run."""
        if self.own is None:
            self.own, self.probe = self.weight.detach().to(self.values.device), None
            self.shared.users -= 1

    def wait(self, warm_up: bool) -> None:
        """Compute with the 16-bit weight while a warm-up lasts."""
        if warm_up and self.own is None:
            self.take_own()
            self.waiting = True
        elif not warm_up and self.waiting:
            self._let_go()

    def _let_go(self) -> None:
        self.own, self.waiting = None, False
        self.shared.users += 1

    def begin_run(self) -> None:
        """Forget what the last run taught: 8 bits again, and in INT8 another first threshold."""
        if self.own is not None:
            self._let_go()
        self.probe = None
        if self.shared.steering is not None:
            self.shared.steering.threshold = None

    def original(self) -> nn.Linear:
        """The linear in whose place this is, with its weight where the quantised one is."""
        self.linear.weight.data = self.weight.data.to(self.values.device)
        return self.linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves go with the model; casts change bias and kept weight alone."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        kept = self.weight
        kept.data = kept.data.to(fn(kept.data.new_empty(0)).dtype)
        if self.own is not None:
            self.own = fn(self.own)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A checkpoint holds the 16-bit weight, as without us."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors = args[-1]
        errors.append(f"{prefix}weight is in 8 bits: call svg.restore(pipe), load the weights, and accelerate again")

    def extra_repr(self) -> str:
        """For print(model)."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.precision}"


def quantize_weight(weight: Tensor, precision: str) -> QuantizedRows | QuantizedBlocks:
    """A weight [N, K] in 8 bits: "fp8", "int8-rows" or "int8"."""
    if precision == "int8":
        return quantize_blocks(weight)
    return (quantize_rows if precision == "fp8" else quantize_int8_rows)(weight)


def find_linears(transformer: nn.Module, spec: ModelSpec, which: str, name: str = "transformer") -> list[str]:
    """Names of the linears that a policy puts in 8 bits.

    Only plain nn.Linear counts, and one that is in 8 bits already, by us: what a user quantised with torchao or bitsandbytes,
    wrapped, or gave hooks, stays as it is.

    Args:
        transformer: the transformer.
        spec: its family.
        which: "none", "feed_forward" or "all" (projections of the video attention too). The first and the last block stay
            in 16 bits where there are at least four, and so does all that is outside of blocks. Or a file of
            `svg adapt-linears`, which names some of "all".
        name: of the transformer in its pipeline.

    Returns:
        Names in the transformer, in its order.

    Raises:
        NotImplementedError: there are none, though some are wanted.
        ValueError: no such file, or one of another model.
    """
    if which == "none":
        return []
    if which not in LINEARS:
        return _listed(list(read_linears(which, name)), find_linears(transformer, spec, "all"), which)
    attentions = {id(module) for module in spec.attention_modules(transformer)}
    paths = [name for name, module in transformer.named_modules() if id(module) in attentions]
    blocks = {name.rpartition(".")[0]: name.rpartition(".")[2] for name in _in_order(transformer, spec, paths)}
    chosen = list(blocks)[1:-1] if len(blocks) >= EDGES_FROM else list(blocks)
    found = [
        f"{block}.{name}" if block else name
        for block in chosen
        for name in linears_of_block(transformer.get_submodule(block), blocks[block], which)
    ]
    if not found:
        raise NotImplementedError(
            f"linears must be none for this {type(transformer).__name__}, got {which!r}: it has no plain linears in its "
            f"blocks (quantised, wrapped, or offloaded one by one ones are left alone)"
        )
    return found


def plain_linear(transformer: nn.Module, name: str) -> nn.Linear:
    """The linear of a name that `find_linears` gave."""
    linear = transformer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _listed(wanted: list[str], known: list[str], path: str) -> list[str]:
    """Known names that are wanted; what LoRA wraps is known by the name that it had before."""
    there, wanted = {_unwrapped(name): name for name in known}, [_unwrapped(name) for name in wanted]
    if missing := sorted(set(wanted) - set(there)):
        raise ValueError(
            f"{path} must be of this model, got {missing[0]}, which is no linear of it that can be in 8 bits: "
            "make it again with `svg adapt-linears`"
        )
    return [there[name] for name in there if name in set(wanted)]


def _unwrapped(name: str) -> str:
    return name.removesuffix(".base_layer")


def _in_order(transformer: nn.Module, spec: ModelSpec, paths: list[str]) -> list[str]:
    """Paths of the attention modules in the order of their layers."""
    place = {id(module): index for index, module in enumerate(spec.attention_modules(transformer))}
    return sorted(paths, key=lambda path: place[id(transformer.get_submodule(path))])


def linears_of_block(block: nn.Module, attention: str, which: str) -> Iterator[str]:
    """Names of the linears of one block, as `find_linears` has them.

    Args:
        block: the block.
        attention: name of its video attention.
        which: "feed_forward" or "all".
    """
    joint = any(name.startswith("proj_mlp") for name, _ in block.named_modules())
    for name, module in block.named_modules():
        if not _is_plain(module) or _NOT.search(name):
            continue
        inside = name.removeprefix(attention + ".") if name.startswith(attention + ".") else None
        if inside is not None:
            if which == "all" and _PROJECTIONS.fullmatch(inside):
                yield name
        elif _FEED_FORWARD.fullmatch(name) or (joint and _JOINT_OUT.fullmatch(name)):
            yield name


def _is_plain(module: nn.Module) -> bool:
    if type(module) is QuantizedLinear and is_untouched(module):
        module = module.linear
    if type(module) is not nn.Linear or not is_untouched(module):
        return False
    weight = module.weight
    fits = module.in_features % 16 == module.out_features % 16 == 0 and module.in_features <= MAX_WIDTH
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.device.type != "meta"
    return fits and plain and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody listens to a module's calls or has replaced its forward."""
    hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations")
    return not (
        hooked or "forward" in vars(module) or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
    )


def takes_rows(*linears: Any, precision: str = "fp8") -> bool:
    """Whether linears can be called with quantised rows, past whatever else would see the call.

    Args:
        linears: any modules.
        precision: of the rows, "fp8" or "int8-rows".
    """
    plain = (type(linear) is QuantizedLinear and is_untouched(linear) for linear in linears)
    # A guard that probes this forward compares with the product of what the rows were before.
    return all(plain) and all(one.precision == precision and one.own is None and one.probe is None for one in linears)


def quantize_linears(transformer: nn.Module, names: Iterable[str], precision: str = "auto") -> list[str]:
    """Put linears in 8 bits, one after the other: all of them, or after an error none.

    Args:
        transformer: the transformer.
        names: of plain linears in it.
        precision: "fp8", "int8-rows", "int8", or "auto": see `best_precision`.

    Returns:
        The names, for `restore_linears`.
    """
    names = list(names)
    precision = best_precision(transformer) if precision == "auto" else precision
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = _unwrapped(name).rpartition(".")
        if own in ALIKE:
            groups.setdefault(parent, []).append(name)
    shared = {}
    for group in groups.values():
        shared |= dict.fromkeys(group, SharedInput(len(group), precision))
    try:
        for name in names:
            _put(transformer, name, QuantizedLinear(plain_linear(transformer, name), precision, shared.get(name)))
    except BaseException:
        restore_linears(transformer, names)
        raise
    return names


def all_quantized(transformer: nn.Module, names: Iterable[str]) -> bool:
    """Whether linears are still those that `quantize_linears` put there."""
    there = dict(transformer.named_modules())
    return all(type(there.get(name)) is QuantizedLinear for name in names)


def _computing(device: torch.device) -> torch.device:
    """Where weights are quantised: those in CPU memory one by one on the GPU, if there is one."""
    return torch.device("cuda") if device.type == "cpu" and torch.cuda.is_available() else device


def best_precision(transformer: nn.Module) -> str:
    """What "auto" stands for: rotated INT8 rows, but FP8 where they have no kernel as fast: on all GPUs with FP8 but Hopper.

    Args:
        transformer: the transformer, on the device that it runs on or in CPU memory before that.
    """
    device = _computing(next(transformer.parameters()).device)
    slower = device.type != "cuda" or not hopper.is_there(device)
    return "fp8" if target.has_fp8(device) and slower else "int8-rows"


def restore_linears(transformer: nn.Module, names: Iterable[str]) -> None:
    """Undo `quantize_linears`, one after the other; what somebody put in the place of one since stays.

    Args:
        transformer: the transformer.
        names: what `quantize_linears` returned.
    """
    for name in names:
        try:
            module = transformer.get_submodule(name)
        except AttributeError:  # removed with what held it, as unfused projections are
            continue
        if isinstance(module, QuantizedLinear):
            _put(transformer, name, module.original())


def _put(transformer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    transformer.get_submodule(parent)._modules[own] = module
