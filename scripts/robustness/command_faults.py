"""Wrong command lines: families of faults x commands x options, in a folder that `world.build` filled."""

from __future__ import annotations

import contextlib
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
    "adapt": ("adapt", "q.safetensors", "--device", "cpu", "--out", "new"),
    "sparge-tune": ("sparge-tune", "q.safetensors", "--device", "cpu", "--out", "new"),
    "evaluate": ("evaluate", "a.mp4", "b.mp4", "--device", "cpu", *LPIPS),
}  # fmt: skip
GENERATING = ("generate", "sweep", "record", "tune")

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


def cases() -> Iterator[Case]:
    """All of them, in a fixed order."""
    yield from _usage()
    for command in GENERATING:
        yield from _numbers(command)
        yield from _models(command)
        yield from _choices(command)
        yield from _texts(command)
    yield from _settings()
    yield from _generate()
    yield from _documents()
    yield from _grids()
    yield from _recordings()
    yield from _outputs()
    yield from _measuring()
    yield from _folders()


def _with(family: str, command: str, option: str, value: str, names: tuple[str, ...] = (), **more) -> Case:
    spelt = (option, option.replace("-", "_"), *names)
    return Case(family, (*BASES[command], f"--{option}={value}"), spelt, value, **more)


def _usage() -> Iterator[Case]:
    for command in (*BASES, "page", "presets", "bench", "doctor", "models"):
        base = BASES.get(command, (command,))
        yield Case("usage", (*base, "--no-such-option"), ("--no-such-option",))
        yield Case("usage", (*base, "--no-such-option=3"), ("--no-such-option",))
        yield Case("usage", (command, "-x"), ("-x",))
        yield Case("usage", (*base, *(["extra"] * 3)), ("argument", "RECORDINGS", "recording", "what", "WHAT", "extra"))
    for command in ("generate", "record", "adapt", "sparge-tune", "evaluate", "page", "sweep", "tune"):
        yield Case("usage", (command,), ("argument", "PROMPT", "prompt", "one of"))
    for word in ("", "no-such", "Generate", "generate ", "-", "--verson", "gen"):
        yield Case("usage", (word,), ("command", "option"), word)
    yield Case("usage", (), ("Usage",))
    for command, option in (("generate", "--out"), ("sweep", "--out"), ("adapt", "--out"), ("record", "--model")):
        yield Case("usage", (*BASES[command], option), ("argument",))
    for name in ("x", "", "../x", "tiny-wan.yaml", "/etc/passwd", "x" * 5000, "a.yaml", "folder", "\x1b[2J"):
        yield Case("presets", ("presets", name), ("preset",), name)
    for what in ("x", "", "ALL", "attention,kmeans"):
        yield Case("bench", ("bench", what), ("WHAT", "what"), what)
    yield Case("bench", ("bench", "attention"), ("GPU", "CUDA"))


def _numbers(command: str) -> Iterator[Case]:
    for name, wrong in INTEGERS.items():
        option = "seeds" if name == "seed" and command in ("sweep", "tune") else name
        for value in (*NO_INTEGERS, *wrong):
            if option == "seeds" and value == "1,5":
                continue
            yield _with("integers", command, option, value, (name, f"num_{name}", "a seed", "memory"))
    for option, wrong in NUMBERS.items():
        for value in (*NO_NUMBERS, *wrong):
            yield _with("numbers", command, option, value)


def _models(command: str) -> Iterator[Case]:
    for value in NO_MODELS:
        yield _with("models", command, "model", value)
    for folder in sorted(Path().glob("bad-*")):
        words = (*folder.name.split("-"), "model", "config", "index")
        yield Case("broken models", (*BASES[command], "--model", str(folder)), words, folder.name)
    if command in ("generate", "record"):
        for folder in sorted(Path().glob("late-*")):
            words = (*folder.name.split("-"), "model")
            yield Case("broken weights", (*BASES[command], "--model", str(folder)), words, folder.name, late=True)


def _choices(command: str) -> Iterator[Case]:
    for value in DEVICES:
        yield _with("devices", command, "device", value)
    for option in ("dtype", "offload", *(("lpips",) if command != "record" else ())):
        for value in NO_CHOICES:
            yield _with("choices", command, option, value)
    for value in ("model", "group", "sequential"):
        yield _with("offload on a CPU", command, "offload", value)
    if command != "record":
        for method in ("", "x", "SVG1", "svg1 ", "svg1,,svg2", "none"):
            option = "methods" if command == "sweep" else "method"
            yield Case("methods", (*BASES[command], f"--{option}={method}"), ("method",), method)
    if command != "sweep":
        for value in ("", "x", "none.yaml", "folder", "folder.yaml", "/etc/passwd", "tiny-wan.yml", "x" * 5000):
            yield _with("presets", command, "preset", value)


def _texts(command: str) -> Iterator[Case]:
    for prompt in ("", " ", "\t\n"):
        arguments = {
            "generate": ("generate", prompt, *BASES["generate"][2:]),
            "record": ("record", prompt, *BASES["record"][2:]),
            "sweep": (*BASES["sweep"], "--prompt", prompt),
            "tune": (*BASES["tune"], "--prompt", prompt),
        }[command]
        yield Case("empty prompts", arguments, ("prompt",))
        if command == "tune":
            yield Case("empty prompts", (*BASES["tune"], "--held-out", prompt), ("prompt", "held"))
    if command in ("sweep", "tune"):
        for value in ("", ",", "x", "0,,1", "0;1", "1.5", "0,-1"):
            yield _with("lists", command, "seeds", value, ("seed",))
    if command == "sweep":
        for value in ("", "x", "0.2,,0.3", "2", "0", "-1", "nan", "inf", "0.2,7"):
            yield _with("lists", command, "budgets", value, ("density",))
        for value in ("0", "-1", "x", "1", "99"):
            yield _with("lists", command, "workers", value)


def _wrong_settings(method: str) -> Iterator[tuple[str, str]]:
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
            if (one.name, value) != ("smooth_q", "false"):
                yield one.name, value


def _shown(value: str) -> str:
    """What an error must repeat of a value: nothing of a nested one, whose piece it names."""
    return "" if value.startswith(("[[", "{")) else value.strip('"')


def _settings() -> Iterator[Case]:
    from svg.config import METHODS

    for method in METHODS:
        for name, value in _wrong_settings(method):
            arguments = (*BASES["generate"], "--method", method, "--set", f"{name}={value}")
            yield Case("settings", arguments, (name, "head_", "budget", "topk"), _shown(value))
        for text in ("x", "=1", "", "no_such=1", "method=svg1"):
            yield Case(
                "settings",
                (*BASES["generate"], "--method", method, "--set", text),
                ("set", "key", "method", "=1"),
                text,
            )
    for method in ("svg2", "near"):
        for name, value in _wrong_settings(method):
            arguments = (*BASES["tune"], "--method", method, "--set", f"{name}={value}")
            yield Case("settings of tune", arguments, (name, "head_", "budget", "topk", "preset"), _shown(value))
    for method in ("sage2", "sage3"):
        for name, value in _wrong_settings(method):
            yield Case(
                "settings of adapt",
                (*BASES["adapt"], "--method", method, "--set", f"{name}={value}"),
                (name,),
                _shown(value),
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
    yield Case("rivals", (*base, "--method", "dense", "--no-dense"), ("no-dense",))
    yield Case("rivals", (*base, "--method", "dense", "--fast"), ("no-dense", "fast"))
    for pair in (("budget", "density"), ("topk", "cdf")):
        flags = [word for name in pair for word in (f"--{name}", "0.3")]
        yield Case("rivals", (*base, "--method", "sparge", *flags), (*pair,))
    for net in ("alex", "vgg"):
        yield Case("sizes for lpips", (*base, "--lpips", net, "--height", "16", "--width", "16"), ("height",))
    yield Case("earlier results", (*base, "--out", "run"), ("out",), "run")


def _head_tables() -> Iterator[tuple[str, object]]:
    yield from (("one layer", [[0.5, 0.5]]), ("other heads", [[0.5]] * 3), ("three heads", [[0.5] * 3] * 3))
    yield from (("ragged", [[0.5], [0.5, 0.5], [0.5]]), ("zero", [[0.0] * 2] * 3), ("two", [[2.0] * 2] * 3))
    yield from (("text", "x"), ("flat", [0.5, 0.5]), ("empty", []), ("none in it", [[None, None]] * 3))


def _yaml_bombs() -> Iterator[tuple[str, str]]:
    yield "deep", "[" * 5000
    yield "deep mapping", "".join(f"{' ' * i}a:\n" for i in range(500))
    yield (
        "aliases",
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)),
    )
    yield "itself", "a: &a [*a]\n"
    yield "merge", "a: &a {b: 1}\nc: {<<: [*a, *a, 3]}\n"
    yield "python", "a: !!python/object/apply:os.system [ls]\n"
    yield "binary", "a: !!binary '###'\n"
    yield "digits", f"height: {'9' * 5000}\n"
    yield "sexagesimal", "height: " + ":".join(["59"] * 5000) + "\n"
    yield "date", "height: 2026-99-99\n"
    yield "two documents", "a: 1\n---\nb: 2\n"
    yield "tabs", "a:\n\t- b\n"
    yield "unclosed", "prompts: [a\n"
    yield "list", "- a\n- b\n"
    yield "number", "3\n"
    yield "empty", ""
    yield "null", "null\n"
    yield "key of a list", "? [a, b]\n: c\n"
    yield "key twice", "prompts: [a]\nprompts: [b]\n"
    yield "control", "a: \x00\n"
    yield "unknown key", "no_such_key: 3\n"
    yield "long", "# " + "x" * 2_000_000
    yield "many", "prompts: [" + "a," * 60_000 + "a]\n"
    yield "tag", "!!set {a, b}\n"
    yield "omap", "!!omap [a, b]\n"
    yield "reserved", "a: @b\n"
    yield "no anchor", "a: *b\n"


def _documents() -> Iterator[Case]:
    for name, text in _yaml_bombs():
        for command in ("generate", "record", "tune"):
            file = f"p-{command}.yaml"
            yield Case(f"presets: {name}", (*BASES[command], "--preset", file), ("yaml", "YAML"), files={file: text})
        yield Case(f"presets: {name}", ("presets", "p.yaml"), ("p.yaml",), files={"p.yaml": text})
        arguments = ("sweep", "g.yaml", "--out", "new", "--device", "cpu")
        yield Case(f"grids: {name}", arguments, ("g.yaml",), files={"g.yaml": text})
    good = {
        "model": "model",
        "source": "s",
        "generation": dict(steps=2, height=32, width=48, frames=9, guidance=5, fps=8),
    }
    for method, column in (("svg2", "head_top_p"), ("svg1", "head_density"), ("near", "head_budget")):
        for name, table in _head_tables():
            text = json.dumps({**good, method: {column: table}})
            arguments = (
                "generate",
                PROMPT,
                "--preset",
                "t.yaml",
                "--method",
                method,
                *LPIPS,
                "--out",
                "new",
                "--device",
                "cpu",
            )
            yield Case(f"head tables: {name}", arguments, (column,), files={"t.yaml": text})
        for tuned in ({}, 3, {"model": 3}, dict(model="model", fingerprint="0" * 16, tokens=[3, 2, 3], device="cpu"),
                      dict(model="x/y", fingerprint=None, tokens=[3, 2, 3], device="cpu"),
                      dict(model="model", fingerprint="x", tokens=[3, 2], device="cpu"),
                      dict(model="model", fingerprint=[], tokens="abc", device=None)):  # fmt: skip
            text = json.dumps({**good, method: {column: [[0.5] * 2] * 3, "tuned_for": tuned}})
            arguments = (
                "generate",
                PROMPT,
                "--preset",
                "t.yaml",
                "--method",
                method,
                *LPIPS,
                "--out",
                "new",
                "--device",
                "cpu",
            )
            yield Case("tuned for others", arguments, ("tuned", "tokens", "model", "device"), files={"t.yaml": text})
    for key in ("steps", "height", "width", "frames", "guidance", "fps", "flow_shift"):
        for value in ("x", None, -1, 0.5, [1], {}, True, 10**40):
            if (key, value) in (("flow_shift", None), ("guidance", 0.5), ("flow_shift", 0.5)):
                continue
            text = json.dumps({**good, "generation": {**good["generation"], key: value}})
            yield Case("generation of presets", ("generate", PROMPT, "--preset", "t.yaml", *LPIPS, "--out", "new"),
                       (key, f"num_{key}", "memory"), files={"t.yaml": text})  # fmt: skip


def _grids() -> Iterator[Case]:
    good = dict(
        models=["model"],
        prompts=["a cat"],
        methods=["svg1"],
        height=32,
        width=48,
        frames=9,
        steps=2,
        lpips="none",
        device="cpu",
    )
    wrong = (None, "", [], {}, 3, -1, 1.5, True, "x", [None], [[]], [{}], [3], 10**40, "2026-01-01")
    fine = {("seeds", (3,)), ("control", True), ("guidance", 3), ("guidance", 1.5), ("flow_shift", 3), ("flow_shift", 1.5),
            ("fps", 3), ("steps", 3), ("vae_tiling", True), ("negative_prompt", ""), ("negative_prompt", "x"), ("seeds", 10**40),
            ("prompts", "x"), ("negative_prompt", "2026-01-01")}  # fmt: skip
    for key in (
        *good, "seeds", "budgets", "control", "negative_prompt", "guidance", "true_cfg", "flow_shift", "fps", "dtype", "offload",
        "vae_tiling",
    ):  # fmt: skip
        for value in wrong:
            unset = value is None and key not in (
                "models",
                "prompts",
                "methods",
                "seeds",
                "control",
                "vae_tiling",
                "lpips",
            )
            mark = tuple(value) if isinstance(value, list) and value == [3] else value
            if unset or (not isinstance(mark, (list, dict)) and (key, mark) in fine):
                continue
            text = json.dumps({**good, key: value})
            names = (key, key.rstrip("s"), f"num_{key}", "density", "memory")
            yield Case("grids", ("sweep", "g.yaml", "--out", "new"), names, files={"g.yaml": text})
    for method in ("svg1", "svg2", "sparge", "near", "sage2"):
        for name, value in _wrong_settings(method):
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(value)
            if value == [1] or (isinstance(value, list) and value and not value[0]):
                continue
            text = json.dumps({**good, "methods": [{"method": method, name: value}]})
            yield Case(
                "grids of settings",
                ("sweep", "g.yaml", "--out", "new"),
                (name, "head_", "budget", "topk", "NaN"),
                files={"g.yaml": text},
            )
    more = {
        "image for text-to-video": {"prompts": [{"prompt": "a", "image": "picture.png"}]},
        "no image": {"models": ["i2v"]},
        "second prompt empty": {"prompts": ["a", " "]},
        "image not there": {"models": ["i2v"], "prompts": [{"prompt": "a", "image": "none.png"}]},
        "bomb": {"models": ["i2v"], "prompts": [{"prompt": "a", "image": "bomb.png"}]},
        "last image for text-to-video": {"prompts": [{"prompt": "a", "last_image": "picture.png"}]},
        "last image not there": {"models": ["i2v"], "prompts": [{"prompt": "a", "image": "picture.png", "last_image": "none"}]},
        "second model": {"models": ["model", "none"]},
        "second model broken": {"models": ["model", "bad-vae-half"]},
        "size of second model": {"models": ["model", {"model": "i2v", "preset": "tiny-wan"}], "height": 40},
        "offload": {"offload": "model"}, "no gpu": {"device": "cuda"},
        "thresholds": {"methods": ["svg1", {"method": "sparge", "thresholds": "layers.json"}]},
        "thresholds not there": {"methods": [{"method": "sparge", "thresholds": "none"}]},
        "layers": {"methods": ["svg1", {"method": "sage2", "layers": "thresholds.safetensors"}]},
        "head table": {"methods": [{"method": "svg2", "head_top_p": [[0.5, 0.5]]}]},
        "out of date": {"methods": [{"method": "svg2", "tuned_for": dict(model="model", fingerprint="0" * 16, tokens=[3, 2, 3], device="cpu")}]},
        "without end": {"methods": [{"method": "svg2", "top_p": [i / 100 for i in range(1, 99)], "num_q_clusters": list(range(1, 99))}]},
        "cells without end": {"seeds": list(range(30_000))},
    }  # fmt: skip
    for name, changes in more.items():
        text = json.dumps({**good, **changes})
        names = (
            *name.split(),
            "image",
            "prompt",
            "head_top_p",
            "these settings",
            "cells",
            "settings",
            "model",
            "device",
            "precisions",
            "vae",
            "height",
        )
        yield Case(f"whole grids: {name}", ("sweep", "g.yaml", "--out", "new"), names, files={"g.yaml": text})
    for value in (*NO_FILES, "latin.txt", "q.safetensors", "picture.png"):
        yield Case("grids", ("sweep", value, "--out", "new", "--device", "cpu"), ("grid", "YAML", "yaml"), value)


def _recordings() -> Iterator[Case]:
    wrong = [*NO_FILES, *NO_TENSORS, "thresholds.safetensors", *map(str, sorted(Path().glob("rec-*")))]
    for value in wrong:
        for command in ("adapt", "sparge-tune"):
            yield Case("recordings", (command, value, *BASES[command][2:]), ("recording", "RECORDING"), value)
        arguments = ("sweep", "--recorded", value, *MODEL, "--methods", "svg1", "--out", "new")
        yield Case("recordings", arguments, ("recording", "--recorded"), value)
        yield Case(
            "recordings",
            ("sparge-tune", "q.safetensors", value, "--device", "cpu", "--out", "new"),
            ("recording", "RECORDING"),
            value,
        )
    for option in ("record-steps", "record-layers"):
        for value in ("", "x", "99", "-9", "1.5", "0,,1"):
            yield Case(
                "recordings", (*BASES["record"], f"--{option}={value}"), (option, option.partition("-")[2]), value
            )
    for value in ("", "x", "cond,x", " "):
        yield Case("recordings", (*BASES["record"], f"--record-branches={value}"), ("branches",), value)
    for value in ("0", "-1", "2", "x", "", "nan"):
        yield Case("numbers", (*BASES["adapt"], f"--min-cosine={value}"), ("min-cosine", "min_cosine"), value)
        for option in ("l1", "l2"):
            yield Case("numbers", (*BASES["sparge-tune"], f"--{option}={value}"), ("l1", "l2"), value)
    for option in ("blocks", "rows"):
        for value in ("0", "-1", "x", "1.5", "", "9" * 30):
            yield Case("integers", (*BASES["sparge-tune"], f"--{option}={value}"), (option,), value)
    for value in DEVICES:
        for command in ("adapt", "sparge-tune", "evaluate"):
            yield Case("devices", (*BASES[command], f"--device={value}"), ("device",), value)
    for value in ("x", "", "svg1", "SAGE2"):
        yield Case("methods", (*BASES["adapt"], f"--method={value}"), ("method",), value)
    yield Case("earlier results", (*BASES["sparge-tune"], "--out", "thresholds.safetensors", "--l1", "0.01"), ("l1",))
    for value in ("text.txt", "code.safetensors", "layers.json"):
        yield Case("earlier results", (*BASES["sparge-tune"], "--out", value), ("thresholds", "out", value))


def _outputs() -> Iterator[Case]:
    for command in ("record", "adapt", "sparge-tune"):
        for value in NO_OUTPUTS:
            yield Case("outputs", (*BASES[command], f"--out={value}"), ("out",), value)
    for option in ("json", "csv"):
        for value in (*NO_OUTPUTS, "a.mp4", "./b.mp4", "videos/../a.mp4"):
            yield Case("outputs", (*BASES["evaluate"], f"--{option}={value}"), (option,), value)
    for command in ("generate", "sweep", "tune"):
        for value in NO_FOLDERS:
            yield Case("outputs", (*BASES[command], f"--out={value}"), ("out",), value)
    for command in ("adapt", "sparge-tune"):
        for value in ("q.safetensors", "./q.safetensors", "linked", "folder/../q.safetensors"):
            yield Case("inputs as outputs", (*BASES[command], "--out", value), ("out",), value)
    yield Case("inputs as outputs", (*BASES["record"], "--out", "model/model_index.json"), ("out",))
    yield Case("inputs as outputs", (*BASES["evaluate"], "--json", "x", "--csv", "./x"), ("json",))


def _measuring() -> Iterator[Case]:
    for value in (
        *NO_FILES,
        "text.txt",
        "half.mp4",
        "list.mp4",
        "q.safetensors",
        "wide.mp4",
        "long.mp4",
        "picture.png",
    ):
        yield Case(
            "videos",
            ("evaluate", "a.mp4", value, *LPIPS, "--device", "cpu"),
            ("video", "size", "frames", "output", "file", "folder"),
            value,
        )
        yield Case(
            "videos",
            ("evaluate", value, "a.mp4", *LPIPS, "--device", "cpu"),
            ("video", "size", "frames", "reference", "file", "folder"),
            value,
        )
    for pair in (
        ("videos", "a.mp4"),
        ("videos", "folder"),
        ("folder", "videos"),
        ("folder", "folder"),
        ("videos", "none"),
    ):
        yield Case("videos", ("evaluate", *pair, *LPIPS), ("video", "folder", "names"), pair[1])
    for option in ("--min-psnr", "--max-lpips", "--target-speedup"):
        for value in ("x", "", "nan", "-1", "0", "inf"):
            arguments = ("tune", option, value, *BASES["tune"][3:], "--lpips", "alex")
            yield Case("targets", arguments, (option[2:], option[2:].replace("-", "_"), "height"), value)
    yield Case("targets", ("tune", *BASES["tune"][3:]), ("--min-psnr",))
    yield Case("targets", (*BASES["tune"], "--max-lpips", "0.1"), ("--min-psnr",))
    for option, wrong in (
        ("rounds", ("0", "-1", "x", "")),
        ("tune-steps", ("0", "99", "x", "", "-1")),
        ("probe", ("x", "")),
    ):
        for value in wrong:
            yield Case("targets", (*BASES["tune"], f"--{option}={value}"), (option,), value)
    yield Case("targets", (*BASES["tune"], "--held-out", "a cat"), ("held-out",))
    yield Case("targets", (*BASES["tune"], "--prompt", "a cat"), ("prompt",))


def _folders() -> Iterator[Case]:
    broken = [str(path) for kind in ("run-*", "swept-*") for path in sorted(Path().glob(kind))]
    for value in ("none", "folder", "a.mp4", "pipe", "loop", "", "x" * 300, "model", *broken):
        yield Case("pages", ("page", value), ("folder", "report.json", "sweep.json", "results"), value)
    for value in ("x", "", "PSNR"):
        yield Case("pages", ("page", "swept", "--plots", f"--metric={value}"), ("metric",), value)
    for value in ("none", "folder", "run", "a.mp4", *(name for name in broken if name.startswith("swept"))):
        yield Case(
            "unfinished sweeps",
            ("sweep", "--no-run", "--out", value, "--device", "cpu"),
            ("--out", "sweep.json"),
            value,
        )
    for value in map(str, sorted(Path().glob("journal-*"))):
        yield Case("journals", (*BASES["sweep"], "--out", value), ("journal", "out", "folder"), value)
