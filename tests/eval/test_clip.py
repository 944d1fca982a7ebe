"""CLIP from a folder as the hub has it: a tiny random model, with a processor of its own, saved and loaded offline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from svg.cli import main
from svg.eval.clip import Clip
from svg.eval.video import open_video, write_video
from svg.pipelines.clip import load_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1)
    text = dict(size, vocab_size=len(words), max_position_embeddings=16, **ends)
    vision = dict(size, image_size=32, patch_size=8)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_is_what_transformers_computes(model, clip):
    """Against one forward of the whole model, which returns the same cosines times its temperature."""
    from transformers import CLIPModel, CLIPProcessor

    whole, processor = CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)
    inputs = processor(text=["a red ball"], images=list(clip), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = whole(**inputs)
    expected = (out.logits_per_image[:, 0] / whole.logit_scale.exp()).tolist()
    result = Clip("tiny", *load_clip(model))(clip, "a red ball")
    assert result["text"]["per_frame"] == pytest.approx(expected, abs=1e-5)
    images = F.normalize(out.image_embeds, dim=-1)
    consistency = [(images[i] @ images[i - 1] + images[i] @ images[0]).item() / 2 for i in range(1, len(clip))]
    assert result["consistency"]["per_frame"] == pytest.approx(consistency, abs=1e-5)


def test_a_still_video_is_consistent_and_a_file_is_read_as_it_is_measured(model, clip, tmp_path):
    measure = Clip("tiny", *load_clip(model))
    still = np.repeat(clip[:1], 40, axis=0)
    assert measure(still)["consistency"]["mean"] == pytest.approx(1, abs=1e-6) and measure(still)["text"] is None
    assert measure(clip)["consistency"]["mean"] < 1 - 1e-6
    assert measure(clip[:1], "a")["consistency"] is None
    write_video(tmp_path / "a.mp4", still, fps=8)
    assert len(measure(open_video(tmp_path / "a.mp4"), "a")["text"]["per_frame"]) == 40


def test_a_folder_without_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="CLIP could not be loaded from .*empty"):
        load_clip(tmp_path / "empty")


def test_evaluate_tells_both_videos_apart(model, clip, noisy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, frames in (("a", clip), ("b", noisy)):
        write_video(f"{name}.mp4", frames, fps=8)
    common = ["evaluate", "a.mp4", "b.mp4", "--lpips", "none", "--device", "cpu", "--json", "out.json"]
    assert main([*common, "--clip", str(model), "--prompt", "a red ball"]) == 0
    found = json.loads(Path("out.json").read_text())["clip"]
    expected = Clip("tiny", *load_clip(model))(open_video("b.mp4"), "a red ball")
    assert found["output"]["text"]["mean"] == pytest.approx(expected["text"]["mean"], abs=1e-6)
    assert found["reference"]["consistency"]["mean"] != found["output"]["consistency"]["mean"]
    out = capsys.readouterr().out
    assert "CLIP, text" in out and "CLIP, consistency" in out
    assert main([*common, "--clip", "no/such/folder"]) == 0  # a metric that fails is a note
    assert "note: CLIP could not be loaded from no/such/folder" in " ".join(capsys.readouterr().out.split())
    assert json.loads(Path("out.json").read_text())["clip"] is None
    assert main([*common, "--prompt", "a"]) == 2 and "--prompt is for --clip" in capsys.readouterr().err
