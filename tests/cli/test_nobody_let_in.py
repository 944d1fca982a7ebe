"""What strangers give: names, links, pictures, models and files that changed; none is obeyed and none is trusted."""

import csv
import io
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import svg
from svg.cli import main
from svg.cli.console import Terminal, visible
from svg.environment import anonymous
from svg.eval import lpips_weights
from svg.eval.compare import compare
from svg.eval.page import build_page
from svg.eval.pairs import write_csv
from svg.eval.video import VideoError, open_video, read_video, write_video
from svg.eval.vmaf import vmaf
from svg.generate.job import read_image
from svg.pipelines import load_pipeline
from svg.pipelines.fingerprint import fingerprint
from svg.sweep.run import _describe

FRAMES = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "pipe:0.mp4", "-y.mp4", "it's.mp4", "a\\b.mp4", "%d.mp4", "concat:a|b.mp4"]
)
def test_videos_of_any_name_are_written_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, FRAMES, fps=8)
    assert os.listdir() == [name] and read_video(name)[0].shape == FRAMES.shape


def test_a_playlist_is_no_video(tmp_path):
    write_video(tmp_path / "a.mp4", FRAMES, fps=8)
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    for name in ("list.mp4", "concat.mp4"):
        with pytest.raises(VideoError, match="not a video"):
            open_video(tmp_path / name)


@pytest.mark.parametrize("name", ["it's", "a\\b", "a:b,c;[d]"])
def test_vmaf_in_a_folder_of_any_name(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    assert len(vmaf(FRAMES, FRAMES)) == 2


def test_a_name_is_no_formula(tmp_path):
    values = {"mean": 1.0, "per_frame": [1.0]}
    row = {"frames": 1, **dict.fromkeys(("psnr", "ssim", "lpips", "vmaf"), values), "temporal_psnr": {"per_frame": []}}
    write_csv(tmp_path / "t.csv", [{"name": name, **row} for name in ("=1+1", "+1", "-1", "@x", "plain")])
    rows = list(csv.reader((tmp_path / "t.csv").open()))[1:]
    assert [row[0] for row in rows] == ["'=1+1", "'+1", "'-1", "'@x", "plain"]


def test_the_terminal_obeys_no_text(capsys):
    Terminal().print("[/x] [red]a[/red] :smile: \x1b[2J\x07\x9b\u202e")
    assert capsys.readouterr().out.strip() == r"[/x] [red]a[/red] :smile: \x1b[2J\x07\x9b\x202e"
    assert visible("a\tb\nc") == "a\tb\nc"


@pytest.mark.parametrize("name", ["[bold]", "[red]a", "\x1b[31mx"])
def test_brackets_and_control_characters_in_names(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    write_video(f"{name}.mp4", FRAMES, fps=8)
    assert main(["evaluate", f"{name}.mp4", f"{name}.mp4", "--lpips", "none"]) == 0
    out = "".join(capsys.readouterr().out.split())
    assert visible(name) in out and "compareavideowithitself" in out and "\x1b[31mx" not in out
    assert main(["evaluate", f"{name}.none", f"{name}.mp4"]) == 2
    err = capsys.readouterr().err
    assert visible(name) in err and "\x1b" not in err


@pytest.mark.parametrize("link", ["../x.mp4", "/etc/passwd", "videos/../../x.mp4", "linked.mp4"])
def test_a_page_links_nothing_outside(tmp_path, link):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "x.mp4").write_text("x")
    (folder / "linked.mp4").symlink_to(tmp_path / "x.mp4")
    cell = {
        **dict.fromkeys(("quality", "transformers", "reference", "control", "error")),
        "id": "a",
        "role": "dense",
        "status": "finished",
        "label": "l",
        "reproduce": "c",
        "video": link,
        "method": {"method": "dense"},
        "seconds": {},
        "density": {},
        "device": {"type": "cpu", "threads": 1},
        "generation": dict.fromkeys(("num_frames", "height", "width", "steps", "prompt", "seed", "fps"), 1),
        "model": {"name": "m"},
        "run": {"dtype": "fp32", "device": "cpu"},
    }
    sweep = {"format": "svg-sweep", "version": 1, "state": "finished", "command": "c", "versions": {}, "notes": []}
    (folder / "sweep.json").write_text(json.dumps({**sweep, "cells": [cell], "counts": {"failed": 0, "pending": 0}}))
    with pytest.raises(ValueError, match="must be in the folder"):
        build_page(folder)


@pytest.mark.parametrize("content", [b"not the weights", b"\x80\x02cos\nsystem\n."])
def test_linear_layers_of_lpips_are_the_published_ones(tmp_path, monkeypatch, content):
    import lpips

    assert lpips_weights.load_lpips("alex") is not None
    (tmp_path / "weights" / "v0.1").mkdir(parents=True)
    (tmp_path / "weights" / "v0.1" / "alex.pth").write_bytes(content)
    monkeypatch.setattr(lpips, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(lpips_weights.LpipsWeightsError, match="not the published file"):
        lpips_weights.load_lpips("alex")


def test_notes_name_no_folder_of_the_user(monkeypatch):
    monkeypatch.setattr("svg.eval.lpips_weights.DISTRIBUTION", "no-such-distribution")
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/home/somebody/.cache")
    frames = np.repeat(np.repeat(FRAMES, 2, 1), 2, 2)
    assert "somebody" not in compare(frames, frames)["lpips"]["note"]


def test_failures_name_no_folder_of_the_machine():
    try:
        open(Path.home() / "no such file")
    except OSError as error:
        told = _describe(error)
    assert str(Path.home()) not in json.dumps(told) and str(Path(__file__).parent) not in told["traceback"]
    assert Path(__file__).name in told["traceback"]


def test_texts_of_failures_name_no_machine(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "box-17.example")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/home/somebody"))
    text = f"no {sys.prefix}/lib/x.py on box-17.example (pid=17, ip=10.0.0.1) for somebody in /home/somebody/models, {svg.__file__}"
    found = anonymous(text)
    assert found.startswith("no /lib/x.py on -") and "~/models" in found and "svg/__init__.py" in found
    assert not any(
        word in found for word in ("somebody", "box-17", "10.0.0.1", sys.prefix, str(Path(svg.__file__).parents[1]))
    )
    assert anonymous("somebodys box-17.example2 stays") == "somebodys box-17.example2 stays"


def test_a_report_holds_what_the_docs_list_and_no_machine(model, tmp_path, monkeypatch):
    """Every key is in the documentation's table; no text in it names the host, the user or where svg is installed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "model")
    size = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2", "--method", "svg1"]
    assert (
        main(["generate", "a red ball", "--model", "model", *size, "--lpips", "none", "--no-control", "--out", "out"])
        == 0
    )
    text = Path("out/report.json").read_text()
    section = (
        (Path(__file__).parents[2] / "docs/evaluation.md")
        .read_text()
        .partition("## What a report holds")[2]
        .partition("\n## ")[0]
    )
    listed = {
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in re.findall("`(\\w+)`", line.split("|")[1])
    }
    assert set(json.loads(text)) == listed
    private = {platform.node(), str(Path.home()), str(tmp_path), sys.prefix, str(Path(svg.__file__).parents[1])} - {
        "",
        "/",
        "/root",
    }
    page = Path("out/report.html").read_text()
    whole = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in private]  # a host called vm is not in "vmaf"
    assert not [word for word in whole if re.search(word, text) or re.search(word, page)]


def test_pictures_of_strangers(tmp_path):
    data = io.BytesIO()
    Image.new("1", (20000, 20000)).save(data, "png")
    (tmp_path / "bomb.png").write_bytes(data.getvalue())
    (tmp_path / "text.png").write_text("no picture")
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "png")
    (tmp_path / "half.png").write_bytes(data.getvalue()[:80])
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("bomb.png", "text.png", "half.png", "pipe.png", "none.png", "."):
        with pytest.raises(ValueError, match="image must be"):
            read_image(str(tmp_path / name))


def test_every_byte_of_a_model_counts(tmp_path, model):
    """In the middle of a large file, behind a linked folder, in a tokenizer, with the time of the change set back."""
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    for name in ("elsewhere/big.safetensors", "m/vocabulary.txt"):
        (tmp_path / name).write_bytes(bytes(3 * 2**20))
    (tmp_path / "m" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "m" / "circle").symlink_to(tmp_path / "m")
    seen = {fingerprint(str(tmp_path / "m"))}
    for count, path in enumerate((tmp_path / "elsewhere/big.safetensors", tmp_path / "m/vocabulary.txt"), 2):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        with path.open("r+b") as file:
            file.seek(3 * 2**19)
            file.write(b"x")
        os.utime(path, ns=times)
        seen.add(fingerprint(str(tmp_path / "m")))
        assert len(seen) == count
    assert fingerprint(str(tmp_path / "m")) in seen


def damage(folder, change):
    path = next(iter(sorted(folder.glob("transformer/config.json"))))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: [],
        lambda config: None,
        lambda config: {**config, "num_attention_heads": 0},
        lambda config: {**config, "num_layers": -1},
        lambda config: {**config, "patch_size": [0, 2, 2]},
        lambda config: {**config, "in_channels": "x"},
        lambda config: {**config, "ffn_dim": -5},
        lambda config: {**config, "rope_max_seq_len": "x"},
        lambda config: {**config, "quantization_config": {"quant_method": "no-such"}},
    ],
    ids=map(str, range(9)),
)
def test_configs_of_strangers(tmp_path, model, change):
    shutil.copytree(model, tmp_path / "m")
    damage(tmp_path / "m", change)
    with pytest.raises(ValueError, match="must"):
        load_pipeline(tmp_path / "m", device="cpu")


def test_a_pickle_under_another_name(tmp_path, model):
    shutil.copytree(model, tmp_path / "m")
    for part in ("text_encoder", "transformer"):
        for path in (tmp_path / "m" / part).glob("*.safetensors"):
            before = path.read_bytes()
            torch.save({"x": torch.zeros(1)}, path)
            with pytest.raises(ValueError, match="model must be complete and in safetensors"):
                load_pipeline(tmp_path / "m", device="cpu")
            path.write_bytes(before)


def test_other_files_say_what_the_docs_list(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "model")
    size = ["--model", "model", "--height", "32", "--width", "48", "--frames", "9", "--steps", "2", "--device", "cpu"]
    for words in (
        ["record", "a ball", *size, "--record-steps", "1", "--out", "q"],
        ["adapt", "q", "--min-cosine", "0.5", "--device", "cpu", "--out", "layers.json"],
        ["adapt-linears", "a ball", *size, "--out", "linears.json"],
        ["sparge-tune", "q", "--device", "cpu", "--out", "thresholds"],
    ):
        assert main(words) == 0
    rows = re.findall(
        r"^\| (\w+), `svg .*?` \| (.*)$", (Path(__file__).parents[2] / "docs/evaluation.md").read_text(), re.M
    )
    listed = {name: set(re.findall("`(\\w+)`", text)) for name, text in rows}
    with safe_open("q", framework="pt") as recording, safe_open("thresholds", framework="pt") as thresholds:
        said = {"recording": recording.metadata()["source"], "thresholds": thresholds.metadata()["about"]}
    said = {name: json.loads(text) for name, text in said.items()}
    said |= {name: json.loads(Path(f"{name}.json").read_text())["about"] for name in ("layers", "linears")}
    assert {name: set(about) for name, about in said.items()} == {name: listed[name] for name in said}
    assert said["layers"]["source"] == said["recording"] and listed["preset"] == {"model", "generation", "source"}
    home = [platform.node(), str(Path.home()), str(tmp_path), sys.prefix]
    assert not [word for word in home if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", json.dumps(said))]
