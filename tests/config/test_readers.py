"""Every reader of YAML and JSON: bounded in depth, aliases, length and work; what it cannot take is one line."""

import json
import os
import time

import pytest

from svg.cli import main
from svg.configs import load_preset
from svg.documents import read_json, read_text
from svg.eval.page import build_page
from svg.methods.sage.layers_file import read_choices
from svg.pipelines.loading import load_pipeline
from svg.sweep.grid import read_grid
from svg.sweep.grid_file import GridError
from svg.sweep.journal import Journal

MIB = 2**20
SECONDS = 2


def bomb(levels=40, width=30):
    """Aliases of aliases: width ** levels values in some lines."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


YAML = {
    "deep lists": "prompts: " + "[" * (MIB - 10),
    "deep blocks": "\n".join("  " * i + "a:" for i in range(700)),
    "dashes": "- " * (MIB // 2),
    "aliases": bomb(),
    "aliases of one list": "a: &a [" + "x," * 20000 + "]\nb: [" + "*a," * 20000 + "]",
    "an alias of itself": "prompts: &a [*a]",
    "many values": "prompts: [" + "a," * 500_000 + "]",
    "sexagesimal": "seeds: [" + "1:" * 500_000 + "1]",
    "a long number": "seeds: [" + "9" * (MIB - 20) + "]",
    "a long key": "? " + "k" * (MIB - 10) + "\n: 1",
    "a long prompt": "prompts: [" + "p" * (MIB - 20) + "]\nnope: 1",
    "many keys": "\n".join(f"k{i}: 1" for i in range(60_000)),
    "too long": "a: " + "b" * (2 * MIB),
    "tags": "prompts: !!python/object/apply:os.system ['true']",
    "a set": "prompts: !!set {a, b}",
    "an object of omap": "prompts: !!omap [a]",
    "a bad date": "seeds: [2024-99-99]",
    "a big float": "guidance: 1e999999999",
    "two documents": "a: 1\n---\nb: 2",
    "control": "prompts: ['\x07']",
    "null": "~",
    "empty": "",
    "merge": "<<: [1, 2]",
    "complex key": "? [a, b]\n: 1",
    "products": "prompts: [a]\nmethods:\n- method: svg2\n"
    + "\n".join(
        f"  {name}: [{','.join(str(1 + i) for i in range(90))}]"
        for name in ("num_q_clusters", "num_k_clusters", "iterations", "first_iterations", "seed")
    ),
    "cells": "prompts: [" + "a," * 3000 + "]\nseeds: [" + ",".join(map(str, range(3000))) + "]",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_of_a_megabyte_is_answered_in_two_seconds(tmp_path, name, capsys):
    path = tmp_path / "file.yaml"
    path.write_text(YAML[name])
    start = time.process_time()
    with pytest.raises((ValueError, TypeError)) as error:
        load_preset(path)
    assert time.process_time() - start < SECONDS and len(str(error.value)) < 2000
    start = time.process_time()
    assert main(["sweep", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert (
        time.process_time() - start < SECONDS + 8
    )  # importing torch and Diffusers counts where this is the first test
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("svg: error: ") and len(line) < 2000 and not (tmp_path / "out").exists()


JSON = {
    "deep": "[" * MIB,
    "deep objects": '{"a":' * (MIB // 5),
    "a long number": "9" * MIB,
    "a big exponent": "1e" + "9" * 1000,
    "nan": "NaN",
    "infinity": '{"format": Infinity}',
    "broken": '{"a"',
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "text": '"x"',
    "many": "[" + "1," * 500_000 + "1]",
    "a wrong shape": '{"format": "svg-layers", "version": 1, "transformers": [1]}',
    "a layer of text": '{"format": "svg-layers", "version": 1, "transformers": {"t": {"x": {"precision": "int8-fp8"}}}}',
    "unhashable": '{"format": "svg-layers", "version": 1, "transformers": {"t": {"0": {"precision": []}}}}',
    "surrogates": '{"format": "\\ud800"}',
}
READERS = {
    "layers": lambda folder: read_choices(str(folder / "report.json")),
    "page": lambda folder: build_page(folder),
    "model": lambda folder: load_pipeline(folder, device="cpu"),
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("reader", READERS)
def test_json_of_a_megabyte_is_answered_in_two_seconds(tmp_path, name, reader):
    for file in ("report.json", "model_index.json"):
        (tmp_path / file).write_text(JSON[name])
    start = time.process_time()
    with pytest.raises((ValueError, TypeError)) as error:
        READERS[reader](tmp_path)
    assert time.process_time() - start < SECONDS and len(str(error.value)) < 2000


@pytest.mark.parametrize("make", ["folder", "pipe", "device", "link", "bytes"])
def test_only_plain_files_of_text_are_read(tmp_path, make):
    path = tmp_path / "file.yaml"
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "link": lambda: path.symlink_to(tmp_path),
        "bytes": lambda: path.write_bytes(b"\xff\xfe"),
    }[make]()
    for read in (
        lambda: read_text(path, MIB),
        lambda: read_json(path),
        lambda: load_preset(path),
        lambda: read_grid(path, {}),
    ):
        with pytest.raises((ValueError, GridError)):
            read()


def test_aliases_within_the_bounds_are_read(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("prompts: &p [a, b]\nseeds: &s [0, 1]\nmethods: [{method: svg1, density: [.2, .3], seed: *s}]")
    grid = read_grid(path, {})
    assert [one["prompt"] for one in grid.prompts] == ["a", "b"] and len(grid.methods) == 4


@pytest.mark.parametrize(
    "content", [[], None, 3, {}, {"record": [], "files": {}, "sha256": ""}, {"record": {}, "files": []}]
)
def test_a_journal_of_any_shape_is_read(tmp_path, content):
    journal = Journal(tmp_path, 1)
    with journal.locked():
        journal.write("whole", {"status": "finished"}, [])
        (journal.entries / "odd.json").write_text(json.dumps(content))
        (journal.entries / "folder.json").mkdir()
        os.mkfifo(journal.entries / "pipe.json")
        records, notes = journal.read()
    assert records == {"whole": {"status": "finished"}} and len(notes) == 3


def test_a_journal_trusts_no_file_outside(tmp_path):
    (tmp_path / "secret").write_text("x")
    journal = Journal(tmp_path / "out", 1)
    with journal.locked():
        (tmp_path / "out" / "link").symlink_to(tmp_path / "secret")
        for name, file in (("up", "../secret"), ("absolute", str(tmp_path / "secret")), ("linked", "link")):
            journal.write(name, {"status": "finished"}, [file])
        records, notes = journal.read()
    assert not records and all("leads out" in note for note in notes) and len(notes) == 3
