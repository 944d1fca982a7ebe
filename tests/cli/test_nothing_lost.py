"""No command writes over what it reads, and places that cannot be written to are refused before the work."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError

from svg.cli import main
from svg.eval.video import write_video
from svg.pipelines import GenerationRequest, load_pipeline
from svg.recordings.record import record

SIZE = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2"]


@pytest.fixture(scope="module")
def recording(model, tmp_path_factory):
    """All layers of one step, both branches."""
    path = tmp_path_factory.mktemp("recorded") / "qkv.safetensors"
    request = GenerationRequest(prompt="a red ball", height=32, width=48, num_frames=9, steps=2)
    record(load_pipeline(model, device="cpu"), request, path, steps=[1])
    return path


@pytest.fixture
def place(recording, tmp_path, monkeypatch):
    """An empty working folder with the recording q, a link to it, two videos and a picture."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(recording, "q")
    Path("link").symlink_to("q")
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3)).astype(np.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(name, frames, fps=8)
    Image.new("RGB", (48, 32)).save("picture.png")
    return tmp_path


def fails(capsys, *arguments):
    """The one line of a command that must fail and leave every file as it was."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(list(map(str, arguments))) == 2
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("svg: error: ")
    return line


@pytest.mark.parametrize("out", ["q", "./q", "link"])
def test_a_recording_is_not_written_over(place, capsys, out):
    for command in (["adapt", "q"], ["sparge-tune", "q", "--force"], ["sparge-tune", "q"]):
        assert "must not be one of the inputs" in fails(capsys, *command, "--out", out)


def test_a_video_is_not_written_over(place, capsys):
    for flag in ("--json", "--csv"):
        assert "must not be one of the inputs" in fails(capsys, "evaluate", "a.mp4", "b.mp4", flag, "./b.mp4")
    assert "two files" in fails(capsys, "evaluate", "a.mp4", "b.mp4", "--json", "x", "--csv", "x")
    os.mkdir("folder")
    shutil.copy("a.mp4", "folder")
    shutil.copytree("folder", "other")
    assert "must not be one of the inputs" in fails(capsys, "evaluate", "folder", "other", "--json", "other/a.mp4")


def test_model_image_and_grid_are_not_written_over(place, model, capsys, monkeypatch):
    monkeypatch.setattr("svg.recordings.record.load_pipeline", refuse_to_load)
    monkeypatch.setattr("svg.generate.run_job.load_pipeline", refuse_to_load)
    shutil.copytree(model, "model")
    line = fails(capsys, "record", "a", "--model", "model", *SIZE, "--out", "model/model_index.json")
    assert "must not be one of the inputs" in line
    shutil.copy("picture.png", "dense.mp4")
    line = fails(capsys, "generate", "a", "--model", "model", *SIZE, "--image", "dense.mp4", "--out", ".", "--force")
    assert "must not be one of the inputs" in line
    Path("report.html").write_text("{prompts: [a], models: [model], height: 32, width: 48, frames: 9, steps: 2}")
    assert "must not be one of the inputs" in fails(capsys, "sweep", "report.html", "--out", ".")
    shutil.copy("q", "recorded.json")
    sizes = ["--model", "model", *SIZE]
    assert "one of the inputs" in fails(capsys, "sweep", "--recorded", "recorded.json", *sizes, "--out", ".")


def refuse_to_load(*args, **kwargs):
    raise AssertionError("the place must be checked before the model is loaded")


@pytest.mark.parametrize("out", ["no/such/q", "picture.png/q", "pipe", "."])
def test_the_place_is_checked_before_the_run(place, model, capsys, monkeypatch, out):
    monkeypatch.setattr("svg.recordings.record.load_pipeline", refuse_to_load)
    os.mkfifo("pipe")
    for command in (["record", "a", "--model", model, *SIZE], ["sparge-tune", "q"], ["adapt", "q"]):
        assert "out" in fails(capsys, *command, "--out", out)
    assert "--csv" in fails(capsys, "evaluate", "a.mp4", "b.mp4", "--csv", out)


def test_a_full_disk_is_one_line(place, model, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("svg.recordings.record.save_file", full)
    monkeypatch.setattr("svg.methods.sparge.thresholds_file.save_file", full)
    assert "No space left" in fails(capsys, "record", "a", "--model", model, *SIZE, "--out", "new")
    assert "No space left" in fails(capsys, "sparge-tune", "q", "--out", "new")


def test_a_sweep_leaves_foreign_files_alone(place, model):
    """Files that look temporary, and the temporary folder of another command, in a folder that becomes a sweep's."""
    names = ["videos/.mine.part", ".draft.1.part", ".svg-0123456789abcdef.part"]
    os.mkdir("videos")
    os.mkdir(".out.1.part")
    for name in names:
        Path(name).write_text("mine")
    grid = ["--prompt", "a", "--model", model, *SIZE, "--methods", "dense", "--no-control", "--lpips", "none"]
    assert main(["sweep", *map(str, grid), "--out", "."]) == 0
    assert [Path(name).read_text() for name in names] == ["mine"] * 3 and Path(".out.1.part").is_dir()
