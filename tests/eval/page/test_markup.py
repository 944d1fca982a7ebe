"""Every text and every key of the files that pages are made of, replaced by markup: nothing runs, nothing leaves the page."""

import copy

import pytest
from page_files import recorded_json, run_content, sweep_content, tune_json

from svg.eval.files import write_json
from svg.eval.page import build_page

pytestmark = pytest.mark.browser

MARKUP = (
    "</script><script>window.ran = 1</script>--><img src='https://example.invalid/i' onerror='window.ran = 1'>"
    "<svg onload='window.ran = 1'></svg><a href='javascript:window.ran = 1'>a</a>\"'><iframe src='javascript:window.ran = 1'>"
    "</style><style>@import 'https://example.invalid/s';</style><base href='https://example.invalid/'>&lt;script&gt;"
)
# What only markup could have made; the page itself has none of it but its icon and its link to the results.
FOREIGN = """document.querySelectorAll("img, iframe, object, embed, base, link:not([href='data:,']), svg[onload], [onerror], " +
    "[onclick], [href]:not(.skip, [rel=icon]), [action], [srcset], script[src]").length"""
# Everything that shows more when it is used is used.
USED = """(() => {
    const quiet = (use) => { try { use(); } catch { /* a damaged file may leave a part without what it needs */ } };
    for (const e of document.querySelectorAll("button, summary, input, .pick, .target")) quiet(() => {
        e.dispatchEvent(new PointerEvent("pointermove", {bubbles: true})); e.click(); });
    for (const e of document.querySelectorAll("select")) quiet(() => {
        e.selectedIndex = e.options.length - 1; e.dispatchEvent(new Event("change", {bubbles: true})); });
    return [window.ran ?? 0, document.scripts.length, document.body.innerText]; })()"""


def tuned_content():
    """tune.json, whose page is that of the sweep beside it."""
    return {"sweep.json": short_sweep(), "tune.json": tune_json()}


def short_sweep():
    """A cell of each kind: dense, control, sparse, and one that failed."""
    content = sweep_content()
    content["cells"] = [*content["cells"][:3], content["cells"][-1]]
    return content


FILES = {
    "report.json": lambda: {"report.json": run_content()},
    "sweep.json": lambda: {"sweep.json": short_sweep()},
    "tune.json": tuned_content,
    "recorded.json": lambda: {"recorded.json": recorded_json()},
}


SHOWN = {"report.json": 10, "sweep.json": 15, "tune.json": 4, "recorded.json": 8}  # times that markup is seen as text
# By these texts files say what is what: each is replaced in a page of its own; all others together, in one.
DECIDING = {
    *("format", "state", "status", "role", "id", "reference", "control", "label", "family", "videos", "winner"),
    *("method", "kind", "unit", "type", "net", "transformer", "branch", "fingerprint"),
}


def places(value, path=()):
    """Paths of all texts of a file."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))
    elif isinstance(value, str):
        yield path


def groups(content):
    """Texts that are replaced together: paths by the key that they stand under."""
    found = {}
    for path in places(content):
        name = next(key for key in reversed(path) if isinstance(key, str))
        found.setdefault(name if name in DECIDING else "others", []).append(path)
    return found


def replace(content, path, text):
    *way, last = path
    for step in way:
        content = content[step]
    content[last] = text


def with_keys(value):
    """A file in which every mapping has one entry more, whose key is markup; its value is that of another entry."""
    if isinstance(value, list):
        return [with_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    more = {MARKUP: next(reversed(value.values()))} if value else {}
    return {key: with_keys(item) for key, item in (value | more).items()}


def made(folder, contents):
    """The page of these files; None where they are refused."""
    for name, content in contents.items():
        write_json(folder / name, content)
    try:
        return build_page(folder)
    except ValueError:
        return None


def check(browser, page, shipped):
    """Open a page, use all of it, and look at what it did: its text."""
    browser.open(page)
    ran, scripts, text = browser.evaluate(USED)
    assert (ran, scripts, browser.evaluate(FOREIGN)) == (0, shipped, 0)
    assert browser.evaluate("document.title.length") > 0
    folder = page.resolve().parent.as_uri()
    assert browser.requests and all(url.startswith((folder, "data:")) for url in browser.requests)
    assert not [error for error in browser.errors if "Content Security Policy" in error]  # nothing even tried
    return text


@pytest.mark.parametrize("name", FILES)
def test_markup_is_text_wherever_it_stands(browser, tmp_path, name):
    browser.open(made(tmp_path, FILES[name]()))
    shipped, shown = browser.evaluate("document.scripts.length"), 0
    for group, paths in groups(FILES[name]()[name]).items():
        contents = FILES[name]()
        for path in paths:
            replace(contents[name], path, MARKUP)
        page = made(tmp_path, contents)
        assert page is not None or group in DECIDING
        if page is not None:
            shown += check(browser, page, shipped).count(MARKUP)
    assert shown >= SHOWN[name]


@pytest.mark.parametrize("name", FILES)
def test_markup_as_keys(browser, tmp_path, name):
    page = made(tmp_path, {file: with_keys(content) for file, content in FILES[name]().items()})
    browser.open(page)
    check(browser, page, browser.evaluate("document.scripts.length"))


def test_videos_are_files_whatever_their_names_say(browser, tmp_path):
    content = copy.deepcopy(short_sweep())
    names = (
        "javascript:window.ran = 1",
        "data:text,<script>window.ran = 1<",
        "blob:x",
        "#x",
        "?x",
        "%2e%2e",
        "a\"b'c>",
    )
    for cell, name in zip(content["cells"] * 2, names):
        (tmp_path / name).write_bytes(b"no video")
        cell["video"] = name
    page = made(tmp_path, {"sweep.json": content})
    browser.open(page)
    check(browser, page, browser.evaluate("document.scripts.length"))
