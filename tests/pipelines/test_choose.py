"""What `svg.accelerate` runs with: nothing given, a word, a name; and what a run was worth in a few numbers."""

import logging

import pytest
import torch

import svg
from svg.pipelines.choose import DENSE_BELOW, LEVELS, resolve


def test_a_word_is_near_with_its_budget():
    budgets = [resolve(level).budget for level in LEVELS]
    assert budgets == sorted(budgets, reverse=True) and all(resolve(level).method == "near" for level in LEVELS)
    assert resolve(None) == resolve("balanced")


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
