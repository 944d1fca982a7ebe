"""What a person sees on a large screen and on a phone, in the light and in the dark."""

import re

import pytest

from svg.eval.files import write_json
from svg.eval.page import build_page

pytestmark = pytest.mark.browser
LOADED = "[...document.querySelectorAll('video')].every((v) => v.readyState >= 3)"
LUMINANCE = """((text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map((n) => (n / 255 <= .04045 ? n / 255 / 12.92 : ((n / 255 + .055) / 1.055) ** 2.4));
    return .2126 * r + .7152 * g + .0722 * b; })"""


def theme(browser, name):
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])


@pytest.fixture
def families_folder(sweep_folder, tmp_path):
    """One method with two budgets in each of two families."""
    import json

    content = json.loads((sweep_folder / "sweep.json").read_text())
    cells = []
    for cell in content["cells"]:
        if cell["label"].startswith("svg2") and cell["status"] == "finished":
            for number, compensate in enumerate((False, True)):
                budget = float(cell["label"].split("=")[1])
                method = {"method": "svg2", "top_p": budget, "compensate": compensate}
                label = f"svg2 top_p={budget} compensate={compensate}"
                cells.append({**cell, "id": f"{cell['id']}{number}", "label": label, "method": method, "video": None})
        elif cell["status"] == "finished":
            cells.append({**cell, "video": None})
    write_json(tmp_path / "sweep.json", {**content, "cells": cells})
    return tmp_path


@pytest.fixture
def families(browser, families_folder):
    theme(browser, "light")
    browser.open(build_page(families_folder))
    yield browser
    assert browser.errors == []


def test_one_line_colour_and_mark_a_family(families):
    legend = families.evaluate("[...document.querySelectorAll('#pareto .legend li')].map((e) => e.textContent)")
    assert {"svg2 compensate=false", "svg2 compensate=true", "svg1"} <= set(legend)
    looks = families.evaluate("""Object.fromEntries([...document.querySelectorAll('#pareto [data-axis=time] .point')].map(
        (p) => { const path = p.querySelector('path');
                 return [p.dataset.label, [path.getAttribute('d'), getComputedStyle(path).fill]]; }))""")
    one, other = ({tuple(look) for label, look in looks.items() if label.endswith(end)} for end in ("=False", "=True"))
    assert len(one) == len(other) == 1  # what varies in the budget alone looks the same
    (shape, colour), (other_shape, other_colour) = *one, *other
    assert shape != other_shape and colour != other_colour
    strokes = families.evaluate(
        "[...document.querySelectorAll('#pareto [data-axis=time] .series')].map((e) => getComputedStyle(e).stroke)"
    )
    assert sorted(strokes) == sorted([colour, other_colour])  # svg1 has one budget, and no line


def test_labels_of_bars_have_two_lines(families):
    lines = families.evaluate("""[...document.querySelectorAll('.bar-name')].map((e) => [
        e.firstChild.textContent, e.querySelector('small')?.textContent ?? ''])""")
    assert ["svg2 top_p=0.7", "compensate=True"] in lines and ["svg1 density=0.3", ""] in lines


@pytest.mark.parametrize("width", [1440, 390])
def test_the_controls_label_stands_beside_its_value(browser, sweep_folder, run_folder, width):
    for folder in (sweep_folder, run_folder):
        browser.open(build_page(folder), width=width)
        browser.wait(LOADED)
        overlaps = browser.evaluate("""[...document.querySelectorAll('#pareto figure')].flatMap((figure) => {
            const texts = [...figure.querySelectorAll('.control-band text, .rail-text, .tick')].map((e) => e.getBoundingClientRect());
            const marks = [...figure.querySelectorAll('.point')].map((p) => p.querySelector('path').getBoundingClientRect());
            const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
            return [...texts.flatMap((t) => marks.filter((m) => meet(t, m)).map((m) => [t.toJSON(), m.toJSON()])),
                    ...texts.flatMap((t, i) => texts.slice(i + 1).filter((o) => meet(t, o)).map((o) => [t.toJSON(), o.toJSON()]))]; })""")
        assert overlaps == []


def test_steps_count_from_0_and_slower_is_said_in_words(browser, run_folder):
    browser.open(build_page(run_folder))
    browser.evaluate("document.querySelector('#heatmap-density .maps').focus()")
    browser.press("ArrowDown")
    assert browser.evaluate("document.querySelector('#heatmap-density .readout').textContent").startswith(
        "Step 0, layer 0"
    )
    text = browser.evaluate(
        "['selected', 'cells', 'pareto'].map((id) => document.getElementById(id).textContent).join()"
    )
    assert re.search(r"\d\.\d\dx faster", text) and not re.search(r"\d\.\d\dx(?! (faster|slower))", text)


def test_small_videos_show_their_own_pixels(browser, run_folder):
    browser.open(build_page(run_folder))
    browser.wait(LOADED)
    look = (
        "[...document.querySelectorAll('.screen video, .screen canvas')].map((e) => getComputedStyle(e).imageRendering)"
    )
    assert browser.evaluate(look) == ["pixelated"] * 3


def test_touch_targets_on_a_phone(browser, sweep_folder, run_folder):
    for folder in (sweep_folder, run_folder):
        browser.open(build_page(folder), width=390, height=844)
        browser.wait(LOADED)
        small = browser.evaluate("""[...document.querySelectorAll('button, select, input:not([type=radio]), .choice label')]
            .map((e) => [e.getBoundingClientRect(), e]).filter(([b]) => b.width && b.height < 44)
            .map(([b, e]) => `${e.outerHTML.slice(0, 80)} ${b.height}`)""")
        assert small == []
        radius = browser.evaluate("document.querySelector('.point .target').getAttribute('r')")
        assert 2 * float(radius) >= 44


def test_first_column_stays_when_a_phone_scrolls_the_table(browser, sweep_folder):
    browser.open(build_page(sweep_folder), width=390, height=844)
    places = "['thead th', 'tbody th'].map((s) => document.querySelector(s).getBoundingClientRect().left)"
    before = browser.evaluate(places)
    second = "document.querySelector('tbody td').getBoundingClientRect().left"
    at = browser.evaluate(second)
    browser.evaluate("document.querySelector('.scroller').scrollLeft = 200")
    assert browser.evaluate(places) == before and browser.evaluate(second) == at - 200
    widths = browser.evaluate("[...document.querySelectorAll('tbody th')].map((e) => e.getBoundingClientRect().width)")
    assert min(widths) > 120 and max(widths) < 200


@pytest.mark.parametrize("name", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_texts_and_marks_stand_out_in_both_themes(browser, sweep_folder, name, width):
    theme(browser, name)
    browser.open(build_page(sweep_folder), width=width)
    ground = browser.evaluate(f"{LUMINANCE}(getComputedStyle(document.body).backgroundColor)")
    assert (ground < 0.05) == (name == "dark")
    ratios = browser.evaluate(f"""[...document.querySelectorAll(
            'h1, .lead, .facts span, .legend, .tick, td, .pick, .bar-name, .bar-name small, .words dd, .count, .field > span')].map((e) => {{
        const style = getComputedStyle(e);
        const one = {LUMINANCE}(e.closest('svg') ? style.fill : style.color);
        return [e.className.baseVal ?? e.className, (Math.max(one, {ground}) + .05) / (Math.min(one, {ground}) + .05)]; }})""")
    assert len(ratios) > 50 and [pair for pair in ratios if pair[1] < 4.5] == []
    marks = browser.evaluate(f"""[...document.querySelectorAll('.name path, .legend path:not(.front), .points path')].map((e) => {{
        const style = getComputedStyle(e);
        const one = {LUMINANCE}(style.fill === 'none' ? style.stroke : style.fill);
        return [e.getAttribute('d'), (Math.max(one, {ground}) + .05) / (Math.min(one, {ground}) + .05)]; }})""")
    least = 3 / 1.45 if name == "dark" else 3  # the dark theme brightens them by a filter, which styles do not tell
    assert [mark for mark in marks if mark[1] < least] == []
