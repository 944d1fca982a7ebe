"""The page's two players in real headless Chromium: they keep in step, frame by frame."""

import io
import itertools
import time

import numpy as np
import pytest
from chromium import BOTH_LOADED
from PIL import Image

pytestmark = pytest.mark.browser
FRAMES, FPS = 9, 8
FRAME_NUMBERS = f"[...document.querySelectorAll('video')].map((v) => v.currentTime * {FPS})"
COUNTER = "document.querySelector('.counter').textContent"


def pixels(browser, selector):
    """uint8 [H, W, 3] of an element, its rounded corners cut off."""
    return np.asarray(Image.open(io.BytesIO(browser.picture(selector))).convert("RGB"))[8:-8, 8:-8]


def settle(browser):
    browser.wait("[...document.querySelectorAll('video')].every((v) => !v.seeking && v.readyState >= 2)")
    time.sleep(0.1)


# ---- loading


def same_frame(browser, frame=None):
    """Both videos stand inside one frame, and their difference is drawn from it."""
    settle(browser)
    first, second = (int(number) for number in browser.evaluate(FRAME_NUMBERS))
    assert first == second and (frame is None or first == frame)
    assert browser.evaluate(COUNTER) == f"{first + 1} / {FRAMES}"


def show_dense_twice(browser):
    """The same content in both players: their difference is black only if both show the same frame."""
    browser.evaluate("""(() => { const [a, b] = document.querySelectorAll('.side select');
        b.value = a.value; b.dispatchEvent(new Event('change')); })()""")
    browser.wait(BOTH_LOADED)


@pytest.mark.parametrize("frame", [0, 1, 4, 7, 8])
def test_seek(run, frame):
    run.evaluate(f"""(() => {{ const seek = document.querySelector('.track input');
        seek.value = {frame}; seek.dispatchEvent(new Event('input')); }})()""")
    same_frame(run, frame)


def test_seeks_in_a_hurry_end_together(run):
    run.evaluate("""(() => { const seek = document.querySelector('.track input');
        for (const frame of [8, 2, 6, 1, 7, 3, 5]) {
            seek.value = frame; seek.dispatchEvent(new Event('input')); } })()""")
    run.wait(f"{FRAME_NUMBERS}.every((n) => Math.floor(n) === 5)")
    same_frame(run, 5)


def test_players_by_keyboard(run):
    run.evaluate("document.querySelector('.player').focus()")
    moves = {"ArrowRight": 1, "End": 8, "ArrowLeft": 7, "Home": 0}
    for key, frame in moves.items():
        run.press(key)
        run.wait(f"{COUNTER} === '{frame + 1} / {FRAMES}'")
        same_frame(run, frame)
    run.press(" ")
    run.wait("[...document.querySelectorAll('video')].every((v) => !v.paused)")
    assert run.evaluate("document.querySelector('.play').getAttribute('aria-label')") == "Pause"
    run.press(" ")
    run.wait("[...document.querySelectorAll('video')].every((v) => v.paused)")
    same_frame(run)


def test_plays_within_one_frame_and_goes_round(run):
    run.click(".play")
    run.wait("[...document.querySelectorAll('video')].every((v) => !v.paused)")
    apart, shown = [], []
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        first, second = run.evaluate(FRAME_NUMBERS)
        apart.append(abs(first - second))
        shown.append(int(first))
        time.sleep(0.02)
    assert max(apart) <= 1 and len(set(shown)) >= 6
    assert any(later < earlier for earlier, later in itertools.pairwise(shown))  # it went round
    run.click(".play")
    run.wait("[...document.querySelectorAll('video')].every((v) => v.paused)")
    same_frame(run)


@pytest.mark.parametrize("frame", [3, 8])
def test_difference_of_one_frame_is_black(run, frame):
    settle(run)
    assert pixels(run, ".difference canvas").max() > 60  # dense against svg1: the bars differ in colour
    show_dense_twice(run)
    run.evaluate("document.querySelector('.player').focus()")
    run.press("End", *["ArrowLeft"] * (FRAMES - 1 - frame))
    run.wait(f"{COUNTER} === '{frame + 1} / {FRAMES}'")
    same_frame(run, frame)
    assert pixels(run, ".difference canvas").max() <= 4
    run.evaluate("document.querySelectorAll('video')[1].currentTime = 0.5 / 8")  # one video elsewhere is seen
    settle(run)
    assert pixels(run, ".difference canvas").max() > 60


def test_difference_brightness(run):
    settle(run)
    level = {}
    for gain in ("1", "4"):
        run.click(f"input[name=gain][value='{gain}']")
        settle(run)
        level[gain] = pixels(run, ".difference canvas").astype(float).max(axis=(0, 1))[1]
    assert level["4"] == pytest.approx(4 * level["1"], abs=8) and level["1"] > 20


# ---- what was computed, where the time went
