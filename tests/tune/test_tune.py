"""`svg tune` from end to end on a tiny model: results, preset, resumption, bad input."""

import dataclasses
import importlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from sweep_support import killed, start

from svg.cli import main
from svg.config import SVG2Config
from svg.configs import load_preset
from svg.eval.video import read_video

TIMED = ("attention_seconds", "dense_attention_seconds", "updated", "command")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(arguments, tmp_path_factory):
    """Folder of a tuning that nothing disturbed, and its arguments but --out."""
    folder = tmp_path_factory.mktemp("tune") / "out"
    arguments = ["--min-psnr", "40", *arguments]
    assert main(["tune", *arguments, "--out", str(folder)]) == 0
    return folder, arguments


def summary(out):
    return json.loads(Path(out, "tune.json").read_text())


def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMED}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def test_results(undisturbed):
    out, _ = undisturbed
    found = summary(out)
    assert found["state"] == "finished" and found["target"] == {"kind": "min_psnr", "value": 40.0, "worst": False}
    assert found["tuned"]["met"] and found["tuned"]["value"] >= 40 and found["uniform"]["met"]
    assert found["cost"]["unit"] == "density" and found["device"] == "cpu" and found["tokens"] == [3, 2, 3]
    saved = 1 - found["tuned"]["density"] / found["uniform"]["density"]
    assert found["saved"] == pytest.approx(saved)
    prompts = {cell["generation"]["prompt"] for cell in json.loads(Path(out, "sweep.json").read_text())["cells"]}
    assert prompts == {"a blue box moves up"}
    prompts = {cell["generation"]["prompt"] for cell in json.loads(Path(out, "search/sweep.json").read_text())["cells"]}
    assert prompts == {"a red ball moves right"}
    assert Path(out, "report.html").is_file() and Path(out, "search/report.html").is_file()


def test_dense_steps_belong_to_the_search(undisturbed):
    """Of three steps one is dense without a tuning; the trials say which numbers were tried, the preset which was best."""
    out, _ = undisturbed
    found = summary(out)
    assert {t["dense_steps"] for t in found["trials"] if t["family"] == "uniform"} == {1} and found["steps"] == 3
    assert {t["dense_steps"] for t in found["trials"] if t["family"] == "tuned"} == {1, 0}
    dense = found["tuned"]["dense_steps"]
    assert (
        found["winner"] == "tuned"
        and f"budgets of heads after {dense} dense step" in load_preset(out / "tuned.yaml").source
    )
    config = load_preset(out / "tuned.yaml").config("svg2")
    assert [config.is_warmup(step, 3, 2, 3) for step in range(3)] == [step < dense for step in range(3)]
    for trial in found["trials"]:  # what is predicted counts dense steps, as what is measured does
        assert trial["spent"] == pytest.approx(trial["density"], abs=0.05)


def test_saved_at_equal_quality(undisturbed):
    found = summary(undisturbed[0])
    for family in ("tuned", "uniform"):
        trials = [t for t in found["trials"] if (t["family"], t["videos"]) == (family, "held-out")]
        below = max((t for t in trials if t["value"] < 40), key=lambda t: t["value"])
        above = min((t for t in trials if t["value"] >= 40), key=lambda t: t["value"])
        share = (40 - below["value"]) / (above["value"] - below["value"])
        exact = below["density"] + share * (above["density"] - below["density"])
        assert found["cost_at_target"][family] == pytest.approx(exact)
    assert found["saved_at_equal_quality"] == pytest.approx(
        1 - found["cost_at_target"]["tuned"] / found["cost_at_target"]["uniform"]
    )


def test_dense_steps_as_they_are(arguments, here, capsys):
    short = ["--keep-warmup", "--probe", "none", "--no-control", "--rounds", "2"]
    assert main(["tune", "--min-psnr", "40", *arguments, *short, "--out", "out"]) == 0
    found = summary("out")
    assert {trial["dense_steps"] for trial in found["trials"]} == {1}
    assert found["tuned"]["config"]["warmup_steps"] == 0.2  # not a third, though it would be as many
    equal = found["uniform_at_equal_cost"]
    assert equal["videos"] == "held-out" and equal["density"] == pytest.approx(found["tuned"]["density"], abs=0.08)
    assert "1 of 3" in capsys.readouterr().out


def test_dense_steps_alone(arguments, here):
    short = ["--budgets", "one", "--probe", "none", "--no-control", "--rounds", "2"]
    assert main(["tune", "--min-psnr", "40", *arguments, *short, "--out", "out"]) == 0
    found = summary("out")
    assert {t["dense_steps"] for t in found["trials"] if t["family"] == "tuned"} == {1, 0}
    assert found["tuned"]["config"]["head_top_p"] is None and "tuned top_p=" in found["tuned"]["label"]
    assert load_preset("out/tuned.yaml").config("svg2").head_top_p is None


def test_preset_is_bound(undisturbed, here, model, capsys):
    out, _ = undisturbed
    found, path = summary(out), out / "tuned.yaml"
    preset = load_preset(path)
    config = preset.config("svg2")
    winner = found[found["winner"]]["config"]
    assert config.to_dict()["head_top_p"] == (winner["head_top_p"] and tuple(map(tuple, winner["head_top_p"])))
    assert isinstance(config, SVG2Config) and config.tuned_for.tokens == (3, 2, 3) and config.tuned_for.device == "cpu"
    assert preset.generation.frames == 9 and preset.model == str(model) and "svg tune" in preset.source
    run = ["generate", "a red ball", "--preset", str(path), "--lpips", "none", "--no-control", "--device", "cpu"]
    assert main([*run, "--out", "a"]) == 0
    report = json.loads(Path("a/report.json").read_text())
    assert report["method"]["head_top_p"] == winner["head_top_p"]
    # The report's own command gives the same settings again.
    assert "--preset" in report["command"] and "--set head_top_p" not in report["command"]
    capsys.readouterr()
    assert main([*run, "--out", "b", "--frames", "13"]) == 2
    assert "token grid they were tuned for, 3x2x3, got 4x2x3" in capsys.readouterr().err
    content = yaml.safe_load(path.read_text())
    content["svg2"]["tuned_for"]["device"] = "NVIDIA H100"
    Path("gpu.yaml").write_text(yaml.safe_dump(content))
    other = [*run[:3], "gpu.yaml", *run[4:]]
    assert main([*other, "--out", "b"]) == 2
    assert "device they were tuned for, NVIDIA H100, got cpu: run `svg tune`" in capsys.readouterr().err
    content["svg2"]["tuned_for"]["fingerprint"] = "0" * 16
    Path("gpu.yaml").write_text(yaml.safe_dump(content))
    assert main([*other, "--out", "b"]) == 2
    assert "weights they were tuned for" in capsys.readouterr().err and not Path("b").exists()
    assert main([*other, "--out", "b", "--set", "tuned_for=null"]) == 0  # the way out that the errors name


def journals(out):
    """Inode and time of every entry: what ran again would have others."""
    return {
        path.relative_to(out): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in Path(out).rglob("journal/*.json")
        if path.name != "format.json"
    }


def test_killed_at_random_moments(undisturbed, here):
    folder, arguments = undisturbed
    kills, before = [], {}
    while len(kills) < 3:
        child = start([*arguments, "--out", "out"], command="tune")
        while not Path("out/curves").exists():
            time.sleep(0.01)
        kills.append(random.Random().uniform(0.2, 2.5))
        if not killed(child, kills[-1]):
            break  # done before
        assert before.items() <= journals("out").items()
        before = journals("out")
    assert main(["tune", *arguments, "--out", "out"]) == 0
    assert before.items() <= journals("out").items()
    assert untimed(summary("out")) == untimed(summary(folder)), kills
    assert len(journals("out")) == len(journals(folder))
    before = journals("out")
    assert main(["tune", *arguments, "--out", "out"]) == 0  # nothing left to do
    assert journals("out") == before


def test_a_speed_up_and_svg1(arguments, here, capsys):
    keep = [word for word in arguments if not word.startswith(("num_", "min_k", "first_"))]
    keep = [word for word in keep if word != "--set"]
    options = ["--method", "svg1", "--set", "block_size=4", "--no-control", "--probe", "none", "--seeds", "0,1"]
    assert main(["tune", "--target-speedup", "1.1", *keep, *options, "--out", "out"]) == 0
    found = summary("out")
    assert found["tuned"]["value"] >= 1.1 and found["tuned"]["value"] == pytest.approx(
        1 / found["tuned"]["density"], rel=0.02
    )
    assert (found["weight"][0][0], found["method"]["method"]) == (1.0, "svg1")
    assert load_preset("out/tuned.yaml").config("svg1").tuned_for is not None
    assert "2 held-out" not in capsys.readouterr().out
    assert main(["tune", "--target-speedup", "50", *keep, *options, "--out", "out"]) == 1
    assert summary("out")["state"] == "missed" and summary("out")["preset"] is None
    assert "target was not reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "one of --min-psnr, --max-lpips, --target-speedup must be given, got 0"),
        (["--min-psnr", "30", "--max-lpips", "0.1"], "must be given, got 2"),
        (["--min-psnr", "-3"], "--min-psnr must be a finite number > 0, got -3"),
        (["--max-lpips", "0.1"], "--max-lpips needs a network: --lpips alex or vgg, got none"),
        (["--min-psnr", "30", "--held-out", "a red ball moves right"], "in both"),
        (["--min-psnr", "30", "--prompt", "a red ball moves right"], "none twice"),
        (["--min-psnr", "30", "--tune-steps", "0"], "--tune-steps must be among the sparse steps, 1 to 2, got [0]"),
        (["--min-psnr", "30", "--set", "warmup_steps=1.0"], "warmup_steps must leave a step of 3 sparse, got 1.0"),
        (["--min-psnr", "30", "--set", "min_tokens=5000"], "min_tokens must be at most the video's"),
        (["--min-psnr", "30", "--set", "topp=3"], "unknown key 'topp'"),
        (["--min-psnr", "30", "--method", "dense"], "Invalid value for '--method'"),
        (["--min-psnr", "30", "--set", "head_top_p=[[1,1],[1,1],[1,1]]"], "must have no per-head budgets yet"),
    ],
)
def test_bad_input(arguments, here, capsys, extra, message):
    assert main(["tune", *arguments, *extra, "--out", "out"]) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_prompts_are_needed_for_other_models(unprompted, here, capsys):
    assert main(["tune", "--min-psnr", "30", *unprompted]) == 2
    assert "--prompt must give at least one prompt" in capsys.readouterr().err


def test_a_sweep_in_the_same_folder_is_refused(arguments, here, capsys):
    Path("out/curves/journal").mkdir(parents=True)
    Path("out/curves/journal/format.json").write_text('{"format": "svg-sweep-journal", "version": 99}')
    assert main(["tune", "--min-psnr", "30", *arguments, "--out", "out"]) == 2
    assert "must have version 1, got 99" in capsys.readouterr().err


@pytest.mark.parametrize("dear", [False, True])
def test_seconds_as_cost(arguments, here, monkeypatch, dear):
    """As on a GPU: attention time is what is spent, though here it is a CPU's."""
    run = importlib.import_module("svg.tune.run")
    original = run.Tuner.__init__

    def on_gpu(self, *args, **options):
        original(self, *args, **options)
        self._on_gpu = True

    monkeypatch.setattr(run.Tuner, "__init__", on_gpu)
    if dear:  # planning alone takes longer than dense attention: so does every sparse setting
        cost = run.fit_cost
        monkeypatch.setattr(
            run, "fit_cost", lambda *a: (dataclasses.replace(cost(*a)[0], plan=1e3, unit="seconds"), [])
        )
    short = [*arguments, "--rounds", "1", "--probe", "layers", "--no-control"]
    assert main(["tune", "--min-psnr", "30", *short, "--out", "out"]) in (0, 1)  # times decide: either is right
    found = summary("out")
    if dear:
        assert found["tuned"]["config"]["head_top_p"] == [[1.0, 1.0]] * 3 and found["tuned"]["met"]
        assert found["uniform"]["spent"] > 1
    elif found["cost"]["unit"] == "seconds":
        assert found["cost"]["per_density"] > 0 and "a sparse call takes" in found["notes"][0]
    else:
        assert "too short to fit" in found["notes"][0]
    if found["saved"] is not None:
        spent = [found[name]["attention_seconds"] for name in ("tuned", "uniform")]
        assert found["saved"] == pytest.approx(1 - spent[0] / spent[1])


def finished(out):
    """Name -> frames of every video that the journals of a tuning and of its search call finished; all of them whole."""
    videos = {}
    for path in out.rglob("journal/*.json"):
        record = json.loads(path.read_text()).get("record", {})
        if record.get("status") == "finished":
            video = path.parents[1] / record["video"]
            videos[str(video.relative_to(out))] = read_video(video)[0]
    return videos


def test_ten_interrupts_of_a_tuning(undisturbed, tmp_path, monkeypatch):
    whole, arguments = undisturbed
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    child = start([*arguments, "--out", str(tmp_path / "whole")], command="tune")
    child.join(300)
    assert child.exitcode == 0
    takes = time.monotonic() - begun  # three of the longest runs that an interrupt ends are less than one whole one
    out, chance, seen, codes = tmp_path / "out", random.Random(3), {}, []
    for _ in range(10):
        child = start([*arguments, "--out", str(out)], command="tune")
        child.join(chance.uniform(takes / 20, takes / 4))
        if child.is_alive():
            os.kill(child.pid, signal.SIGINT)
            child.join(60)
        codes.append(child.exitcode)
        videos = finished(out) if out.exists() else {}
        assert seen.keys() <= videos.keys(), "a finished video is gone"
        for name, frames in seen.items():
            assert (videos[name] == frames).all()
        assert all(len(frames) == 9 for frames in videos.values())
        seen = videos
    assert set(codes) <= {0, 130} and codes.count(130) >= 3, (codes, Path("child.log").read_text()[-2000:])
    begun = time.monotonic()
    child = start([*arguments, "--out", str(out)], command="tune")
    child.join(300)
    assert child.exitcode == 0, (time.monotonic() - begun, Path("child.log").read_text()[-2000:])
    assert untimed(summary(out)) == untimed(summary(whole))
    assert not list(out.rglob(".svg-*"))
