"""The parts of the page that show what was measured on heads: tunings and recorded inputs."""

import json
import shutil

import pytest
from page_files import recorded_json, tune_json

from svg.eval.files import write_json
from svg.eval.page import build_page
from svg.eval.page.build import load_page_data


@pytest.fixture
def tuned(sweep_folder, tmp_path):
    folder = tmp_path / "tuned"
    shutil.copytree(sweep_folder, folder)
    content = json.loads((folder / "sweep.json").read_text())
    for cell in content["cells"]:
        if cell["label"] == "svg2 top_p=0.9":
            cell["method"]["head_top_p"] = [[0.3, 1.0], [0.6, 0.6]]
    write_json(folder / "sweep.json", content)
    write_json(folder / "tune.json", tune_json())
    return folder


@pytest.fixture
def recorded(tmp_path):
    write_json(tmp_path / "recorded.json", recorded_json())
    return tmp_path


def test_tuning_as_data(tuned):
    data = load_page_data(tuned)
    assert data["title"] == "Tuning of tiny-wan <b>" and data["kind"] == "sweep" and data["recorded"] is None
    tune = data["tune"]
    assert [row["density"] for row in tune["rows"]] == [0.4, 0.5, 0.4] and tune["budget"] == "top_p"
    assert [row["dense_steps"] for row in tune["rows"]] == [1, 4, 4] and tune["saved_at_equal_quality"] == 0.25
    assert tune["loss"][1][0] == pytest.approx([0.3, 0.03, 0.0])
    methods = {cell["label"]: cell["method"] for cell in data["cells"]}
    assert methods["svg2 top_p=0.9"] == "svg2 tuned" and methods["svg2 top_p=0.7"] == "svg2"


def test_recorded_as_data(recorded):
    data = load_page_data(recorded)
    methods = data["recorded"]["methods"]
    assert data["kind"] == "recorded" and data["cells"] == [] and data["tune"] is None
    assert [(m["label"], m["density"], m["recall"]) for m in methods] == [
        ("svg2 top_p=0.5", 0.3, 0.8), ("svg2 top_p=0.9", 0.6, 0.95), ("sparge", 0.5, None),
    ]  # fmt: skip
    assert methods[0]["error"] == pytest.approx(0.01 * (1 + 3.5 + 1.5 + 0.5))
    assert methods[0]["worst"] == {"error": 0.1, "step": 5, "layer": 3, "head": 1, "branch": "cond"}
    (map_,) = methods[0]["maps"]
    assert (map_["steps"], map_["layers"], map_["heads"]) == ([2, 5], [0, 3], 2)
    assert map_["values"]["error"] == [[[0.03, 0.04], [0.06, 0.07]], [[0.06, 0.07], [0.09, 0.1]]]


@pytest.mark.parametrize("name", ["tune.json", "recorded.json"])
def test_other_versions_are_refused(tuned, recorded, name):
    content = {"tune.json": tune_json, "recorded.json": recorded_json}[name]()
    write_json(tuned / name, {**content, "version": 9})
    with pytest.raises(ValueError, match=f"{name} must be 'svg-.*' version 1, got 'svg-.*' version 9"):
        build_page(tuned)
    write_json(tuned / name, {"format": content["format"], "version": 1})
    with pytest.raises(ValueError, match=f"{name} must be as this version of svg writes it"):
        build_page(tuned)


def test_tuning_of_an_earlier_version(tuned):
    """It says nothing of dense steps, nor of costs exactly at the target."""
    content = tune_json()
    for trial in (content, content["tuned"], content["uniform"], content["uniform_at_equal_cost"], *content["trials"]):
        for name in ("steps", "dense_steps", "cost_at_target", "saved_at_equal_quality"):
            trial.pop(name, None)
    write_json(tuned / "tune.json", content)
    tune = load_page_data(tuned)["tune"]
    assert tune["steps"] is None and tune["saved_at_equal_quality"] is None
    assert [row["dense_steps"] for row in tune["rows"]] == [None] * 3


@pytest.mark.parametrize("width", [1440, 390])
def test_tuning_is_shown(browser, tuned, width):
    browser.open(build_page(tuned), width=width)
    assert browser.errors == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelector('.kicker').textContent") == "svg tune"
    assert browser.evaluate("document.querySelector('section').id") == "tune"
    text = browser.evaluate("document.querySelector('#tune').textContent")
    assert "25.0 % less density than one budget for all heads exactly at the target" in text
    assert "both reach it: 20.0 % less density" in text and "2 prompts that were not used" in text
    rows = "[...document.querySelectorAll('#tune tbody tr')].map((row) => row.cells[2].textContent)"
    assert browser.evaluate(rows) == ["reached", "reached", ""]
    assert browser.evaluate(rows.replace("cells[2]", "cells[3]")) == ["1 of 16", "4 of 16", "4 of 16"]
    browser.evaluate("document.querySelector('#heatmap-budgets .maps').focus()")
    browser.press("ArrowDown")
    readout = "document.querySelector('#heatmap-budgets output').textContent"
    assert browser.evaluate(readout) == "Layer 0, head 1: top_p 1, density 1.000, weighted error 0.0e+0"
    browser.press("ArrowRight", "ArrowUp")
    assert browser.evaluate(readout) == "Layer 1, head 0: top_p 0.6, density 0.300, weighted error 3.0e-2"
    assert browser.evaluate("document.querySelectorAll('.head-curve').length") == 4
    assert browser.evaluate("document.querySelectorAll('.head-dot').length") == 4


@pytest.mark.parametrize("width", [1440, 390])
def test_recorded_inputs_are_shown(browser, recorded, width):
    browser.open(build_page(recorded), width=width)
    assert browser.errors == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map((e) => e.textContent)")
    assert headings == ["On recorded inputs", "Head by head", "Reading the numbers"]
    labels = "[...document.querySelectorAll('[data-measure=%s] .point')].map((e) => e.dataset.label)"
    assert browser.evaluate(labels % "recall") == ["svg2 top_p=0.5", "svg2 top_p=0.9"]
    assert len(browser.evaluate(labels % "error")) == 3
    browser.point("[data-measure=error] .point")
    assert "Recall0.8000" in browser.evaluate("document.querySelector('#tip').textContent")
    browser.evaluate("document.querySelector('#recorded-heads .maps').focus()")
    browser.press("ArrowRight", "PageDown", "ArrowDown")
    readout = "document.querySelector('#heatmap-recorded output').textContent"
    assert browser.evaluate(readout) == "Step 5, layer 3, head 1: output error 0.100"
    browser.click("#recorded-heads .choice label:nth-child(2)")
    assert "Recall of svg2" in browser.evaluate("document.querySelector('#recorded-heads h3').textContent")
    browser.evaluate(
        "(() => { const box = document.querySelector('#recorded-heads select'); box.value = 'sparge';"
        "box.dispatchEvent(new Event('change')); })()"
    )
    assert "sparge has no recall" in browser.evaluate("document.querySelector('#recorded-heads').textContent")
