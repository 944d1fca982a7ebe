"""A small sweep and a run as `svg` writes them, with videos whose every frame looks different, and a browser."""

import numpy as np
import pytest
from chromium import BOTH_LOADED, Chromium
from page_files import FPS, FRAMES, HEIGHT, WIDTH, run_content, sweep_content

from svg.eval.files import write_json
from svg.eval.page import build_page
from svg.eval.video import write_video


def clip(shift):
    """A bright bar on stripes; it moves by 8 pixels a frame, so two different frames never look alike."""
    frames = np.full((FRAMES, HEIGHT, WIDTH, 3), 60, np.uint8)
    frames[:, :, ::16] = 90
    for index in range(FRAMES):
        frames[index, 8:56, 4 + 8 * index : 16 + 8 * index] = (230, 60 + shift, 40)
    return frames


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a sweep #1")  # a space and a hash: names that break careless links
    (folder / "videos").mkdir()
    for number in range(4):
        for shift, name in enumerate("dabc"):
            write_video(folder / "videos" / f"{name}{number}.mp4", clip(40 * shift), FPS)
    write_json(folder / "sweep.json", sweep_content())
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for shift, name in enumerate(("dense", "accelerated")):
        write_video(folder / f"{name}.mp4", clip(40 * shift), FPS)
    write_json(folder / "report.json", run_content())
    return folder


@pytest.fixture(scope="session")
def browser():
    with Chromium() as chromium:
        yield chromium


def opened(browser, folder):
    browser.open(build_page(folder))
    browser.wait(BOTH_LOADED)
    yield browser
    assert browser.errors == []


@pytest.fixture
def sweep(browser, sweep_folder):
    yield from opened(browser, sweep_folder)


@pytest.fixture
def run(browser, run_folder):
    yield from opened(browser, run_folder)
