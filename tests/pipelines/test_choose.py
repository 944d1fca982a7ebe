"""What `svg.accelerate` runs with: nothing given, a word, a name; and what a run was worth in a few numbers."""

import logging

import pytest
import torch

import svg
from svg.kernels.common import target
from svg.methods.near.levels import LEVELS, level_settings
from svg.pipelines.choose import DENSE_BELOW, resolve, settings_of


def test_a_word_is_near_with_its_settings():
    quality, balanced, fast = map(resolve, LEVELS)
    assert quality.budget > balanced.budget == fast.budget == svg.NearConfig().budget
    assert fast.warmup_steps == 0.1 < balanced.warmup_steps == quality.warmup_steps
    assert resolve(None) == balanced


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "native"), ((8, 9), "int8-fp8"), ((9, 0), "int8-fp8")])
def test_fast_is_in_8_bits_where_the_gpu_has_fp8(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(target, "arch", lambda device: 10 * capability[0] + capability[1])
    fast = resolve("fast")
    assert fast.precision == fast.warmup_precision == precision and (fast.linears == "all") == (precision != "native")
    assert {resolve(level).precision for level in ("quality", "balanced")} == {"native"}
    assert ("precision" in settings_of("fast", "cuda:0")) == (precision != "native")
    everywhere = {"warmup_steps": 0.1, "warmup_layers": 0.0, "residual": 0.0, "refresh": 2, "first_iterations": 8}
    assert settings_of("fast", "cpu") == everywhere


def test_short_sequences_stay_dense_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve(None).min_tokens == DENSE_BELOW and resolve("sage2").min_tokens == 0


def test_names_of_methods_and_presets():
    assert resolve("svg1") == svg.SVG1Config()
    assert resolve("wan2.1-t2v-720p") == svg.load_preset("wan2.1-t2v-720p").config("near")
    assert resolve("wan2.1-t2v-720p:svg1") == svg.load_preset("wan2.1-t2v-720p").config("svg1")
    with pytest.raises(ValueError) as caught:
        resolve("svg9")
    assert all(word in str(caught.value) for word in ("balanced", "svg2", "wan2.1-t2v-720p", "'svg9'"))
    with pytest.raises(TypeError, match="got int"):
        resolve(3)


def test_min_tokens_runs_dense(load, run):
    pipe = svg.accelerate(load("wan"), svg.SVG2Config(num_q_clusters=3, num_k_clusters=5, min_tokens=31))
    run(pipe)  # 30 tokens
    assert svg.report(pipe)["transformers"]["transformer"]["calls"]["sparse"] == 0
    svg.accelerate(pipe, svg.SVG2Config(num_q_clusters=3, num_k_clusters=5, min_tokens=30))
    run(pipe)
    assert svg.report(pipe)["transformers"]["transformer"]["calls"]["sparse"] > 0


def test_accelerated_restores_after_an_error(load, run):
    pipe = load("wan")
    before = list(pipe.transformer.attn_processors.values())
    with pytest.raises(RuntimeError, match="stop"), svg.accelerated(pipe, "svg1") as same:
        assert same is pipe and list(pipe.transformer.attn_processors.values()) != before
        raise RuntimeError("stop")
    assert list(pipe.transformer.attn_processors.values()) == before


def test_summary_has_fields_text_and_html(load, run, caplog):
    with caplog.at_level(logging.INFO, "svg"):
        pipe = svg.accelerate(load("wan"), svg.SVG2Config(top_p=0.3, num_q_clusters=3, num_k_clusters=5))
        with pytest.raises(ValueError, match="must have run"):
            svg.summary(pipe)
        run(pipe)
    found = svg.summary(pipe)
    report = svg.report(pipe)["transformers"]["transformer"]
    assert found.method == "svg2" and found.density == pytest.approx(report["density"]["all_calls"])
    seconds, calls = report["attention_seconds"], report["calls"]
    dense, sparse = seconds["dense"] / calls["dense"], seconds["sparse"] / calls["sparse"]
    assert found.attention_speedup == pytest.approx(dense / sparse)
    total = report["transformer_seconds"]
    assert found.speedup == pytest.approx((total - seconds["total"] + dense * calls["total"]) / total)
    assert 0 < found.attention_share < 1 and found.peak_memory is None and found.recomputed is None
    assert "computed, all calls" in str(found) and f"{found.density:.1%}" in str(found)
    assert found._repr_html_().startswith("<table>") and "svg2" in found._repr_html_()
    levels = [record.levelname for record in caplog.records if record.name == "svg"]
    assert levels == ["INFO", "WARNING"] and "3 layers, top_p=0.3" in caplog.records[0].getMessage()


def test_a_warm_up_in_8_bits_is_no_baseline_of_a_run(load, run):
    options = {"method": "near", "budget": 0.9, "granule": 8, "warmup_steps": 0.5}
    for precision, known in (("native", True), ("int8-fp8", False)):
        pipe = svg.accelerate(load("wan"), options | {"warmup_precision": precision})
        run(pipe)
        found = svg.summary(pipe)
        assert found.dense_steps and (found.attention_speedup is not None) == known == (found.speedup is not None)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="level must be one of quality, balanced, fast, got 'best'"):
        level_settings("best", fp8=True)
