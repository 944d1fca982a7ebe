"""Some two thousand wrong calls of the Python API, each of which must be refused in words that name the argument.

    python scripts/robustness/wrong_calls.py [--out wrong.json] [--only accelerate] [--sample 200]

Exit code 1 if a call is taken, ends in another exception than ValueError, TypeError or NotImplementedError, or says neither
the argument nor the rule.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from world import save_model

import svg
from svg.config import METHODS
from svg.pipelines import GenerationRequest, load_pipeline, validate_request

RULE = ("must", "missing", "not supported", "needs", "unknown key", "no meaning", "no attribute")
ODD = (
    None,
    3,
    -1,
    1.5,
    math.nan,
    "x",
    "",
    b"x",
    True,
    [],
    {},
    (),
    object(),
    1j,
    np.zeros(2),
    torch.zeros(2),
    "x" * 5000,
)
EXTREME = (
    10**40,
    -(10**40),
    2**63,
    math.inf,
    -math.inf,
    "\x00",
    "\ud800",
    [[[[]]]],
    {"a": {"b": None}},
    set(),
    range(3),
)


@dataclass(frozen=True)
class Call:
    """One wrong call.

    Args:
        function: its name, for the report.
        call: makes it.
        names: words of which the error must have one.
        what: what is wrong, for the report.
    """

    function: str
    call: Callable[[], Any]
    names: tuple[str, ...]
    what: str


def table() -> ModuleType:
    """The tests' table of wrong arguments of attention."""
    path = Path(__file__).parents[2] / "tests" / "functional" / "test_arguments.py"
    spec = importlib.util.spec_from_file_location("wrong_arguments", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calls(model: Path) -> Iterator[Call]:
    """All of them.

    Args:
        model: directory of a tiny pipeline.
    """
    yield from _attention()
    yield from _settings()
    yield from _layouts()
    pipe = load_pipeline(model, device="cpu")
    yield from _pipes(pipe)
    yield from _requests(pipe)
    yield from _loading(model)
    yield from _models(pipe)


def _attention() -> Iterator[Call]:
    tests = table()
    for function, name, kind, index in tests.CALLS:
        if kind is not None:
            change, what = dict.fromkeys(name, tests.TENSORS[kind]), f"{name} {kind}"
        else:
            change, what = {name: partial(_self, tests.OPTIONS[function][name][index])}, f"{name} {index}"
        names = ("q", "k", "v", "frames", "cu_seqlens", "attn_mask", name, *tests.OPTIONS[function])
        yield Call(function, partial(_attend, tests, function, change, {}), names, what)
    # The same again for calls that are right in another way: other dtypes and layouts, shared heads, causal.
    for function in ("attention", "sparge_attention", "training_attention", "attention_varlen"):
        bases: tuple[dict[str, Any], ...] = (
            {"dtype": torch.float16},
            {"dtype": torch.bfloat16, "causal": True},
            {"shared": True},
        )
        for base, name, kind in itertools.product(bases, ("q", "k", "v"), tests.TENSORS):
            if _fits(function, base, name, kind) or tests.may_be_right(function, name, kind):
                continue
            change = {name: tests.TENSORS[kind]}
            yield Call(
                function, partial(_attend, tests, function, change, base), ("q", "k", "v"), f"{base} {name} {kind}"
            )


def _self(value: Any) -> Any:
    return value


def _fits(function: str, base: dict[str, Any], name: str, kind: str) -> bool:
    """Whether a wrong tensor is right beside the tensors of a base."""
    dtype = {"other dtype": torch.bfloat16}.get(kind)
    return dtype is not None and dtype == base.get("dtype")


def _attend(tests: ModuleType, function: str, change: dict[str, Callable], base: dict[str, Any]) -> Any:
    given = tests.arguments(function)
    dtype = base.get("dtype", torch.float32)
    given = {name: x.to(dtype) if name in "qkv" else x for name, x in given.items()}
    if base.get("shared"):
        heads = 1 if function == "attention_varlen" else slice(0, 1)
        for name in "kv":
            given[name] = given[name][:, :heads] if heads != 1 else given[name][:, :1]
        given["enable_gqa"] = True
    if base.get("causal") and function != "sparge_attention":
        given["is_causal"] = True
    return getattr(svg, function)(**{**given, **{name: make() for name, make in change.items()}})


def _settings() -> Iterator[Call]:
    for method, config in METHODS.items():
        for one in fields(config):
            for value in (*ODD, *EXTREME):
                if not _may_be(one.default, value, one.name):
                    settings = {"method": method, one.name: value}
                    names = (one.name, "budget", "refresh", "topk", "head_", "precision")
                    yield Call(
                        "config_from_dict",
                        partial(svg.config_from_dict, settings),
                        names,
                        f"{method} {one.name}={value!r}"[:90],
                    )
        for key in ("no_such", "", 3, None, ("a",)):
            yield Call(
                "config_from_dict",
                partial(svg.config_from_dict, {"method": method, key: 1}),
                ("key",),
                f"{method} {key!r}",
            )
    for value in (*ODD, *EXTREME):
        if not isinstance(value, dict):
            yield Call("config_from_dict", partial(svg.config_from_dict, value), ("settings",), repr(value)[:60])
        yield Call("config_from_dict", partial(svg.config_from_dict, {"method": value}), ("method",), repr(value)[:60])
        yield Call("load_preset", partial(svg.load_preset, value), ("preset",), repr(value)[:60])


def _may_be(default: Any, value: Any, name: str) -> bool:
    """Whether a setting may have a value: where numbers, flags, texts or nothing are fine."""
    if value is None:
        return default is None or name in ("topk",)
    if isinstance(value, bool):
        return isinstance(default, bool) or name in ("smooth_q", "fused", "cuda_graphs")
    if isinstance(value, str):
        return name in ("thresholds", "layers")
    if isinstance(value, int) and isinstance(default, int) and not isinstance(default, bool):
        return value > 0
    if name == "simthresh" and isinstance(value, int) and value == -1:
        return True
    if isinstance(value, (int, float)) and name in ("tolerance", "max_drift", "pv_threshold"):
        return value > 0
    return False


def _layouts() -> Iterator[Call]:
    right = dict(frames=2, height=2, width=2, text_tokens=2, text_position="last")
    for name, value in itertools.product(right, (*ODD, *EXTREME)):
        if (name == "text_position") or not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            names = (name, "text_position", "text_tokens")
            yield Call(
                "TokenLayout", partial(svg.TokenLayout, **{**right, name: value}), names, f"{name}={value!r}"[:60]
            )


def _pipes(pipe: Any) -> Iterator[Call]:
    no_pipes = [
        *ODD,
        torch.nn.Linear(2, 2),
        SimpleNamespace(transformer=3),
        SimpleNamespace(transformer=torch.nn.Linear(2, 2)),
        str,
        pipe.vae,
    ]
    for value in no_pipes:
        for name in ("accelerate", "restore", "report", "summary"):
            if name == "restore" and isinstance(getattr(value, "transformer", value), torch.nn.Module):
                continue  # what is not accelerated is left as it is
            yield Call(name, partial(getattr(svg, name), value), ("pipe", "transformer"), repr(value)[:60])
        yield Call("accelerated", partial(_enter, svg.accelerated, value), ("pipe", "transformer"), repr(value)[:60])
        if not isinstance(value, torch.nn.Module):
            yield Call("at_step", partial(_enter, svg.at_step, value, 0, 2), ("transformer",), repr(value)[:60])
        yield Call("int8_training", partial(_enter, svg.int8_training, value), ("transformer",), repr(value)[:60])
        yield Call(
            "context_parallel_plan", partial(svg.context_parallel_plan, value), ("transformer",), repr(value)[:60]
        )
    for name in ("report", "summary"):
        yield Call(name, partial(getattr(svg, name), pipe), ("pipe",), "plain")
    for value in (*ODD, *EXTREME, "tiny-wan:x", "x:svg1", ":svg1", "tiny-wan:", "SVG1", "balanced "):
        if value is not None:
            yield Call(
                "accelerate", partial(svg.accelerate, pipe, value), ("config", "method", "settings"), repr(value)[:60]
            )
            yield Call(
                "accelerated",
                partial(_enter, svg.accelerated, pipe, value),
                ("config", "method", "settings"),
                repr(value)[:60],
            )
        if not isinstance(value, str) or value not in ("int8", "bf16"):
            yield Call(
                "int8_training",
                partial(_enter, svg.int8_training, pipe.transformer, value),
                ("gradients",),
                repr(value)[:60],
            )
        if not (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 8):
            yield Call(
                "at_step", partial(_enter, svg.at_step, pipe.transformer, value, 8), ("step",), f"step {value!r}"[:60]
            )
        if not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            yield Call(
                "at_step",
                partial(_enter, svg.at_step, pipe.transformer, 0, value),
                ("num_steps",),
                f"steps {value!r}"[:60],
            )
        if not isinstance(value, str):
            yield Call(
                "at_step",
                partial(_enter, svg.at_step, pipe.transformer, 0, 2, value),
                ("branch",),
                f"branch {value!r}"[:60],
            )
        for noise in (value, [value], [value, 0.5], [0.5, 0.25, value]):
            if noise is None:
                continue
            yield Call(
                "at_step",
                partial(_enter, svg.at_step, pipe.transformer, 0, 2, "cond", noise),
                ("noise",),
                f"noise {noise!r}"[:60],
            )


def _enter(context: Callable, *arguments: Any) -> None:
    with context(*arguments):
        pass


def _requests(pipe: Any) -> Iterator[Call]:
    right = dict(prompt="a", height=32, width=48, num_frames=9, steps=2, guidance=5.0, seed=0, fps=16)
    optional = ("negative_prompt", "true_cfg", "image", "last_image", "max_sequence_length")
    picture = Image.new("RGB", (48, 32))
    for name in (*right, *optional):
        for value in (*ODD, *EXTREME, 33, 8, 16_000_000, "1", picture):
            if _may_request(name, value):
                continue
            request = {**right, name: value}
            yield Call(
                "GenerationRequest", partial(_validate, pipe, request), (name, "memory"), f"{name}={value!r}"[:60]
            )
    for name in ("prompt", "height", "width", "num_frames"):
        request = {key: value for key, value in right.items() if key != name}
        yield Call("GenerationRequest", partial(_validate, pipe, request), (name,), f"no {name}")


def _validate(pipe: Any, request: dict[str, Any]) -> None:
    validate_request(pipe, GenerationRequest(**request))


def _may_request(name: str, value: Any) -> bool:
    if name in ("prompt", "negative_prompt"):
        return (isinstance(value, str) and bool(value.strip() or name != "prompt")) or (
            value is None and name != "prompt"
        )
    if value is None:
        return name in ("true_cfg", "image", "last_image", "max_sequence_length")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "guidance":
        return number and 0 <= value <= 1000
    if name == "max_sequence_length":
        return number and isinstance(value, int) and 1 <= value <= 512
    if name in ("steps", "fps"):
        return number and isinstance(value, int) and 1 <= value <= 1000
    if name == "num_frames" and isinstance(value, int) and value == 33:
        return True
    return name == "seed" and number and isinstance(value, int) and 0 <= value < 2**63


def _loading(model: Path) -> Iterator[Call]:
    fine = {"model": (None,), "device": (), "dtype": (None,), "offload": (), "flow_shift": (None, 3, 1.5), "vae_tiling": (True,),
            "revision": (None,), "variant": (None,)}  # fmt: skip
    for name, rights in fine.items():
        for value in (*ODD, *EXTREME, "cuda", "cuda:99", "tpu", torch.float64, torch.device("cpu"), "none ", "model"):
            if any(value is right or (type(value) is type(right) and value == right) for right in rights):
                continue
            options = {"model": model, "device": "cpu", name: value}
            yield Call(
                "load_pipeline", partial(load_pipeline, **options), (name, "weights", "fp16"), f"{name}={value!r}"[:60]
            )


def _models(pipe: Any) -> Iterator[Call]:
    right: dict[str, Any] = dict(
        transformer="MyTransformer", attention_modules=list, layout=lambda config, arguments: None
    )
    callables = ("attention_modules", "layout", "processor", "patch", "cp_plan")
    texts = ("transformer", "latents", "timestep", "kind", "tested")
    lists = ("arguments", "replaces", "pipelines", "fp32_components", "others", "hub")
    for value in (*ODD, *EXTREME):
        yield Call("register_model", partial(svg.register_model, value), ("spec",), repr(value)[:60])
        for name in (*callables, *texts, *lists, "parallel"):
            if _may_spec(name, value, texts, lists):
                continue
            spec = {**right, name: value}
            yield Call("ModelSpec", partial(_register, spec), (name,), f"{name}={value!r}"[:60])
    yield Call(
        "register_model",
        partial(_register, {**right, "transformer": type(pipe.transformer).__name__}),
        ("transformer",),
        "known",
    )


def _may_spec(name: str, value: Any, texts: tuple[str, ...], lists: tuple[str, ...]) -> bool:
    if name in texts:
        return isinstance(value, str) and value != ""
    if name in lists:
        return isinstance(value, (tuple, list)) and not value
    if name == "parallel":
        return isinstance(value, bool)
    return value is None and name in ("patch", "cp_plan") or (name == "cp_plan" and isinstance(value, dict))


def _register(spec: dict[str, Any]) -> None:
    svg.register_model(svg.ModelSpec(**spec))


def judge(call: Call) -> str | None:
    """What is wrong with how a call ends, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.call()
    except (ValueError, TypeError, NotImplementedError) as error:
        words = str(error)
        if len(words) > 1500:
            return f"long: {len(words)} letters"
        if not any(rule in words for rule in RULE):
            return f"no words of ours: {type(error).__name__}: {words[:150]}"
        return None if any(name in words for name in call.names) else f"names no argument: {words[:150]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "taken"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every call here, as JSON")
    parser.add_argument("--only", default="", help="functions that begin with this")
    parser.add_argument("--sample", type=int, help="so many calls, drawn at random")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_model("wan", Path(folder, "model"))
        chosen = [call for call in calls(model) if call.function.startswith(options.only)]
        if options.sample is not None:
            chosen = random.Random(0).sample(chosen, min(options.sample, len(chosen)))
        rows = [{"function": call.function, "what": ascii(call.what), "problem": judge(call)} for call in chosen]
    wrong = [row for row in rows if row["problem"]]
    for row in wrong:
        print(ascii(f"{row['function']} | {row['what']} | {row['problem']}"))
    print(f"{len(rows)} calls, {len(wrong)} not as they must be: {dict(Counter(row['function'] for row in wrong))}")
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
