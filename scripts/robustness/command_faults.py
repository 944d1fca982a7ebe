"""Wrong command lines: families of faults x commands x options, in a folder that `world.build` filled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from world import PROMPT, SIZE


@dataclass(frozen=True)
class Case:
    """One wrong command line.

    Args:
        family: of the fault.
        arguments: after `svg`.
        names: words of which the error must have one: the argument, as people or files spell it.
        given: what was given, of which the error must have a piece; "" where it is not text to be repeated.
        files: to write before.
        late: whether it may be found only when the model is loaded.
    """

    family: str
    arguments: tuple[str, ...]
    names: tuple[str, ...]
    given: str = ""
    files: dict[str, str] = field(default_factory=dict)
    late: bool = False


LPIPS = ("--lpips", "none")
MODEL = ("--model", "model", *SIZE, "--device", "cpu")
BASES = {
    "generate": ("generate", PROMPT, *MODEL, *LPIPS, "--out", "new"),
    "sweep": ("sweep", "--prompt", PROMPT, *MODEL, *LPIPS, "--methods", "svg1", "--out", "new"),
    "record": ("record", PROMPT, *MODEL, "--out", "new"),
    "tune": ("tune", "--min-psnr", "9", "--prompt", "a cat", "--held-out", "a dog", *MODEL, "--steps", "6", *LPIPS, "--out", "new"),
    "adapt-linears": ("adapt-linears", PROMPT, *MODEL, "--out", "new"),
    "adapt": ("adapt", "q.safetensors", "--device", "cpu", "--out", "new"),
    "sparge-tune": ("sparge-tune", "q.safetensors", "--device", "cpu", "--out", "new"),
    "evaluate": ("evaluate", "a.mp4", "b.mp4", "--device", "cpu", *LPIPS),
}  # fmt: skip
GENERATING = ("generate", "sweep", "record", "tune", "adapt-linears")
DENSE = ("record", "adapt-linears")  # whose one run is dense: no method, no comparison

NO_INTEGERS = ("x", "", "1.5", "1e3", "nan", "0x10", "1,5", "--")
INTEGERS = {
    "height": ("-1", "0", "33", "16000000", "9" * 30),
    "width": ("-16", "0", "17", "16000000", "9" * 30),
    "frames": ("-1", "0", "8", "16000001", "9" * 30),
    "steps": ("-1", "0", "16000000", "9" * 30),
    "fps": ("-1", "0", "16000000", "9" * 30),
    "seed": ("-1", str(2**63), "9" * 30),
}
NO_NUMBERS = ("x", "", "nan", "1,5", "--", "0x1", "inf", "-inf", "1e999")
NUMBERS = {
    "guidance": ("-1", "-1e-9", "1e30"),
    "true-cfg": ("-1", "0.5", "2", "1"),
    "flow-shift": ("-1", "0", "1e30"),
}
DEVICES = ("", "gpu", "cuda", "cuda:0", "cuda:99", "cuda:-1", "CPU", "cpu:0", "meta", "mps", "cuda:x", "auto ", "0")
NO_CHOICES = ("", "x", "none ", "NONE", "1")
NO_MODELS = (
    "", "no/such/folder/", "./no", "/no/such", "none", "a.mp4", "folder", "empty", "dangling", "loop", "pipe", "~/no-such",
    "a b/c", "model/..", "../x", "https://example.com/a/b", "x" * 5000, "a/b/c", "\\x", "model/transformer", "owner/",
)  # fmt: skip
NO_FILES = (
    "none",
    "folder",
    "dangling",
    "loop",
    "empty",
    "/dev/null",
    "/dev/zero",
    "pipe",
    "x" * 300,
    "a.mp4/x",
    "no/such",
)
NO_TENSORS = ("text.txt", "code.safetensors", "half.safetensors", "huge-header.safetensors", "picture.png", "list.json")
NO_OUTPUTS = ("folder", "pipe", "no/such/x", "a.mp4/x", "/dev/null", "/proc/x", "loop", "x" * 300, "/dev/full/x")
NO_FOLDERS = ("a.mp4", "pipe", "a.mp4/x", "dangling", "loop", "/dev/null", "/proc/x", "x" * 300, "/proc/self/x/y")


def option_cases() -> Iterator[Case]:
    """Those of options, in a fixed order."""
    yield from _usage()
    for command in GENERATING:
        yield from _numbers(command)
        yield from _models(command)
        yield from _choices(command)
        yield from _texts(command)
    yield from _settings()
    yield from _generate()


def faulty(family: str, command: str, option: str, value: str, names: tuple[str, ...] = (), **more) -> Case:
    spelt = (option, option.replace("-", "_"), *names)
    return Case(family, (*BASES[command], f"--{option}={value}"), spelt, value, **more)


def _usage() -> Iterator[Case]:
    for command in (*BASES, "page", "presets", "bench", "doctor", "models"):
        base = BASES.get(command, (command,))
        yield Case("usage", (*base, "--no-such-option"), ("--no-such-option",))
        yield Case("usage", (*base, "--no-such-option=3"), ("--no-such-option",))
        yield Case("usage", (command, "-x"), ("-x",))
        yield Case("usage", (*base, *(["extra"] * 3)), ("argument", "RECORDINGS", "recording", "what", "WHAT", "extra"))
    for command in ("generate", "record", "adapt-linears", "adapt", "sparge-tune", "evaluate", "page", "sweep", "tune"):
        yield Case("usage", (command,), ("argument", "PROMPT", "prompt", "one of"))
    for word in ("", "no-such", "Generate", "generate ", "-", "--verson", "gen"):
        yield Case("usage", (word,), ("command", "option"), word)
    yield Case("usage", (), ("Usage",))
    for command, option in (("generate", "--out"), ("sweep", "--out"), ("adapt", "--out"), ("record", "--model")):
        yield Case("usage", (*BASES[command], option), ("argument",))
    for name in ("x", "", "../x", "tiny-wan.yaml", "/etc/passwd", "x" * 5000, "a.yaml", "folder", "\x1b[2J"):
        yield Case("presets", ("presets", name), ("preset",), name)
    for what in ("x", "", "ALL", "attention,kmeans"):
        yield Case("bench", ("bench", what), ("WHAT", "what", "PART"), what)
    yield Case("bench", ("bench", "attention"), ("GPU", "CUDA"))


def _numbers(command: str) -> Iterator[Case]:
    for name, wrong in INTEGERS.items():
        option = "seeds" if name == "seed" and command in ("sweep", "tune") else name
        for value in (*NO_INTEGERS, *wrong):
            if option == "seeds" and value == "1,5":
                continue
            yield faulty("integers", command, option, value, (name, f"num_{name}", "a seed", "memory"))
    for option, wrong in NUMBERS.items():
        for value in (*NO_NUMBERS, *wrong):
            yield faulty("numbers", command, option, value)


def _models(command: str) -> Iterator[Case]:
    for value in NO_MODELS:
        yield faulty("models", command, "model", value)
    for folder in sorted(Path().glob("bad-*")):
        words = (*folder.name.split("-"), "model", "config", "index")
        yield Case("broken models", (*BASES[command], "--model", str(folder)), words, folder.name)
    if command in ("generate", "record"):
        for folder in sorted(Path().glob("late-*")):
            words = (*folder.name.split("-"), "model")
            yield Case("broken weights", (*BASES[command], "--model", str(folder)), words, folder.name, late=True)


def _choices(command: str) -> Iterator[Case]:
    for value in DEVICES:
        yield faulty("devices", command, "device", value)
    for option in ("dtype", "offload", *(("lpips",) if command not in DENSE else ())):
        for value in NO_CHOICES:
            yield faulty("choices", command, option, value)
    for value in ("model", "group", "sequential"):
        yield faulty("offload on a CPU", command, "offload", value)
    if command not in DENSE:
        for method in ("", "x", "SVG1", "svg1 ", "svg1,,svg2", "none"):
            option = "methods" if command == "sweep" else "method"
            yield Case("methods", (*BASES[command], f"--{option}={method}"), ("method",), method)
    if command != "sweep":
        for value in ("", "x", "none.yaml", "folder", "folder.yaml", "/etc/passwd", "tiny-wan.yml", "x" * 5000):
            yield faulty("presets", command, "preset", value)


def _texts(command: str) -> Iterator[Case]:
    for prompt in ("", " ", "\t\n"):
        arguments = {
            "generate": ("generate", prompt, *BASES["generate"][2:]),
            "record": ("record", prompt, *BASES["record"][2:]),
            "adapt-linears": ("adapt-linears", prompt, *BASES["adapt-linears"][2:]),
            "sweep": (*BASES["sweep"], "--prompt", prompt),
            "tune": (*BASES["tune"], "--prompt", prompt),
        }[command]
        yield Case("empty prompts", arguments, ("prompt",))
        if command == "tune":
            yield Case("empty prompts", (*BASES["tune"], "--held-out", prompt), ("prompt", "held"))
    if command in ("sweep", "tune"):
        for value in ("", ",", "x", "0,,1", "0;1", "1.5", "0,-1"):
            yield faulty("lists", command, "seeds", value, ("seed",))
    if command == "sweep":
        for value in ("", "x", "0.2,,0.3", "2", "0", "-1", "nan", "inf", "0.2,7"):
            yield faulty("lists", command, "budgets", value, ("density",))
        for value in ("0", "-1", "x", ""):
            yield faulty("lists", command, "workers", value)


def wrong_settings(method: str) -> Iterator[tuple[str, str]]:
    from svg.config import METHODS

    for one in fields(METHODS[method]):
        default = one.default
        if isinstance(default, bool):
            wrong = ("maybe", "3", "null", "[]", "{}", "1.0")
        elif isinstance(default, (int, float)):
            wrong = ("x", "null", "NaN", "-7", "[1]", "{}", "true", *(("1.5",) if isinstance(default, int) else ()))
        elif isinstance(default, str):
            wrong = ("x", "3", "null", "[]", "{}", "true", '""')
        else:
            wrong = ("xyz", "-7", "{}", "[[2.0]]", "NaN", "false", "[[]]", '[["a"]]')
        for value in wrong:
            if (one.name, value) not in (("smooth_q", "false"), ("fused", "false"), ("cuda_graphs", "false")):
                yield one.name, value


def shown(value: str) -> str:
    """What an error must repeat of a value: nothing of a nested one, whose piece it names."""
    return "" if value.startswith(("[[", "{")) else value.strip('"')


def _settings() -> Iterator[Case]:
    from svg.config import METHODS

    for method in METHODS:
        for name, value in wrong_settings(method):
            arguments = (*BASES["generate"], "--method", method, "--set", f"{name}={value}")
            yield Case("settings", arguments, (name, "head_", "budget", "topk"), shown(value))
        for text in ("x", "=1", "", "no_such=1", "method=svg1"):
            yield Case(
                "settings",
                (*BASES["generate"], "--method", method, "--set", text),
                ("set", "key", "method", "=1"),
                text,
            )
    for method in ("svg2", "near"):
        for name, value in wrong_settings(method):
            arguments = (*BASES["tune"], "--method", method, "--set", f"{name}={value}")
            yield Case("settings of tune", arguments, (name, "head_", "budget", "topk", "preset"), shown(value))
    for method in ("sage2", "sage3"):
        for name, value in wrong_settings(method):
            yield Case(
                "settings of adapt",
                (*BASES["adapt"], "--method", method, "--set", f"{name}={value}"),
                (name,),
                shown(value),
            )
    for option in ("budget", "density", "top-p", "topk", "cdf", "warmup-steps", "warmup-layers"):
        for value in ("x", "", "nan", "2", "-1", "inf"):
            method = {"density": "svg1", "topk": "sparge", "cdf": "sparge", "top-p": "svg2"}.get(option, "svg2")
            arguments = (*BASES["generate"], "--method", method, f"--{option}={value}")
            yield Case("settings", arguments, (option, option.replace("-", "_")), value)


def _generate() -> Iterator[Case]:
    base = BASES["generate"]
    for option in ("image", "last-image"):
        for value in (*NO_FILES, "text.txt", "half.png", "bomb.png", "q.safetensors", "a.mp4"):
            for model in ("model", "i2v"):
                extra = ("--image", "picture.png") if option == "last-image" and model == "i2v" else ()
                arguments = (*base, "--model", model, *extra, f"--{option}={value}")
                yield Case("pictures", arguments, (option, option.replace("-", "_")), value)
        yield Case("pictures", (*base, f"--{option}", "picture.png"), ("image", "last_image"))
    yield Case("pictures", (*base, "--model", "i2v"), ("image",))
    for value in (*NO_FILES, "latin.txt", "blank.txt", "q.safetensors"):
        yield Case("prompts", ("generate", *base[2:], f"--prompts={value}"), ("prompts", "--prompts"), value)
    yield Case("prompts", (*base, "--prompts", "text.txt"), ("PROMPT", "prompts"))
    for value in (*NO_FILES[:6], *NO_TENSORS, "q.safetensors"):
        arguments = (*base, "--method", "sparge", f"--thresholds={value}")
        yield Case("thresholds", arguments, ("thresholds",), value)
        for method in ("sage2", "sage2++", "sage3"):
            arguments = (*base, "--method", method, "--set", f"layers={json.dumps(value)}")
            yield Case("layers", arguments, ("layers", "precisions"), value)
    for text in (
        "x",
        "first-block=x",
        "taylorseer=1.5",
        "=",
        "first-block=nan",
        "first-block=-1",
        "taylorseer=0",
        "taylorseer=-3",
    ):
        yield Case("caches", (*base, f"--cache={text}"), ("cache",), text.rpartition("=")[2])
    for text in (
        "none.safetensors",
        "./none",
        "~/none",
        "/no/x",
        "",
        "=2",
        "code.safetensors",
        "q.safetensors=x",
        "model=nan",
    ):
        yield Case("loras", (*base, f"--lora={text}"), ("lora",), text.partition("=")[0], late=True)
    for option in ("revision", "variant"):
        for value in ("x", "", "../x", "fp16"):
            yield Case("revisions", (*base, f"--{option}={value}"), (option,), value)
    yield from _linears_and_gpus()
    for text in ("magcache", "magcache=none", "magcache=folder", "magcache=pipe", "magcache=list.json", "magcache=deep.json",
                 "magcache=ratios-0.json", "magcache=ratios-1.json", "magcache=ratios-2.json", "dbcache=nan"):  # fmt: skip
        yield Case("caches", (*base, f"--cache={text}"), ("cache", "deep.json"), text.rpartition("=")[2])
    for value in ("[" * 100_000, "9" * 6000):
        yield Case("settings", (*base, "--set", f"budget={value}"), ("--set", "budget"), value)
    yield Case("rivals", (*base, "--method", "dense", "--no-dense"), ("no-dense",))
    yield Case("rivals", (*base, "--method", "dense", "--fast"), ("no-dense", "fast"))
    for pair in (("budget", "density"), ("topk", "cdf")):
        flags = [word for name in pair for word in (f"--{name}", "0.3")]
        yield Case("rivals", (*base, "--method", "sparge", *flags), (*pair,))
    for net in ("alex",):
        yield Case("sizes for lpips", (*base, "--lpips", net, "--height", "16", "--width", "16"), ("height",))
    yield Case("earlier results", (*base, "--out", "run"), ("out",), "run")


def _linears_and_gpus() -> Iterator[Case]:
    base = BASES["generate"]
    for value in ("", "x", "ALL", "folder", "pipe", "q.safetensors", "none.json", "list.json", "deep.json", "layers.json",
                  "linears-other.json", "linears-text.json", "linears-precision.json", "linears-mixed.json",
                  f"{'x' * 300}.json", "a.mp4/x.json", "/dev/null/x.json", ".json"):  # fmt: skip
        for method in ("near", "svg1", "dense"):
            yield Case(
                "linears", (*base, "--method", method, f"--linears={value}"), ("linears", "precision", "json"), value
            )
    for value in ("0", "-1", "x", "", "1.5", "3", "1000", "9" * 30):
        yield Case("gpus", (*base, f"--gpus={value}"), ("gpus",), value)
    for words in (("--split", "x"), ("--split", "branches"), ("--split", "branches", "--gpus", "3"),
                  ("--split", "branches", "--gpus", "2", "--guidance", "1"), ("--gpus", "2", "--device", "cuda:0"),
                  ("--split", "branches", "--gpus", "2", "--guidance", "nan"), ("--gpus", "2", "--split", "x")):  # fmt: skip
        yield Case("gpus", (*base, *words), ("split", "device", "guidance"), words[-1])
    for value in ("nan", "0", "-1", "inf", "x", ""):
        yield Case("numbers", (*BASES["adapt-linears"], f"--max-error={value}"), ("max-error", "max_error"), value)
