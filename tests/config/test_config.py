import dataclasses
import json
import subprocess
import sys

import pytest

from svg.config import METHODS, DenseConfig, NearConfig, SpargeConfig, SVG1Config, SVG2Config, config_from_dict
from svg.configs import load_preset, preset_names
from svg.engine.layout import TokenLayout

BAD = [
    (SVG1Config, {"density": 0}, ValueError, r"density must be in \(0, 1\], got 0"),
    (SVG1Config, {"density": 1.01}, ValueError, "density"),
    (SVG1Config, {"density": float("nan")}, ValueError, "density"),
    (SVG1Config, {"density": "half"}, TypeError, "density must be a number"),
    (SVG1Config, {"sample_rows": 0}, ValueError, "sample_rows must be >= 1"),
    (SVG1Config, {"block_size": 6.5}, TypeError, "block_size must be an integer"),
    (SVG2Config, {"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
    (SVG2Config, {"min_k_ratio": -0.1}, ValueError, r"min_k_ratio must be in \[0, 1\]"),
    (SVG2Config, {"num_q_clusters": 0}, ValueError, "num_q_clusters"),
    (SVG2Config, {"iterations": 0}, ValueError, "iterations"),
    (SVG2Config, {"budget": 2}, ValueError, "budget"),
    (
        SVG2Config,
        {"precision": "fp8"},
        ValueError,
        "precision must be one of native, int8-fp8, int8-fp8-acc16, int8-fp16, got 'fp8'",
    ),
    (SVG1Config, {"precision": None}, ValueError, "precision"),
    (SpargeConfig, {"topk": 0}, ValueError, r"topk must be in \(0, 1\], got 0"),
    (SpargeConfig, {"cdf": 1.2}, ValueError, r"cdf must be in \(0, 1\], got 1.2"),
    (
        SpargeConfig,
        {"cdf": 0.9, "topk": 0.5},
        ValueError,
        "one of topk, cdf, thresholds must be given, got topk and cdf",
    ),
    (SpargeConfig, {"simthresh": 1}, ValueError, r"simthresh must be in \[-1, 1\), got 1"),
    (SpargeConfig, {"order": "zigzag"}, ValueError, "order must be one of hilbert, rowmajor, got 'zigzag'"),
    (SpargeConfig, {"attention_sink": 1}, TypeError, "attention_sink must be true or false"),
    (SpargeConfig, {"pv_threshold": 10.0}, ValueError, "pv_threshold must come with precision int8-fp8"),
    (SpargeConfig, {"pv_threshold": -1, "precision": "int8-fp8"}, ValueError, "pv_threshold must be >= 0, got -1"),
    (SpargeConfig, {"thresholds": 3}, TypeError, "thresholds must be a file's path"),
    (SpargeConfig, {"thresholds": "a", "simthresh": 0.5}, ValueError, "simthresh must be left out with thresholds"),
    (NearConfig, {"budget": 0.0625}, ValueError, r"budget must be above 1 / granule = 0.0625, the share of the means"),
    (NearConfig, {"early": 1}, ValueError, "early must be below 1, or nothing is left for the last steps, got 1"),
    (NearConfig, {"early": -0.1}, ValueError, r"early must be in \[0, 1\], got -0.1"),
    (NearConfig, {"budget": 1.5}, ValueError, r"budget must be in \(0, 1\], got 1.5"),
    (NearConfig, {"granule": 12}, ValueError, "granule must be one of 8, 16, 32, 64, got 12"),
    (NearConfig, {"rows": 96}, ValueError, "rows must be one of 16, 32, 64, 128, got 96"),
    (NearConfig, {"pool": True}, ValueError, "pool must be one of 1, 2, 4, 8, got True"),
    (NearConfig, {"query_order": "raster"}, ValueError, "query_order must be one of clusters, hilbert, got 'raster'"),
    (NearConfig, {"floor": 2}, ValueError, r"floor must be in \[0, 1\], got 2"),
    (NearConfig, {"max_drift": 0.1}, ValueError, "max_drift must come with refresh > 1"),
    (NearConfig, {"cluster_tokens": 0}, ValueError, "cluster_tokens must be >= 1"),
    (DenseConfig, {"warmup_steps": 1.5}, ValueError, "warmup_steps"),
    (DenseConfig, {"warmup_layers": True}, TypeError, "warmup_layers"),
    (DenseConfig, {"seed": -1}, ValueError, "seed must be >= 0"),
    (DenseConfig, {"dense_backend": "fast"}, ValueError, "dense_backend must be one of auto, cudnn"),
    (DenseConfig, {"check_finite": 1}, TypeError, "check_finite"),
]


@pytest.mark.parametrize(("config", "values", "error", "message"), BAD)
def test_impossible_values_raise(config, values, error, message):
    with pytest.raises(error, match=message):
        config(**values)


def test_dict_round_trip():
    for config in (DenseConfig(seed=3), SVG1Config(density=0.5), SVG2Config(budget=0.25), SpargeConfig(cdf=0.9)):
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dict_names_the_choices():
    with pytest.raises(
        ValueError, match="method must be one of dense, near, svg1, svg2, sparge, sage2, sage2\\+\\+, sage3, got 'svg3'"
    ):
        config_from_dict({"method": "svg3"})
    with pytest.raises(
        ValueError, match=r"'top_p' for method near \(it belongs to svg2, where near has budget\); choose"
    ):
        config_from_dict({"method": "near", "budget": 0.25, "top_p": 0.9})
    with pytest.raises(ValueError, match="unknown key 'top_k' for method svg2; choose from .*top_p"):
        config_from_dict({"method": "svg2", "top_k": 3})


def test_sparge_resolves_how_much_is_kept():
    assert SpargeConfig().topk == 0.5
    assert SpargeConfig(cdf=0.9).topk is None and SpargeConfig(thresholds="file").topk is None


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        SVG1Config().density = 0.5


@pytest.mark.parametrize(
    ("share", "total", "count"),
    [(0.2, 15, 3), (0.2, 50, 10), (0.03, 40, 2), (0.03, 30, 1), (0.025, 42, 2), (0.1, 7, 1), (0, 10, 0), (1, 10, 10)],
)
def test_warmup_counts(share, total, count):
    steps = SVG1Config(warmup_steps=share, warmup_layers=0)
    assert [steps.is_warmup(i, total, 0, 9) for i in range(total)] == [i < count for i in range(total)]
    layers = SVG1Config(warmup_steps=0, warmup_layers=share)
    assert [layers.is_warmup(0, 9, i, total) for i in range(total)] == [i < count for i in range(total)]


def test_layout_slices():
    first, last = TokenLayout(2, 3, 4, 5, "first"), TokenLayout(2, 3, 4, 5, "last")
    assert (first.text_slice, first.video_slice) == (slice(0, 5), slice(5, 29))
    assert (last.text_slice, last.video_slice) == (slice(24, 29), slice(0, 24))
    assert first.tokens_per_frame == 12 and first.video_tokens == 24 and first.total_tokens == 29


@pytest.mark.parametrize("values", [(0, 3, 4), (2, 3, 4, 5), (2, 3, 4, 0, "last"), (2, 3, 4, 5, "middle")])
def test_impossible_layouts_raise(values):
    with pytest.raises(ValueError):
        TokenLayout(*values)


# steps, warm-up steps / layers, SVG1 density, query / key clusters
PUBLISHED = {
    "hunyuan-video-720p": (50, 0.10, 0.03, 0.25, 400, 1000),
    "hunyuan-video-480p": (50, 0.04, 0.0, 0.20, 200, 1000),
    "wan2.1-t2v-720p": (50, 0.20, 0.03, 0.30, 300, 1000),
    "wan2.1-i2v-720p": (40, 0.35, 0.03, 0.30, 300, 1000),
    "wan2.1-i2v-480p": (40, 0.20, 0.03, 0.30, 200, 1000),
}


def test_presets_hold_the_published_settings():
    for name, (steps, warmup_steps, warmup_layers, density, q, k) in PUBLISHED.items():
        preset = load_preset(name)
        svg1, svg2 = preset.config("svg1"), preset.config("svg2")
        assert preset.generation.steps == steps
        assert svg1 == SVG1Config(warmup_steps=warmup_steps, warmup_layers=warmup_layers, density=density)
        assert svg2 == SVG2Config(
            warmup_steps=warmup_steps, warmup_layers=warmup_layers, num_q_clusters=q, num_k_clusters=k
        )


@pytest.mark.parametrize("precision", ["int8-fp8", "int8-fp8-acc16", "int8-fp16"])
def test_compensation_goes_with_every_precision(precision):
    settings = load_preset("tiny-wan").config("svg2").to_dict() | {"precision": precision}
    config = config_from_dict(settings)
    assert config.compensate and config.precision == precision


def test_every_preset_is_complete():
    names = preset_names()
    ours = {"wan2.1-t2v-480p", "cogvideox1.5-i2v", "cogvideox1.5-t2v", "cogvideox-5b-t2v", "wan2.1-t2v-1.3b-480p"}
    ours |= {"wan2.2-t2v-a14b-720p", "wan2.2-i2v-a14b-720p", "wan2.2-ti2v-5b-720p", "tiny-wan"}
    assert {*PUBLISHED, *ours} == set(names)
    for name in names:
        preset = load_preset(name)
        assert preset.name == name and preset.source and preset.model
        assert set(preset.methods) == set(METHODS)
        assert preset.generation.frames % 4 == 1
    assert load_preset("wan2.1-t2v-480p").generation.flow_shift == 3.0
    assert load_preset("wan2.1-t2v-720p").generation.flow_shift == 5.0


TEXT = """
model: m
source: s
generation: {steps: 1, height: 16, width: 16, frames: 5, guidance: 1.0, fps: 8}
svg1: {density: 0.5}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("source: s", "source: s\nextra: 1", "mine.yaml: unknown key 'extra' in the file; choose from model"),
        ("fps: 8", "fps: 8, speed: 1", "mine.yaml: unknown key 'speed' in generation; choose from steps"),
        ("density: 0.5", "top_p: 0.5", "mine.yaml: unknown key 'top_p' in svg1; choose from .*density"),
        ("density: 0.5", "density: 1.5", r"mine.yaml: svg1: density must be in \(0, 1\], got 1.5"),
        ("steps: 1,", "", "mine.yaml: key 'steps' is missing in generation"),
        ("steps: 1", "steps: 0", "mine.yaml: steps must be >= 1, got 0"),
        ("model: m", "model: [", "mine.yaml: not valid YAML"),
    ],
)
def test_bad_preset_files_name_file_and_key(tmp_path, old, new, message):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    assert load_preset(path).config("svg1").density == 0.5
    with pytest.raises(ValueError, match="method must be one of dense, svg1, sage2, sage2\\+\\+, sage3, got 'svg2'"):
        load_preset(path).config("svg2")
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_preset(path)


def test_unknown_preset_lists_the_choices():
    with pytest.raises(ValueError, match="preset must be one of cogvideox-5b-t2v.*got .wan3"):
        load_preset("wan3")


def run_python(code, *paths):
    program = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_import_needs_no_torch():
    code = "import svg; svg.SVG2Config(); svg.load_preset('tiny-wan'); print('torch' in sys.modules, svg.__version__)"
    done = run_python(code)
    assert done.stdout.startswith("False 0.") and not done.stderr


def test_unknown_attribute_lists_the_choices():
    import svg

    with pytest.raises(AttributeError, match="choose from accelerate, accelerated, restore, report"):
        svg.__getattr__("nothing")


def test_a_foreign_distribution_is_noticed(tmp_path):
    folder = tmp_path / "svg.py-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: svg.py\nVersion: 1.0\n")
    done = run_python("import svg", tmp_path)
    assert "svg.py is installed and also provides a module called 'svg'" in done.stderr
    assert "pip uninstall svg.py" in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_every_switch_is_true_or_false(method):
    for one in dataclasses.fields(METHODS[method]):
        for wrong in ("maybe", 1, 1.0, None, []) if isinstance(one.default, bool) else ():
            with pytest.raises(TypeError, match=f"{one.name} must be true or false, got"):
                METHODS[method](**{one.name: wrong})
