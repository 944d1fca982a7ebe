"""The page in real headless Chromium, opened from disk."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from chromium import BOTH_LOADED

import svg.eval.page
from svg.eval.files import write_json
from svg.eval.page import build_page
from svg.eval.page.build import render

pytestmark = pytest.mark.browser


def rows(browser):
    return browser.evaluate("[...document.querySelectorAll('tbody .pick')].map((e) => e.textContent)")


def column(browser, name):
    return browser.evaluate(f"""(() => {{
        const heads = [...document.querySelectorAll('thead th')].map((e) => e.textContent.trim());
        const index = heads.indexOf({name!r});
        return [...document.querySelectorAll('tbody tr')].map((row) => row.children[index].textContent); }})()""")


def points(browser, axis="time"):
    return browser.evaluate(f"""[...document.querySelectorAll('#pareto [data-axis={axis}] .point')].map((p) => [
        p.dataset.label, ...p.querySelector('path').getAttribute('transform').match(/[-\\d.]+/g).map(Number)])""")


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("kind", ["sweep", "run"])
def test_loads_from_disk_alone(browser, sweep_folder, run_folder, kind, width, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree({"sweep": sweep_folder, "run": run_folder}[kind], folder)
    page = build_page(folder)
    browser.open(page, width=width)
    browser.wait(BOTH_LOADED)
    assert browser.errors == []
    here = folder.resolve().as_uri()
    assert browser.requests and all(url.startswith((here, "data:")) for url in browser.requests)
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map((e) => e.textContent)")
    for heading in ("Side by side", "Quality against cost", "What was computed", "Where the time went", "Cells"):
        assert heading in headings
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_sticks_out_on_a_phone(browser, sweep_folder):
    browser.open(build_page(sweep_folder), width=390, height=844)
    browser.wait(BOTH_LOADED)
    wide = """[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroller, .offscreen, svg'))
        .filter((e) => e.getBoundingClientRect().width && e.getBoundingClientRect().right > innerWidth + 1)
        .map((e) => e.outerHTML.slice(0, 90))"""
    assert browser.evaluate(wide) == []
    small = """[...document.querySelectorAll('.transport button, .choice label, .filter button')]
        .filter((e) => e.getBoundingClientRect().height < 44).length"""
    assert browser.evaluate(small) == 0


def test_hostile_prompt_is_shown_not_run(sweep):
    assert sweep.evaluate("document.title") == "Sweep of tiny-wan"
    assert sweep.evaluate("document.querySelectorAll('img').length") == 0
    assert "</script><script>" in sweep.evaluate("document.querySelector('tbody').textContent")


def test_policy_refuses_foreign_scripts(browser, run_folder, tmp_path):
    text = build_page(run_folder).read_text()
    page = tmp_path / "bad.html"
    page.write_text(text.replace("</body>", "<script>document.title = 'broken'</script></body>"))
    browser.open(page)
    assert browser.evaluate("document.title") != "broken"
    assert any("Content Security Policy" in error for error in browser.errors)


def test_missing_video_is_said(browser, run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    page = build_page(folder)
    (folder / "accelerated.mp4").write_bytes(b"no video")
    browser.open(page)
    browser.wait("!document.querySelectorAll('.screen .problem')[1].hidden")
    assert browser.evaluate("document.querySelectorAll('.screen .problem')[0].hidden")


# ---- plots


def test_plots_show_every_setting(sweep):
    labels = ["dense", "control", "svg1 density=0.3", "svg2 top_p=0.7", "svg2 top_p=0.9"]
    for axis in ("time", "density"):
        assert sorted(label for label, _, _ in points(sweep, axis)) == sorted(labels)
    place = {label: (x, y) for label, x, y in points(sweep)}
    by_time = ["svg2 top_p=0.7", "svg1 density=0.3", "svg2 top_p=0.9", "dense", "control"]
    assert sorted(place, key=lambda label: place[label][0]) == by_time
    up = ["dense", "control", "svg2 top_p=0.9", "svg1 density=0.3", "svg2 top_p=0.7"]
    assert sorted(place, key=lambda label: place[label][1]) == up
    assert sweep.evaluate("document.querySelectorAll('#pareto .control-band').length") == 2


def test_uneven_means_are_said(sweep):
    warning = "document.querySelector('#pareto .warning').textContent"
    assert sweep.evaluate(warning) == ""
    sweep.evaluate("CELLS.find((cell) => cell.label === 'svg1 density=0.3').status = 'pending'")
    sweep.click("#pareto input[value=ssim]")
    assert "different prompts and seeds" in sweep.evaluate(warning)
    sweep.click("#pareto input[value=each]")
    assert sweep.evaluate(warning) == ""


def test_metric_switch(sweep):
    before = points(sweep)
    for key, name in (("ssim", "SSIM"), ("lpips", "LPIPS"), ("psnr", "PSNR")):
        sweep.click(f"#pareto input[value={key}]")
        titles = sweep.evaluate("[...document.querySelectorAll('#pareto .title')].map((e) => e.textContent)")
        assert all(title.startswith(name) for title in titles) and len(titles) == 2
        place = {label: y for label, _, y in points(sweep)}
        assert place["svg2 top_p=0.9"] < place["svg1 density=0.3"] < place["svg2 top_p=0.7"]  # better is up
    assert points(sweep) == before


def test_time_switch_and_single_cells(sweep):
    sweep.click("#pareto input[value=end_to_end]")
    assert "End to end, seconds" in sweep.evaluate("document.querySelector('[data-axis=time]').textContent")
    sweep.click("#pareto input[value=each]")
    assert len(points(sweep)) == 20


def test_hover_names_the_cell(sweep):
    sweep.point("#pareto [data-label='svg2 top_p=0.9'] .target")
    tip = sweep.evaluate("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    assert "svg2 top_p=0.9, mean of 4 cells" in tip and "31.15 dB" in tip and "0.600" in tip
    sweep.press("Escape")
    assert sweep.evaluate("document.getElementById('tip').hidden")


def test_click_on_a_mark_selects(sweep):
    sweep.click("#pareto [data-label='svg2 top_p=0.7'] .target")
    assert "svg2 top_p=0.7" in sweep.evaluate("document.querySelector('.selected-name').textContent")
    sides = "[...document.querySelectorAll('.side select')].map((s) => s.selectedOptions[0].textContent.split(',')[0])"
    assert sweep.evaluate(sides) == ["dense", "svg2 top_p=0.7"]


def test_plots_by_keyboard(sweep):
    sweep.evaluate("document.querySelector('#pareto [data-axis=time] .point[tabindex=\"0\"]').focus()")
    sweep.press("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowRight")
    focus = "document.activeElement.dataset.label"
    assert sweep.evaluate(focus) == "svg1 density=0.3"
    assert not sweep.evaluate("document.getElementById('tip').hidden")
    sweep.press("Enter")
    assert sweep.evaluate(focus) == "svg1 density=0.3"  # drawn anew, the focus stays
    assert "svg1 density=0.3" in sweep.evaluate("document.querySelector('.selected-name').textContent")


# ---- table


@pytest.mark.parametrize("name", ["PSNR", "Density", "Attention"])
def test_sorts(sweep, name):
    def numbers():
        return [float(text.split()[0]) for text in column(sweep, name) if text != "–"]

    unsorted = rows(sweep)
    heads = sweep.evaluate("[...document.querySelectorAll('thead th')].map((e) => e.textContent)")
    button = f"thead th:nth-child({1 + heads.index(name)}) button"
    sweep.click(button)
    assert numbers() == sorted(numbers()) and column(sweep, name)[-1] == "–"  # no number: last, either way
    sweep.click(button)
    assert numbers() == sorted(numbers(), reverse=True) and column(sweep, name)[-1] == "–"
    assert sweep.evaluate(f"document.querySelector('{button}').parentNode.getAttribute('aria-sort')") == "descending"
    sweep.click(button)
    assert rows(sweep) == unsorted


def test_filters_table_and_plots(sweep):
    assert len(rows(sweep)) == 21
    sweep.evaluate("document.querySelector('input[type=search]').focus()")
    sweep.type("svg2 0.9")
    assert set(rows(sweep)) == {"svg2 top_p=0.9"} and len(rows(sweep)) == 4
    assert {label for label, _, _ in points(sweep)} == {"dense", "control", "svg2 top_p=0.9"}
    sweep.evaluate("document.querySelector('form.filter').reset()")
    assert len(rows(sweep)) == 21
    sweep.evaluate("""(() => { const box = [...document.querySelectorAll('form.filter select')][0];
        box.value = 'svg1'; box.dispatchEvent(new Event('change')); })()""")
    assert set(rows(sweep)) == {"svg1 density=0.3"}
    sweep.evaluate("document.querySelector('input[type=search]').focus()")
    sweep.type("nothing like this")
    assert rows(sweep) == [] and "No cell matches" in sweep.evaluate("document.querySelector('tbody').textContent")
    sweep.click("tbody .empty button")
    assert len(rows(sweep)) == 21


def test_row_by_keyboard(sweep):
    sweep.evaluate("document.querySelectorAll('tbody .pick')[3].focus()")
    sweep.press("Enter")
    assert "svg2 top_p=0.7" in sweep.evaluate("document.querySelector('.selected-name').textContent")
    assert sweep.evaluate("document.activeElement.textContent") == "svg2 top_p=0.7"


def test_failed_cell_says_why(sweep):
    sweep.click("tr.failed .pick")
    text = sweep.evaluate("document.getElementById('selected').textContent")
    assert "q held NaN in layer 3" in text and "svg generate --method svg2" in text


def test_copies_the_command(sweep):
    sweep.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    sweep.click("tbody tr:nth-child(3) .copy")
    sweep.wait("document.querySelector('tbody tr:nth-child(3) .copy').textContent === 'Copied'")
    copied = sweep.evaluate("navigator.clipboard.readText()")
    assert copied == "svg generate --method svg1 --seed 0 -- 'a red ball'"


def test_heat_maps(run):
    kinds = run.evaluate("[...document.querySelectorAll('.heatmap')].map((e) => e.dataset.id)")
    assert kinds == ["density", "kinds"]
    sizes = "[...document.querySelectorAll('#heatmap-density canvas')].map((c) => [c.width, c.height])"
    assert run.evaluate(sizes) == [[4, 2]] * 3
    run.evaluate("document.querySelector('#heatmap-density .maps').focus()")
    run.press("ArrowRight", "ArrowRight", "ArrowDown", "PageDown")
    readout = "document.querySelector('#heatmap-density .readout').textContent"
    assert run.evaluate(readout) == "Step 2, layer 1, head 1: density 0.44"
    run.evaluate("document.querySelector('#heatmap-kinds .maps').focus()")
    run.press("ArrowDown")
    assert "no sparse call" in run.evaluate("document.querySelector('#heatmap-kinds .readout').textContent")
    run.point("#heatmap-density .panel:nth-child(3) canvas")
    assert "layer 2, head 1" in run.evaluate(readout)


def test_time_bars_add_up(run):
    bars = run.evaluate("""[...document.querySelectorAll('.bar')].map((bar) => [
        bar.querySelector('.bar-name').textContent,
        [...bar.querySelectorAll('i')].map((i) => parseFloat(i.style.width)).reduce((a, b) => a + b),
        bar.querySelector('.bar-total').textContent])""")
    assert [name for name, _, _ in bars] == ["dense (auto)", "svg1 density=0.3", "control (auto)"]
    seconds = np.array([float(total.split()[0]) for _, _, total in bars])
    assert np.allclose([width for _, width, _ in bars], 100 * seconds / seconds.max(), atol=0.5)


def test_sections_follow_the_selected_cell(sweep):
    sweep.click("tbody tr:nth-child(3) .pick")
    assert sweep.evaluate("document.querySelectorAll('.heatmap').length") == 2
    sweep.click("tbody tr:nth-child(4) .pick")
    assert sweep.evaluate("[...document.querySelectorAll('.heatmap')].map((e) => e.dataset.id)") == ["density"]
    sweep.click("tbody tr:nth-child(1) .pick")
    assert "select a sparse cell" in sweep.evaluate("document.getElementById('inside').textContent")


def test_tab_reaches_every_part(sweep):
    sweep.evaluate("document.activeElement.blur()")
    seen = set()
    for _ in range(400):
        sweep.press("Tab")
        seen.add(sweep.evaluate("document.activeElement.closest('section')?.id ?? null"))
        if seen >= {"pareto", "cells", "selected", "player", "inside", "time", "reading"}:
            break
    assert seen >= {"pareto", "cells", "selected", "player", "inside", "time"}


# ---- the scripts themselves


def test_no_name_is_defined_twice():
    """The scripts share one scope: a second function of one name would silently replace the first."""
    folder = Path(svg.eval.page.__file__).parent
    names = [
        name
        for path in sorted(folder.glob("*.js"))
        for name in re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", path.read_text(), re.MULTILINE)
    ]
    assert len(names) > 50 and len(names) == len(set(names))


# ---- runs that lack something


def without_sparse(report):
    del report["runs"]["accelerated"], report["quality"]["accelerated"]
    report["density"] = None


def without_dense(report):
    report["runs"] = {"accelerated": report["runs"]["accelerated"]}
    report["quality"] = {}


def identical(report):
    for part in report["quality"].values():
        for name in ("psnr", "temporal_psnr"):
            part[name] |= {"mean": "inf", "per_frame": ["inf"] * len(part[name]["per_frame"])}
        part["lpips"] = {"net": "none", "mean": None, "note": "not asked for"}


def never_sparse(report):
    part = report["runs"]["accelerated"]["transformers"]["transformer"]
    part["head_kinds_map"], part["attention_seconds"] = None, None
    report["density"]["sparse_calls"] = None


@pytest.mark.parametrize(
    "change, headings",
    [
        (without_sparse, {"In numbers", "Side by side", "Where the time went", "Cells"}),
        (without_dense, {"In numbers", "Side by side", "What was computed"}),
        (identical, {"Quality against cost", "What was computed"}),
        (never_sparse, {"Quality against cost", "What was computed"}),
    ],
)
def test_runs_that_lack_something(browser, run_folder, tmp_path, change, headings):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    report = json.loads((folder / "report.json").read_text())
    change(report)
    write_json(folder / "report.json", report)
    browser.open(build_page(folder))
    browser.wait(BOTH_LOADED)
    assert browser.errors == []
    assert headings <= set(browser.evaluate("[...document.querySelectorAll('h2')].map((e) => e.textContent)"))
    assert "NaN" not in browser.evaluate("document.querySelector('main').outerHTML")
    if change is identical:
        assert "∞ dB" in browser.evaluate("document.querySelector('.tiles').textContent")
        assert all(y < 60 for _, _, y in points(browser))  # everything is on the strips: nothing is beside dense


@pytest.mark.parametrize("name", ["pareto-h100", "tune-h100"])
def test_pages_of_the_documentation(browser, tmp_path, name):
    """Data of an earlier version, without videos: shown whole, without an error."""
    data = json.loads((Path(__file__).parents[3] / "docs" / "pages" / f"{name}.json").read_text())
    path = tmp_path / "page.html"
    path.write_text(render(data), encoding="utf-8")
    browser.open(path)
    assert len(rows(browser)) == len(data["cells"]) and browser.errors == []
