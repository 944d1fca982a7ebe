"""Grids: YAML and flags, multiplied out; every mistake is named with its line."""

import re
import shlex
from pathlib import Path

import pytest
from sweep_support import summary_of

from svg.cli import main
from svg.pipelines.fingerprint import fingerprint
from svg.sweep.grid import cells_of, read_grid
from svg.sweep.grid_file import GridError


def cells(name, **flags):
    return cells_of(read_grid(name, flags), "cpu")


def test_multiplied_out_in_order(write_grid):
    found = cells(write_grid(prompts=["a red ball", {"prompt": "a cat", "negative_prompt": "a dog"}]))
    assert len(found) == 20 and len({cell.id for cell in found}) == 20
    assert [cell.label for cell in found[:5]] == ["dense", "control", "svg1", "svg2 top_p=0.4", "svg2 top_p=0.7"]
    assert [cell.role for cell in found[:5]] == ["dense", "control"] + ["accelerated"] * 3
    groups = [found[i : i + 5] for i in range(0, 20, 5)]
    prompts = [(group[0].generation["prompt"], group[0].generation["seed"]) for group in groups]
    assert prompts == [("a red ball", 0), ("a red ball", 1), ("a cat", 0), ("a cat", 1)]
    for dense, *others in groups:
        assert dense.reference is None and {cell.reference for cell in others} == {dense.id}
        assert {cell.control for cell in (dense, *others)} == {others[0].id}
    assert groups[2][0].generation["negative_prompt"] == "a dog" and found[0].generation["negative_prompt"] is None
    assert found[3].method["num_k_clusters"] == 5 and found[0].run["dtype"] == "fp32"


def test_budgets_are_each_methods_own(write_grid):
    methods = ["svg1", {"method": "svg2", "budget": 0.9}, {"method": "svg2", "top_p": 0.8}]
    found = cells(write_grid(methods=methods, budgets=[0.3, 0.5], seeds=[0], control=False))
    settings = [{key: cell.method.get(key) for key in ("density", "budget", "top_p")} for cell in found[1:]]
    assert [s["density"] for s in settings] == [0.3, 0.5, None, None, None]
    assert [s["budget"] for s in settings] == [None, None, 0.9, 0.3, 0.5]
    assert [s["top_p"] for s in settings[3:]] == [0.8, 0.8] and found[0].control is None


def test_flags_win(write_grid):
    found = cells(write_grid(), seeds=[7], methods=["svg1"], budgets=[0.2], steps=5)
    assert [cell.label for cell in found] == ["dense", "control", "svg1"]
    assert found[2].generation["seed"] == 7 and found[2].generation["steps"] == 5 and found[2].method["density"] == 0.2


def test_id_is_what_decides_the_result(write_grid, model, tmp_path):
    first = cells(write_grid())
    assert [cell.id for cell in cells(write_grid(seeds=[0, 1, 2]))[:10]] == [cell.id for cell in first]
    assert not {cell.id for cell in cells(write_grid(steps=4))} & {cell.id for cell in first}
    assert not {cell.id for cell in cells(write_grid(), dtype="bf16")} & {cell.id for cell in first}
    # The same settings under another label.
    alone = cells(write_grid(methods=[{"method": "svg2", "top_p": 0.7, "num_q_clusters": 3, "num_k_clusters": 5}]))
    assert alone[2].label == "svg2" and alone[2].id == first[4].id
    # No id twice.
    assert len(cells(write_grid(seeds=[0, 0]))) == 5 and len(cells(write_grid(methods=["dense", "svg1"]))) == 6


def test_another_model_of_the_same_name_is_another_cell(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(bytes(3 * 2**20))
    before = fingerprint(str(tmp_path))
    assert before == fingerprint(str(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert fingerprint(str(tmp_path)) != before and fingerprint("owner/name") is None


WRONG = [
    ("promts: [a]\n", ["line 1: unknown key 'promts' in a grid: did you mean 'prompts'?"]),
    ("prompts: [a]\nmethods:\n  - method: svg2\n    topp: 0.5\n", ["line 4", "'topp'", "did you mean 'top_p'?"]),
    ("prompts: [a]\nmethods:\n  - method: svg2\n    top_p: [0.5, 1.5]\n", ["line 4", "top_p", "(0, 1]", "1.5"]),
    ("prompts: [a]\nmethods:\n  - method: svg9\n", ["line 3", "svg9", "svg1, svg2"]),
    ("prompts: [a]\nmethods: [svg9]\n", ["line 2", "svg9"]),
    ("prompts: [a]\nmethods: svg1\n", ["line 2", "methods must be a list"]),
    ("prompts: [a]\nseeds: [1]\nseeds: [2]\n", ["line 3", "'seeds' is there twice, first in line 2"]),
    ("prompts: [a]\nseeds: [-1]\n", ["line 2", "seed", "-1"]),
    ("prompts: [a]\nseeds: [one]\n", ["line 2", "seed", "'one'"]),
    ("prompts:\n  - promt: a\n", ["line 2", "'promt'", "did you mean 'prompt'?"]),
    ("prompts:\n  - 3\n", ["line 1", "entry of prompts", "3"]),
    ("prompts: []\n", ["prompts must hold at least one"]),
    ("prompts: [a]\nlpips: alexx\n", ["line 2", "lpips", '"alex"', "'alexx'"]),
    ("prompts: [a]\nbudgets: 0.3\n", ["line 2", "budgets must be a list"]),
    ("prompts: [a]\nbudgets: [0.3, 3]\n", ["density", "(0, 1]", "3"]),
    ("prompts: [a]\nseeds: [1\nsteps: 3\n", ["line 3", "not valid YAML"]),
    ("- a\n- b\n", ["line 1", "keys and values"]),
    ("prompts: [a]\nmodels: [no-such-folder]\nheight: 32\nwidth: 32\nframes: 5\n", ["no-such-folder"]),
    ("prompts: [a]\nmodels: [owner/name]\n", ["--height", "--preset"]),
    ("prompts: [a]\nmodels:\n  - preset: wan9\n", ["wan9"]),
]


@pytest.mark.parametrize("text, words", WRONG, ids=lambda value: str(value).replace("\n", " "))
def test_wrong_files(text, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(text)
    assert main(["sweep", "grid.yaml", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--prompt a --seeds 1,x", ["--seeds", "'1,x'"]),
        ("--prompt a --methods svg1,svg9", ["svg9"]),
        ("--prompt a --workers 2 --device cuda:1", ["--device must be auto, cpu or cuda with --ray or --workers"]),
        ("", ["prompts", "--prompt"]),
        ("missing.yaml", ["missing.yaml"]),
        ("--no-run --out nothing", ["nothing without sweep.json"]),
        ("--recorded nothing.safetensors", ["nothing.safetensors"]),
        ("--prompt a --frames 8", ["num_frames"]),
    ],
)
def test_wrong_flags(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main(["sweep", *shlex.split(arguments)])
    if code == 1:  # what only the model can tell fails its cells
        errors = " ".join(cell["error"]["message"] for cell in summary_of("svg-sweep")["cells"])
    else:
        assert code == 2
        (errors,) = capsys.readouterr().err.splitlines()
    assert all(word in errors for word in words), errors


def test_example_of_the_guide(tmp_path):
    """Dense and control, two methods of four budgets, two prompts, two seeds."""
    guide = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (tmp_path / "grid.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)[1])
    found = cells(tmp_path / "grid.yaml")
    assert len(found) == (2 + 2 * 4) * 2 * 2


def test_error_names_the_file(tmp_path):
    (tmp_path / "my.yaml").write_text("seed: [1]\n")
    with pytest.raises(GridError, match=r"my.yaml: line 1: unknown key 'seed' in a grid: did you mean 'seeds'"):
        read_grid(tmp_path / "my.yaml", {})


def test_other_thresholds_are_other_cells(write_grid, tmp_path):
    grid, found = write_grid(methods=[{"method": "sparge", "thresholds": "t"}]), []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "t").write_bytes(content)
        found.append(cells(grid)[2])
    assert found[0].id == found[2].id != found[1].id
    assert found[0].job().config.thresholds == "t"


def test_a_budget_is_sparges_topk_unless_it_has_another_measure(write_grid):
    found = cells(write_grid(methods=["sparge", {"method": "sparge", "cdf": 0.9}], budgets=[0.2, 0.3]))
    kept = [(cell.method["topk"], cell.method["cdf"]) for cell in found[2:5]]
    assert kept == [(0.2, None), (0.3, None), (None, 0.9)]
    assert [cell.label for cell in found[2:5]] == ["sparge topk=0.2", "sparge topk=0.3", "sparge cdf=0.9"]
