"""Wrong command lines by their files: presets, grids, recordings, videos, results, and places for them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from command_faults import (
    BASES,
    DEVICES,
    LPIPS,
    MODEL,
    NO_FILES,
    NO_FOLDERS,
    NO_OUTPUTS,
    NO_TENSORS,
    Case,
    option_cases,
    wrong_settings,
)
from world import PROMPT


def cases() -> Iterator[Case]:
    """All wrong command lines, in a fixed order."""
    yield from option_cases()
    yield from _documents()
    yield from _grids()
    yield from _recordings()
    yield from _outputs()
    yield from _measuring()
    yield from _folders()


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
        for command in ("generate", "record", "adapt-linears", "tune"):
            file = f"p-{command}.yaml"
            yield Case(f"presets: {name}", (*BASES[command], "--preset", file), ("yaml", "YAML"), files={file: text})
        yield Case(f"presets: {name}", ("presets", "p.yaml"), ("p.yaml",), files={"p.yaml": text})
        arguments = ("sweep", "g.yaml", "--out", "new", "--device", "cpu")
        yield Case(f"grids: {name}", arguments, ("g.yaml",), files={"g.yaml": text})
    good = {
        "model": "model",
        "source": "s",
        "generation": dict(steps=2, height=32, width=48, frames=9, guidance=5, fps=8),
        "svg2": {},
    }
    for method, column in (("svg2", "head_top_p"), ("svg1", "head_density"), ("near", "head_budget")):
        preset = ("--preset", "t.yaml", "--method", method)
        arguments = ("generate", PROMPT, *preset, *LPIPS, "--out", "new", "--device", "cpu")
        for name, table in _head_tables():
            text = json.dumps({**good, method: {column: table}})
            yield Case(f"head tables: {name}", arguments, (column,), files={"t.yaml": text})
        for tuned in ({}, 3, {"model": 3}, dict(model="model", fingerprint="0" * 16, tokens=[3, 2, 3], device="cpu"),
                      dict(model="x/y", fingerprint=None, tokens=[3, 2, 3], device="cpu"),
                      dict(model="model", fingerprint="x", tokens=[3, 2], device="cpu"),
                      dict(model="model", fingerprint=[], tokens="abc", device=None)):  # fmt: skip
            text = json.dumps({**good, method: {column: [[0.5] * 2] * 3, "tuned_for": tuned}})
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
        for name, value in wrong_settings(method):
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(value)
            if value == [1] or (isinstance(value, list) and value and not value[0]):
                continue
            text = json.dumps({**good, "methods": [{"method": method, name: value}]})
            yield Case(
                "grids of settings",
                ("sweep", "g.yaml", "--out", "new"),
                (name, "head_", "budget", "topk", "NaN", "methods"),
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
        yield Case(
            "grids",
            ("sweep", value, "--out", "new", "--device", "cpu"),
            ("grid", "GRID", "YAML", "yaml", "the file"),
            value,
        )


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
        late = "x" in value  # the run says which branches it has
        arguments = (*BASES["record"], f"--record-branches={value}")
        yield Case("recordings", arguments, ("branches",), value, late=late)
    for value in ("0", "-1", "2", "x", "", "nan"):
        yield Case("numbers", (*BASES["adapt"], f"--min-cosine={value}"), ("min-cosine", "min_cosine"), value)
        for option in ("l1", "l2"):
            yield Case("numbers", (*BASES["sparge-tune"], f"--{option}={value}"), ("l1", "l2"), value)
    for option in ("blocks", "rows"):
        for value in ("0", "-1", "x", "1.5", ""):
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
    for command in ("record", "adapt", "adapt-linears", "sparge-tune"):
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
    yield Case("inputs as outputs", (*BASES["adapt-linears"], "--out", "model/vae/config.json"), ("out",))
    for command, folder in (("sweep", "run"), ("tune", "run"), ("tune", "swept"), ("generate", "swept")):
        yield Case("results of another command", (*BASES[command], "--out", folder), ("out",), folder)
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
        said = "" if value in ("wide.mp4", "long.mp4") else value  # sizes and lengths are what differs
        yield Case(
            "videos",
            ("evaluate", "a.mp4", value, *LPIPS, "--device", "cpu"),
            ("video", "size", "frames", "output", "file", "folder"),
            said,
        )
        yield Case(
            "videos",
            ("evaluate", value, "a.mp4", *LPIPS, "--device", "cpu"),
            ("video", "size", "frames", "reference", "file", "folder"),
            said,
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
    for name in ("warmup_layers", "warmup_steps"):
        yield Case("targets", (*BASES["tune"], "--method", "near", "--set", f"{name}=1.0"), (name,), "1.0")
    short = ("--height", "16", "--width", "16", "--frames", "1")  # one token: nothing but its mean
    yield Case("targets", (*BASES["tune"], "--method", "near", *short), ("budget",))
    yield Case("targets", (*BASES["generate"], "--method", "near", *short), ("budget",))
    yield Case("targets", (*BASES["tune"], "--held-out", "a cat"), ("held-out",))
    yield Case("targets", (*BASES["tune"], "--prompt", "a cat"), ("prompt",))


def _folders() -> Iterator[Case]:
    broken = [str(path) for kind in ("run-*", "swept-*") for path in sorted(Path().glob(kind))]
    for value in ("none", "folder", "a.mp4", "pipe", "loop", "", "x" * 300, "model", *broken):
        yield Case("pages", ("page", value), ("folder", "report.json", "sweep.json", "results"), value)
    for value in ("x", "", "PSNR"):
        for flags in ((), ("--plots",)):
            yield Case("pages", ("page", "swept", *flags, f"--metric={value}"), ("metric",), value)
    for value in ("none", "folder", "run", "a.mp4", *(name for name in broken if name.startswith("swept"))):
        yield Case(
            "unfinished sweeps",
            ("sweep", "--no-run", "--out", value, "--device", "cpu"),
            ("--out", "sweep.json"),
            value,
        )
    for value in map(str, sorted(Path().glob("journal-*"))):
        yield Case("journals", (*BASES["sweep"], "--out", value), ("journal", "out", "folder"), value)
