"""Wrong inputs are refused from JSON files alone: quickly, without torch, without weights, without the network."""

import json
import shutil
import subprocess
import sys
import time

import diffusers
import pytest
from PIL import Image

from svg.cli import main
from svg.generate.job import resolve
from svg.generate.preflight import preflight
from svg.pipelines.generation import rules_of
from svg.pipelines.loading import load_pipeline
from svg.pipelines.model_files import GENERATORS, read_json, read_rules
from svg.pipelines.registry import PIPELINES

SIZE = {"height": 32, "width": 48, "frames": 9}


@pytest.fixture(scope="module")
def without_weights(models, tmp_path_factory):
    """Copies of pipelines that hold JSON files alone."""
    root = tmp_path_factory.mktemp("json")
    for name in ("wan", "wan_i2v"):
        shutil.copytree(models(name), root / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (root / "other").mkdir()
    (root / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (root / "damaged").mkdir()
    (root / "damaged" / "model_index.json").write_text("{")
    Image.new("RGB", (8, 8)).save(root / "picture.png")
    return root


WRONG = [
    ("wan", {"height": 30}, "height must be a multiple of 16"),
    ("wan", {"width": 40}, "width must be a multiple of 16"),
    ("wan", {"frames": 8}, "num_frames must be 4k + 1"),
    ("wan", {"steps": 0}, "steps must be in [1, 10000], got 0"),
    ("wan", {"image": "picture.png"}, "image must be left out for WanPipeline"),
    ("wan_i2v", {}, "image must be given for WanImageToVideoPipeline"),
    ("wan", {"true-cfg": 2}, "true_cfg must be left out on WanPipeline"),
    ("other", {}, "model must be one of WanPipeline"),
    ("damaged", {}, "model_index.json with one JSON object"),
    ("nowhere/", {}, "which does not exist"),
    (
        "wan",
        {"level": "fast", "method": "svg2"},
        "--level must come with --method near, got svg2: leave one of them out",
    ),
    ("wan", {"lora": "no.safetensors"}, "--lora must be an existing file"),
    ("wan", {}, "model must be complete and in safetensors"),
]


@pytest.mark.parametrize("model, change, words", WRONG)
def test_wrong_input_is_refused_in_three_seconds(without_weights, model, change, words):
    """In a fresh process in which torch cannot be imported and no socket can be opened."""
    options = {**SIZE, **change}
    words_of = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code = (
        "import sys, socket; sys.modules['torch'] = sys.modules['diffusers'] = None\n"
        "def closed(*args): raise SystemExit('the network was asked')\n"
        "socket.socket.connect = closed\n"
        "from svg.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    start = time.process_time(), time.monotonic()
    arguments = ["generate", "a ball", "--model", f"./{model}", *words_of]
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=without_weights, capture_output=True, text=True)
    assert run.returncode == 2 and words in run.stderr, run.stderr
    assert len(run.stderr.splitlines()) == 1 and not (without_weights / "svg-out").exists()
    assert time.monotonic() - start[1] < 3


@pytest.mark.parametrize(
    "command", [["generate", "a ball"], ["sweep", "--prompt", "a ball"], ["tune", "--min-psnr", "30"]]
)
def test_a_missing_folder_is_said_before_its_sizes_are_asked_for(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--model", "no/such/folder"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the path 'no/such/folder', which does not exist" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["wan", "wan_2_2", "wan_i2v", "hunyuan", "cogvideox_2b", "cogvideox_1_5", "cogvideox_i2v"]
)
def test_files_and_loaded_pipeline_have_the_same_rules(models, name):
    read, loaded = read_rules(models(name)), rules_of(load_pipeline(models(name), device="cpu"))
    assert read.patch() == loaded.patch()
    for field in ("name", "spatial", "temporal", "image", "last_image", "true_cfg"):
        assert getattr(read, field) == getattr(loaded, field), field


def test_known_generators_are_those_of_the_registry():
    assert set(GENERATORS) == set(PIPELINES)
    for name, known in GENERATORS.items():
        assert known.transformer == PIPELINES[name].transformer
        parameters = __import__("inspect").signature(getattr(diffusers, name).__call__).parameters
        for field, parameter in (("image", "image"), ("last_image", "last_image"), ("true_cfg", "true_cfg_scale")):
            assert getattr(known, field) == (parameter in parameters), (name, field)


@pytest.mark.parametrize(
    "error, words",
    [
        ("GatedRepoError", "is gated: accept its terms at https://huggingface.co/owner/name, then run `hf auth login`"),
        ("RepositoryNotFoundError", "does not know: check the spelling; if it is private, run `hf auth login`"),
        ("RevisionNotFoundError", "has no revision 'old'"),
        ("RemoteEntryNotFoundError", "has none: choose its Diffusers version"),
        ("LocalEntryNotFoundError", "the hub cannot be reached: check the network"),
    ],
)
def test_network_token_and_spelling_are_told_apart(monkeypatch, error, words):
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ValueError) as caught:
        read_json("owner/name", "model_index.json", "old")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_billions_of_weights_on_a_cpu_need_a_yes(generate, models, tmp_path, capsys):
    folder = shutil.copytree(models("wan"), tmp_path / "large")
    path = folder / "transformer" / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "num_attention_heads": 64, "ffn_dim": 20000, "num_layers": 40})
    )
    from svg.generate.job import resolve
    from svg.generate.run_job import load

    common = dict(preset=None, method="dense", settings={}, force=False, device="cpu", dtype=None, offload="none")
    common |= dict(vae_tiling=False, dense=True, control=False, lpips="none", out="out", model=str(folder))
    generation = {"prompt": "a ball", "height": 32, "width": 48, "frames": 9}
    with pytest.raises(ValueError, match=r"GPU for the \d\.\d billion weights of .* pass --yes"):
        load(resolve(generation=generation, **common))
    with pytest.raises(
        Exception, match="size mismatch|shape"
    ):  # goes on to the weights, which are those of a small one
        load(resolve(generation=generation, yes=True, **common))


SPLIT = ["--gpus", "2", "--split", "branches", "--device", "cpu", "--steps", "2"]


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("wan", ["--guidance", "1"], "--split branches must come with guidance above 1, got 1.0: there is one branch"),
        ("hunyuan", [], "--split branches must come with true_cfg above 1, got None: there is one branch"),
        ("cogvideox_2b", ["--height", "64", "--width", "96"], "--split must be sequence for CogVideoXPipeline"),
    ],
)
def test_branches_are_split_where_a_step_has_two_calls(models, tmp_path, capsys, model, more, words):
    size = [word for name, value in SIZE.items() for word in (f"--{name}", str(value))]
    words_of = [
        "generate",
        "a ball",
        "--model",
        str(models(model)),
        *size,
        *SPLIT,
        "--out",
        str(tmp_path / "out"),
        *more,
    ]
    assert main(words_of) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("svg:")]
    assert words in line and not (tmp_path / "out").exists()


def test_branches_are_split_with_the_guidance_that_nobody_gave(models, tmp_path):
    size = {"height": 32, "width": 48, "frames": 9, "steps": 2}
    job = resolve(
        preset=None, model=str(models("wan")), method="svg1", settings={}, generation={"prompt": "a ball", **size},
        out=tmp_path / "out", force=False, dense=True, control=False, device="cpu", dtype=None,
        offload="none", vae_tiling=False, lpips="none", gpus=2, split="branches",
    )  # fmt: skip
    preflight(job)
    assert job.request.guidance > 1
